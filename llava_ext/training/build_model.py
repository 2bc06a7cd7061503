"""From the settings of a stage to the model that it trains."""

import logging
import os
import re

import torch
from peft import PeftModel
from transformers.utils import is_flash_attn_2_available

from evotok_plugin.errors import UserError
from evotok_plugin.model_folder import model_type_of, open_config
from evotok_plugin.tokenizer_folder import open_tokenizer
from llava_ext.assembly import assemble
from llava_ext.backbone import check_source, is_gguf
from llava_ext.configuration_evotok_llava import EvoTokLlavaConfig
from llava_ext.model_folder import load_model, read_tower, set_tower_aside
from llava_ext.modeling_evotok_llava import EvoTokLlavaForConditionalGeneration
from llava_ext.new_tokens import add_new_token_rows
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor
from llava_ext.training.adapters import add_lora, quantization_for
from llava_ext.training.config import StageConfig
from llava_ext.training.deepspeed_config import unpartitioned_models, zero_stage
from llava_ext.training.head_settings import check_kind_of_head, new_head_settings
from llava_ext.training.parameter_groups import choose_trainable, freezes_tables

logger = logging.getLogger("llava_ext")


def attention_for(config: StageConfig) -> str:
    """The attention implementation: by default FlashAttention 2 on CUDA if it is installed, else PyTorch's SDPA."""
    if config.attn_implementation != "auto":
        return config.attn_implementation
    flash = is_flash_attn_2_available() and config.device.type == "cuda" and (config.bf16 or config.fp16)
    return "flash_attention_2" if flash else "sdpa"


def build_model(config: StageConfig) -> tuple[EvoTokLlavaForConditionalGeneration, EvoTokLlavaProcessor]:
    """Load an EvoTok-LLaVA folder, or assemble a model from a causal LM and a tokenizer.

    Raises:
        UserError: the model cannot be loaded, or has another image head than the stage asks for.
    """
    attention = attention_for(config)
    dtype = torch.bfloat16 if config.bf16 and config.device.type == "cuda" else torch.float32
    logger.info("attention: %s; weights: %s; device: %s", attention, dtype, config.device)
    quantization = quantization_for(config, dtype)
    source = config.model_name_or_path
    check_source(source)
    if os.path.isdir(source):
        if model_type_of(source) == EvoTokLlavaConfig.model_type:
            head_config = open_config(EvoTokLlavaConfig, source)
            assert isinstance(head_config, EvoTokLlavaConfig)
            check_kind_of_head(config, head_config)
            model, processor = load_model(source, dtype, attention, quantization)
            if zero_stage(config) == 3:
                with unpartitioned_models(config):
                    model.vision_tower = read_tower(source)
            return model, processor
    elif not is_gguf(source) and (
        not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith(f"{config.workspace}/")
    ):
        raise UserError(
            f"model folder {source!r} does not exist; "
            f"`bash scripts/pretrain.sh --workspace {config.workspace}` creates one, "
            "or name a folder, a hub id or a GGUF file with --model_name_or_path"
        )
    if not config.vision_tower:
        raise UserError(f"{source!r} is a text model; also pass --vision_tower FOLDER, an EvoTok tokenizer")
    with unpartitioned_models(config):
        return assemble(
            source,
            config.vision_tower,
            **new_head_settings(config),
            dtype=dtype,
            attn_implementation=attention,
            quantization_config=quantization,
        )


def check_tower(config: StageConfig, model: EvoTokLlavaForConditionalGeneration) -> None:
    """Check that `vision_tower`, if it is set, is the tokenizer of the model.

    Raises:
        UserError: it has other weights.
    """
    if not config.vision_tower:
        return
    with unpartitioned_models(config):
        tower, _ = open_tokenizer(config.vision_tower, "cpu")
    if tower.fingerprint() != model.vision_tower.fingerprint():
        raise UserError(
            f"{config.model_name_or_path!r} includes a tokenizer, and --vision_tower {config.vision_tower} has other "
            "weights; leave --vision_tower out, or start from a causal LM"
        )


def make_trainable(
    model: EvoTokLlavaForConditionalGeneration, config: StageConfig
) -> EvoTokLlavaForConditionalGeneration | PeftModel:
    """Prepare a model for Trainer: its tokenizer set aside, adapters added with LoRA, the trained groups unfrozen."""
    set_tower_aside(model)
    if freezes_tables(config):
        add_new_token_rows(model)
    trained = add_lora(model, config) if config.lora_enable else model
    choose_trainable(trained, config)
    return trained


def training_method(config: StageConfig) -> str:
    """The training method of the backbone: full, lora or qlora."""
    return ("qlora" if config.bits == 4 else "lora") if config.lora_enable else "full"
