"""The parts of the model: which of them a stage trains, how fast, and how large they are."""

import math
import re

from torch import Tensor, nn

from llava_ext.training.config import StageConfig

LANGUAGE_MODEL, PROJECTORS, IMAGE_HEAD = "language_model", "projectors", "image_head"
PARTS = (LANGUAGE_MODEL, PROJECTORS, IMAGE_HEAD)
_PART_OF_MODULE = {"read_projector": PROJECTORS, "write_projector": PROJECTORS, "image_head": IMAGE_HEAD}


def plain_name(name: str) -> str:
    """A parameter's name in the model itself, whatever peft has put around it."""
    return name.removeprefix("base_model.model.")


def part_of(name: str) -> str:
    """The part that a parameter belongs to: the language model (with its output layer), projectors or image head."""
    return _PART_OF_MODULE.get(plain_name(name).split(".")[0], LANGUAGE_MODEL)


def learning_rates(config: StageConfig) -> dict[str, float]:
    """The learning rate of every part."""
    own = {
        LANGUAGE_MODEL: config.language_model_lr,
        PROJECTORS: config.mm_projector_lr,
        IMAGE_HEAD: config.image_head_lr,
    }
    return {part: config.learning_rate if rate is None else rate for part, rate in own.items()}


def choose_trainable(model: nn.Module, config: StageConfig) -> None:
    """Free the parts that the stage trains and freeze the rest; adapters keep what they have."""
    trained = {
        PROJECTORS: config.tune_projectors,
        IMAGE_HEAD: config.tune_image_head,
        LANGUAGE_MODEL: config.tune_language_model,
    }
    for name, parameter in model.named_parameters():
        if config.lora_enable and part_of(name) == LANGUAGE_MODEL:
            parameter.requires_grad_(".lora_" in name)
        else:
            parameter.requires_grad_(trained[part_of(name)])
        if parameter.requires_grad and not config.deepspeed:
            parameter.data = parameter.data.float()  # DeepSpeed keeps a float32 copy, a plain optimizer has only these


def group_by_part(groups: list[dict], names: dict[Tensor, str], rates: dict[str, float]) -> list[dict]:
    """Optimizer groups, split so that every part has its own learning rate; the rest of a group stays as it is."""
    split = []
    for group in groups:
        for part, rate in rates.items():
            members = [parameter for parameter in group["params"] if part_of(names[parameter]) == part]
            if members:
                split.append({**group, "params": members, "lr": rate})
    return split


def size_of(parameter: Tensor) -> int:
    """How many numbers a parameter holds, also where ZeRO-3 has spread it or bitsandbytes has packed it."""
    if hasattr(parameter, "ds_numel"):
        return parameter.ds_numel
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def is_decayed(name: str) -> bool:
    """Whether weight decay makes sense beyond Trainer's own exclusions: an embedding of places has no scale to lose."""
    return not re.search(r"(position|level)_embedding$", name)
