"""Numbers of samples that train each parameter group, and the check that no group is left without any."""

from typing import Protocol

import numpy as np
from torch import nn

from evotok_plugin.errors import UserError
from llava_ext.data.records import KINDS
from llava_ext.training.config import StageConfig
from llava_ext.training.parameter_groups import (
    IMAGE_HEAD,
    LANGUAGE_MODEL,
    NEW_TOKENS,
    READ_PROJECTOR,
    WRITE_PROJECTOR,
    learning_rates,
    trained_groups,
)

_DRAWS = (
    'images in "gpt" turns, captions with --caption_task draw or both, or descriptions of images with --draw_share 1'
)
# By group: data that trains it, and a flag that makes the data unnecessary.
_REMEDIES = {
    READ_PROJECTOR: (
        'images in "human" turns, or captions with --caption_task read or both',
        "--tune_read_projector false",
    ),
    WRITE_PROJECTOR: (_DRAWS, "--tune_write_projector false"),
    IMAGE_HEAD: (_DRAWS, "--tune_image_head false"),
    LANGUAGE_MODEL: (_DRAWS, "--text_loss_weight 1"),
}


class Samples(Protocol):
    """Samples by index: a `RecordTable` or a `ConversationDataset`."""

    @property
    def kinds(self) -> np.ndarray:
        """Index in `KINDS` of each sample, (len,)."""
        ...

    @property
    def reads(self) -> np.ndarray:
        """Whether each sample reads an image, (len,)."""
        ...


def samples_of_groups(samples: Samples) -> dict[str, int]:
    """Number of samples that each parameter group takes part in."""
    drawing = int((samples.kinds == KINDS.index("draw")).sum())
    return {
        LANGUAGE_MODEL: len(samples.kinds),
        NEW_TOKENS: len(samples.kinds),
        READ_PROJECTOR: int(samples.reads.sum()),
        WRITE_PROJECTOR: drawing,
        IMAGE_HEAD: drawing,
    }


def counts_in_words(samples: Samples) -> str:
    """Describe the number of samples of each kind, e.g. "558 read, 0 draw, 12 text"."""
    return ", ".join(f"{(samples.kinds == KINDS.index(kind)).sum()} {kind}" for kind in ("read", "draw", "text"))


def check_groups_have_samples(model: nn.Module, config: StageConfig, samples: Samples) -> None:
    """Check that every parameter group that is set to train gets a gradient from some sample.

    A group with learning rate 0 is not set to train. A loss with weight 0 gives no gradient. Drawings of the stage
    itself, if it learns from them, train all groups but the read projector.

    Raises:
        UserError: a group gets none.
    """
    draws = samples.kinds == KINDS.index("draw")
    learned = np.full(len(draws), config.text_loss_weight > 0)
    if config.image_loss_weight > 0:
        learned |= draws  # a drawing is learned, whatever the sample reads before it
    with_gradient = {
        LANGUAGE_MODEL: learned,
        READ_PROJECTOR: learned & samples.reads,
        WRITE_PROJECTOR: learned & draws,
        IMAGE_HEAD: draws & (config.image_loss_weight > 0),
    }
    trained, rates = trained_groups(config), learning_rates(config)
    starved = [
        group
        for group, usable in with_gradient.items()
        if (group == READ_PROJECTOR or not config.learns_from_drawings)
        and trained[group]
        and rates[group]
        and (group == LANGUAGE_MODEL or hasattr(model, group))
        and not usable.any()
    ]
    if not starved:
        return
    weights = [f"{name} is 0" for name in ("text_loss_weight", "image_loss_weight") if not getattr(config, name)]
    raise UserError(
        f"{' and '.join(starved)} would train, but of {len(draws)} samples ({counts_in_words(samples)}) none trains "
        f"{'them' if len(starved) > 1 else 'it'}{''.join(f'; {weight}' for weight in weights)}. {_remedies(starved)}"
    )


def _remedies(starved: list[str]) -> str:
    """One sentence for the groups that learn from the same data."""
    by_data: dict[str, list[str]] = {}
    for group in starved:
        by_data.setdefault(_REMEDIES[group][0], []).append(group)
    sentences = []
    for data, groups in by_data.items():
        flags = " ".join(_REMEDIES[group][1] for group in groups)
        add = f"For {' and '.join(groups)}, add" if len(by_data) > 1 else "Add"
        sentences.append(f"{add} data with {data}, or pass {flags}.")
    return " ".join(sentences)
