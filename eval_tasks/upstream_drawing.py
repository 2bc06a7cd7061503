"""The tasks of lmms-eval itself that draw, edit, or answer with text and images.

Their YAML files carry no mark of it and set options for text (`temperature: 0`), so they are listed here. Their judges
are online models; most tasks score 0 without the judge's key. This module imports almost nothing.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class UpstreamTask:
    """A task of lmms-eval that expects images.

    Attributes:
        modality: `image` (text in, image out), `edit` (images and an instruction in, an image out) or `document` (text
            and images out, as the model decides).
        judge: variables of which one must hold the key of the task's online judge.
        needs_media: whether scoring reads the images of the document, which lmms-eval removes without
            `--process_with_media`.
    """

    modality: str
    judge: tuple[str, ...]
    needs_media: bool = False


UPSTREAM = {
    "WISE": UpstreamTask("image", ("WISE_API_KEY", "OPENAI_API_KEY")),
    "gedit_bench": UpstreamTask("edit", ("VIESCORE_API_KEY",), needs_media=True),
    "imgedit": UpstreamTask("edit", ("IMGEDIT_API_KEY",), needs_media=True),
    "kris_bench": UpstreamTask("edit", ("KRIS_BENCH_API_KEY",), needs_media=True),
    "structeditbench": UpstreamTask("edit", ("STRUCTEDITBENCH_API_KEY",), needs_media=True),
    "babyvision_gen": UpstreamTask("edit", ("BABYVISION_API_KEY",), needs_media=True),
    "ueval": UpstreamTask("document", ("GOOGLE_API_KEY",)),
}


def modality_of(task: str, generation_kwargs: Mapping[str, Any]) -> str:
    """The modality of a task's answers: the one that its options name, else that of upstream's tasks, else text."""
    own = UPSTREAM[task].modality if task in UPSTREAM else "text"
    return generation_kwargs.get("modality") or own


def options_of(task: str, generation_kwargs: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that apply to a task's answers.

    Upstream's drawing tasks set options for the text of other models, which would draw with a temperature of 0; of
    those, only the keys of `--gen_kwargs` apply.
    """
    kept = {key: generation_kwargs[key] for key in given if key in generation_kwargs}
    options = kept if task in UPSTREAM and "modality" not in generation_kwargs else dict(generation_kwargs)
    return {**options, "modality": modality_of(task, generation_kwargs)}


def missing_judge(task: str, environment: Mapping[str, str] = os.environ) -> str:
    """The variables that the judge of an upstream task lacks, as text; empty if it has a key, and for other tasks."""
    names = UPSTREAM[task].judge if task in UPSTREAM else ()
    return "" if any(environment.get(name) for name in names) else " or ".join(names)


def warn_of_judge(task: str) -> None:
    """Log, before anything is drawn, that the online judge of an upstream task has no key."""
    if names := missing_judge(task):
        logger.warning(
            "%s: upstream's judge is an online model, whose key %s is not set. The images are drawn, and scored with 0 "
            "or not at all: set the key, or pass --predict_only to draw without scoring",
            task,
            names,
        )
