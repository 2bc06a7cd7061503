"""Parameter groups of the model (backbone, projectors, image head, new tokens): what trains, how fast, how large."""

import math
import re

from peft import PeftModel
from torch import Tensor, nn

from llava_ext.modeling_evotok_llava import EvoTokLlavaForConditionalGeneration
from llava_ext.new_tokens import MODULE
from llava_ext.training.config import StageConfig

LANGUAGE_MODEL, READ_PROJECTOR, WRITE_PROJECTOR = "language_model", "read_projector", "write_projector"
IMAGE_HEAD, NEW_TOKENS = "image_head", "new_tokens"
GROUPS = (LANGUAGE_MODEL, NEW_TOKENS, READ_PROJECTOR, WRITE_PROJECTOR, IMAGE_HEAD)
_GROUP_OF_MODULE = {**{group: group for group in (READ_PROJECTOR, WRITE_PROJECTOR, IMAGE_HEAD)}, MODULE: NEW_TOKENS}


def plain_model(model: nn.Module) -> EvoTokLlavaForConditionalGeneration:
    """The model itself, without the wrapper that peft puts around it."""
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(plain, EvoTokLlavaForConditionalGeneration)
    return plain


def plain_name(name: str) -> str:
    """The name of a parameter in the model itself, without the prefix of peft's wrapper."""
    return name.removeprefix("base_model.model.")


def group_of(name: str) -> str:
    """The group that a parameter belongs to: one of `GROUPS`; the output layer belongs to the language model."""
    return _GROUP_OF_MODULE.get(plain_name(name).split(".")[0], LANGUAGE_MODEL)


def learning_rates(config: StageConfig) -> dict[str, float]:
    """The learning rate of every group.

    New tokens have that of the projectors, because their embeddings are next to the projectors' outputs in a sequence.
    """
    given = dict.fromkeys(GROUPS, config.mm_projector_lr)
    given |= {LANGUAGE_MODEL: config.language_model_lr, IMAGE_HEAD: config.image_head_lr}
    return {group: config.learning_rate if rate is None else rate for group, rate in given.items()}


def trained_groups(config: StageConfig) -> dict[str, bool]:
    """Whether the stage trains each group.

    New tokens train in every stage; if the language model is frozen, in embedding rows separate from its tables.
    """

    def is_trained(setting: bool | None) -> bool:
        return config.tune_projectors if setting is None else setting

    return {
        LANGUAGE_MODEL: config.tune_language_model or config.lora_enable,
        NEW_TOKENS: True,
        READ_PROJECTOR: is_trained(config.tune_read_projector),
        WRITE_PROJECTOR: is_trained(config.tune_write_projector),
        IMAGE_HEAD: config.tune_image_head,
    }


def freezes_tables(config: StageConfig) -> bool:
    """Whether the stage leaves the embedding and output tables of the backbone unchanged."""
    return config.lora_enable or not config.tune_language_model


def choose_trainable(model: nn.Module, config: StageConfig) -> None:
    """Unfreeze the groups that the stage trains and freeze the others.

    Of a language model with LoRA, only the adapters are unfrozen.
    """
    trained = trained_groups(config)
    for name, parameter in model.named_parameters():
        if config.lora_enable and group_of(name) == LANGUAGE_MODEL:
            parameter.requires_grad_(".lora_" in name)
        else:
            parameter.requires_grad_(trained[group_of(name)])
        if parameter.requires_grad and not config.deepspeed:
            # DeepSpeed keeps float32 copies of what it trains; a plain optimizer updates the parameters themselves.
            parameter.data = parameter.data.float()


def split_by_group(optimizer_groups: list[dict], names: dict[Tensor, str], rates: dict[str, float]) -> list[dict]:
    """Split the groups of an optimizer so that each has parameters of one group of the model, at its learning rate."""
    split = []
    for optimizer_group in optimizer_groups:
        for group, rate in rates.items():
            members = [parameter for parameter in optimizer_group["params"] if group_of(names[parameter]) == group]
            if members:
                split.append({**optimizer_group, "params": members, "lr": rate})
    return split


def numel_of(parameter: Tensor) -> int:
    """The number of values in a parameter, also if ZeRO-3 has partitioned it or bitsandbytes has packed it."""
    if hasattr(parameter, "ds_numel"):
        return parameter.ds_numel
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def is_decayed(name: str) -> bool:
    """Whether weight decay applies to a parameter, in addition to Trainer's own exclusions.

    Position and level embeddings and the rows of new tokens are not decayed.
    """
    return not re.search(rf"(position|level)_embedding$|\b{MODULE}\.", name)
