"""Configurations of models that an estimate assumes where a folder does not exist yet: nothing is downloaded."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from evotok_plugin import EvoTokConfig
from evotok_plugin.common.recipes import recipes_folder
from evotok_plugin.errors import UserError
from evotok_plugin.model_folder import model_type_of, open_config
from llava_ext.backbone import open_backbone_config
from llava_ext.configuration_evotok_llava import EvoTokLlavaConfig
from llava_ext.model_folder import INCLUDED_MODEL
from llava_ext.training.config import StageConfig
from llava_ext.training.head_settings import check_kind_of_head, new_head_settings
from llava_ext.training.settings import stage_values

# Published sizes: (model type, width, MLP width, layers, heads, key-value heads, vocabulary, tied embeddings).
_PUBLISHED: dict[str, tuple[str, int, int, int, int, int, int, bool]] = {
    "qwen2.5-0.5b": ("qwen2", 896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-1.5b": ("qwen2", 1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-3b": ("qwen2", 2048, 11008, 36, 16, 2, 151936, True),
    "qwen2.5-7b": ("qwen2", 3584, 18944, 28, 28, 4, 152064, False),
    "qwen2.5-14b": ("qwen2", 5120, 13824, 48, 40, 8, 152064, False),
    "qwen2.5-32b": ("qwen2", 5120, 27648, 64, 40, 8, 152064, False),
    "vicuna-7b-v1.5": ("llama", 4096, 11008, 32, 32, 32, 32000, False),
    "vicuna-13b-v1.5": ("llama", 5120, 13824, 40, 40, 40, 32000, False),
    "smollm2-135m": ("llama", 576, 1536, 30, 9, 3, 49152, True),
    "smollm2-360m": ("llama", 960, 2560, 32, 15, 5, 49152, True),
    "smollm2-1.7b": ("llama", 2048, 8192, 24, 32, 32, 49152, True),
}


@dataclass
class AssumedModel:
    """The configuration of the model of a run, and the assumptions behind it."""

    config: EvoTokLlavaConfig
    notes: list[str] = field(default_factory=list)


def model_of(run: StageConfig) -> AssumedModel:
    """The configuration of the model of a run.

    A folder that does not exist yet is the output of another recipe, or one of the inputs of the embedded default. The
    sizes of well-known LLMs are built in.

    Raises:
        UserError: the configuration cannot be read or derived.
    """
    return _model_of(run, ())


def _model_of(run: StageConfig, seen: tuple[str, ...]) -> AssumedModel:
    name = run.model_name_or_path
    if not name:
        raise UserError("model_name_or_path is not set; pass --model_name_or_path or put it into the recipe")
    if Path(name).is_dir() and model_type_of(name) == EvoTokLlavaConfig.model_type:
        config = open_config(EvoTokLlavaConfig, name)
        assert isinstance(config, EvoTokLlavaConfig)
        check_kind_of_head(run, config)
        return AssumedModel(config)
    if not Path(name).exists() and name not in seen:
        for recipe in sorted(recipes_folder("llava_ext").glob("*.yaml")):
            earlier = _run_of(recipe, run.workspace)
            if earlier.output_dir == name:
                found = _model_of(earlier, (*seen, name))
                check_kind_of_head(run, found.config)
                note = f"{name} does not exist; the model of recipe {recipe.stem}, which writes it, is assumed"
                return AssumedModel(found.config, [note, *found.notes])
    text, notes = _text_config(run)
    vision, more = _vision_config(run)
    config = EvoTokLlavaConfig(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        residual_token_offset=text.vocab_size,
        **new_head_settings(run),
    )
    return AssumedModel(config, [*notes, *more])


def schema_of(recipe: str) -> type[StageConfig]:
    """The settings of a recipe: those of reinforcement if it is meant for it."""
    from evotok_plugin.common.recipes import find_recipe, read_recipe
    from llava_ext.training.reinforcement.config import ReinforceConfig

    return ReinforceConfig if "rewards" in read_recipe(find_recipe(recipe, "llava_ext")) else StageConfig


def _run_of(recipe: Path, workspace: str) -> StageConfig:
    schema = schema_of(str(recipe))
    return schema(**stage_values(str(recipe), {"workspace": workspace}, schema=schema))


def _included() -> EvoTokLlavaConfig:
    config = open_config(EvoTokLlavaConfig, INCLUDED_MODEL)
    assert isinstance(config, EvoTokLlavaConfig)
    return config


def _text_config(run: StageConfig) -> tuple[PreTrainedConfig, list[str]]:
    name = run.model_name_or_path
    if not Path(name).exists():
        if name == f"{run.workspace}/backbone":
            return _included().text_config, [f"{name} does not exist; that of the included model is assumed"]
        short = name.rpartition("/")[2].lower()
        for known, sizes in _PUBLISHED.items():
            if short == known or short.startswith(f"{known}-"):
                return _published(sizes), [f"sizes of {name} as published; its config.json is not read"]
    try:
        return open_backbone_config(name), []
    except UserError as error:
        raise UserError(
            f"the configuration of {name!r} cannot be read: {error}. Without a network connection, pass "
            f"--model_name_or_path FOLDER, a folder with its config.json, or one of {', '.join(_PUBLISHED)}"
        ) from error


def _published(sizes: tuple[str, int, int, int, int, int, int, bool]) -> PreTrainedConfig:
    kind, width, mlp, layers, heads, key_value_heads, vocabulary, tied = sizes
    make: Callable[..., Any] = AutoConfig.for_model
    return make(
        kind,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )


def _vision_config(run: StageConfig) -> tuple[PreTrainedConfig, list[str]]:
    folder = run.vision_tower
    if not folder:
        return EvoTokConfig.preset("paper"), ["vision_tower is not set; the paper's tokenizer is assumed"]
    if folder == f"{run.workspace}/evotok" and not Path(folder).exists():
        return _included().vision_config, [f"{folder} does not exist; that of the included model is assumed"]
    if folder == f"{run.workspace}/evotok_base" and not Path(folder).exists():
        return EvoTokConfig.preset("base"), [f"{folder} does not exist; the tokenizer of recipe base is assumed"]
    if model_type_of(folder) != "evotok":
        raise UserError(f"{folder!r} is not an EvoTok tokenizer (model_type {model_type_of(folder)!r})")
    return open_config(EvoTokConfig, folder), []
