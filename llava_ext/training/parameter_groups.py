"""The parts of the model: which of them a stage trains, how fast, and how large they are."""

import math
import re

from torch import Tensor, nn

from llava_ext.new_tokens import MODULE
from llava_ext.training.config import StageConfig

LANGUAGE_MODEL, READ_PROJECTOR, WRITE_PROJECTOR = "language_model", "read_projector", "write_projector"
IMAGE_HEAD, NEW_TOKENS = "image_head", "new_tokens"
GROUPS = (LANGUAGE_MODEL, NEW_TOKENS, READ_PROJECTOR, WRITE_PROJECTOR, IMAGE_HEAD)
_GROUP_OF_MODULE = {**{part: part for part in (READ_PROJECTOR, WRITE_PROJECTOR, IMAGE_HEAD)}, MODULE: NEW_TOKENS}


def plain_name(name: str) -> str:
    """A parameter's name in the model itself, whatever peft has put around it."""
    return name.removeprefix("base_model.model.")


def group_of(name: str) -> str:
    """The part that a parameter belongs to: one of `GROUPS`; the output layer belongs to the language model."""
    return _GROUP_OF_MODULE.get(plain_name(name).split(".")[0], LANGUAGE_MODEL)


def learning_rates(config: StageConfig) -> dict[str, float]:
    """The learning rate of every part; new tokens learn as fast as the projectors, whose outputs stand beside them."""
    own = dict.fromkeys(GROUPS, config.mm_projector_lr)
    own |= {LANGUAGE_MODEL: config.language_model_lr, IMAGE_HEAD: config.image_head_lr}
    return {part: config.learning_rate if rate is None else rate for part, rate in own.items()}


def trained_groups(config: StageConfig) -> dict[str, bool]:
    """Which parts the stage trains. New tokens learn in every stage, with a frozen language model through rows of their
    own."""
    projector = lambda own: config.tune_projectors if own is None else own  # noqa: E731
    return {
        LANGUAGE_MODEL: config.tune_language_model or config.lora_enable,
        NEW_TOKENS: True,
        READ_PROJECTOR: projector(config.tune_read_projector),
        WRITE_PROJECTOR: projector(config.tune_write_projector),
        IMAGE_HEAD: config.tune_image_head,
    }


def freezes_tables(config: StageConfig) -> bool:
    """Whether the stage leaves the backbone's embedding and output tables as they are."""
    return config.lora_enable or not config.tune_language_model


def choose_trainable(model: nn.Module, config: StageConfig) -> None:
    """Unfreeze the parts that the stage trains and freeze the rest; of a language model with adapters only these
    train."""
    trained = trained_groups(config)
    for name, parameter in model.named_parameters():
        if config.lora_enable and group_of(name) == LANGUAGE_MODEL:
            parameter.requires_grad_(".lora_" in name)
        else:
            parameter.requires_grad_(trained[group_of(name)])
        if parameter.requires_grad and not config.deepspeed:
            parameter.data = parameter.data.float()  # DeepSpeed keeps a float32 copy, a plain optimizer has only these


def split_by_group(groups: list[dict], names: dict[Tensor, str], rates: dict[str, float]) -> list[dict]:
    """Optimizer groups, split so that every part has its own learning rate; the rest of a group stays as it is."""
    split = []
    for group in groups:
        for part, rate in rates.items():
            members = [parameter for parameter in group["params"] if group_of(names[parameter]) == part]
            if members:
                split.append({**group, "params": members, "lr": rate})
    return split


def numel_of(parameter: Tensor) -> int:
    """How many numbers a parameter holds, also where ZeRO-3 has spread it or bitsandbytes has packed it."""
    if hasattr(parameter, "ds_numel"):
        return parameter.ds_numel
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def is_decayed(name: str) -> bool:
    """Whether weight decay applies, beyond Trainer's own exclusions; embeddings of places and of new tokens are not
    decayed."""
    return not re.search(rf"(position|level)_embedding$|\b{MODULE}\.", name)
