"""Which samples each part of the model learns from, and the check that there are some."""

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

_DRAWS = 'images in "gpt" turns, or captions with --caption_task draw or both'
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
    """Samples by number: a `RecordTable` or a `ConversationDataset`.

    Attributes:
        kinds: number in `KINDS` of each sample (len,).
        reads: whether each sample (len,) reads an image.
    """

    kinds: np.ndarray
    reads: np.ndarray


def samples_of_groups(samples: Samples) -> dict[str, int]:
    """Number of samples that each part takes part in."""
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
    """Refuse a run in which a part is set to train but no sample gives it a gradient.

    A part with learning rate 0 is not set to train. A loss with weight 0 gives no gradient.

    Raises:
        UserError: there is such a part.
    """
    draws = samples.kinds == KINDS.index("draw")
    learned = np.full(len(draws), config.text_loss_weight > 0)
    if config.image_loss_weight > 0:
        learned |= draws  # what is drawn is learned, whatever was read before
    with_gradient = {
        LANGUAGE_MODEL: learned,
        READ_PROJECTOR: learned & samples.reads,
        WRITE_PROJECTOR: learned & draws,
        IMAGE_HEAD: draws & (config.image_loss_weight > 0),
    }
    chosen, rates = trained_groups(config), learning_rates(config)
    starved = [
        part
        for part, usable in with_gradient.items()
        if chosen[part] and rates[part] and (part == LANGUAGE_MODEL or hasattr(model, part)) and not usable.any()
    ]
    if not starved:
        return
    weights = [f"{name} is 0" for name in ("text_loss_weight", "image_loss_weight") if not getattr(config, name)]
    raise UserError(
        f"{' and '.join(starved)} would train, but of {len(draws)} samples ({counts_in_words(samples)}) none trains "
        f"{'them' if len(starved) > 1 else 'it'}{''.join(f'; {weight}' for weight in weights)}. {_remedies(starved)}"
    )


def _remedies(starved: list[str]) -> str:
    """One sentence for the parts that learn from the same data."""
    by_data: dict[str, list[str]] = {}
    for part in starved:
        by_data.setdefault(_REMEDIES[part][0], []).append(part)
    sentences = []
    for data, parts in by_data.items():
        flags = " ".join(_REMEDIES[part][1] for part in parts)
        add = f"For {' and '.join(parts)}, add" if len(by_data) > 1 else "Add"
        sentences.append(f"{add} data with {data}, or pass {flags}.")
    return " ".join(sentences)
