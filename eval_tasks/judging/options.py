"""Options of judging, from the command line or, inside lmms-eval, which has no options for tasks, from the environment.

The environment changes only how images are judged, never a model; the options are recorded in the results.
"""

import difflib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from evotok_plugin.common.processes import resolve_device
from evotok_plugin.errors import UserError

_PREFIX = "EVOTOK_JUDGE_"


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """The judges, their device and their batch size; `EVOTOK_JUDGE_<NAME>` sets them in lmms-eval.

    Attributes:
        detector: GenEval's detector: a Mask2Former with COCO's classes (folder or hub id), or `scenes`, the exact
            detector of colored shapes; by default the task's own.
        clip: GenEval's color classifier in open_clip's format (folder or hub id).
        vqa: the model that answers the questions of GenAI-Bench and DPG-Bench (folder or hub id).
        device: by default CUDA if available.
        batch_size: images, crops or questions per batch.

    Raises:
        UserError: an unavailable device, or a batch size below 1.
    """

    detector: str = ""
    clip: str = "timm/vit_large_patch14_clip_224.openai"
    vqa: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    device: str = ""
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"the judges' batch size must be at least 1, got {self.batch_size}")
        resolve_device(self.device)

    @property
    def torch_device(self) -> torch.device:
        return resolve_device(self.device)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "JudgeOptions":
        """Read the variables named `EVOTOK_JUDGE_<NAME>`.

        Raises:
            UserError: an unknown variable of that form, or an invalid batch size or device.
        """
        known = {f"{_PREFIX}{item.name.upper()}": item.name for item in fields(cls)}
        given = {name: value for name, value in environment.items() if name.startswith(_PREFIX)}
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
                raise UserError(
                    f"{name} is not an option of the judges; did you mean {near[0]}? Known: {', '.join(known)}"
                )
        values: dict[str, Any] = {known[name]: value for name, value in given.items()}
        if "batch_size" in values:
            try:
                values["batch_size"] = int(values["batch_size"])
            except ValueError:
                raise UserError(f"{_PREFIX}BATCH_SIZE must be a number, got {values['batch_size']!r}") from None
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def variable(name: str) -> str:
    """The environment variable of an option."""
    return f"{_PREFIX}{name.upper()}"
