"""LoRA and QLoRA: adapters on the backbone, saved with the other trained modules, and merged into their base model.

peft can read an adapter folder: `adapter_model.safetensors` holds the LoRA matrices, the projectors and the image head
(as `modules_to_save`), and the embedding rows of the image tokens under peft's names for trainable tokens. `base.json`
identifies the model that the adapter was trained on.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, GenerationConfig, set_seed
from transformers.utils import GENERATION_CONFIG_NAME

from evotok_plugin.common.files import apply_umask, write_json
from evotok_plugin.common.folders import write_whole_folder
from evotok_plugin.common.foreign_files import describe_error, reading
from evotok_plugin.common.weight_files import damage_of, read_json
from evotok_plugin.errors import UserError
from evotok_plugin.model_folder import model_type_of
from llava_ext.assembly import NEW_PARTS, assemble
from llava_ext.configuration_evotok_llava import HEAD_SETTINGS, EvoTokLlavaConfig
from llava_ext.generation.saved_settings import settings_to_save
from llava_ext.model_folder import has_fingerprint, load_model, save_model
from llava_ext.modeling_evotok_llava import EvoTokLlavaForConditionalGeneration
from llava_ext.new_tokens import MODULE, add_new_token_rows, merge_new_token_rows, table_names
from llava_ext.training.config import StageConfig
from llava_ext.training.parameter_groups import plain_model, plain_name

WEIGHTS, SETTINGS, BASE = "adapter_model.safetensors", "adapter_config.json", "base.json"
PREFIX = "base_model.model."  # peft adds it to the names of a model's parameters
_PEFT_ROWS = "token_adapter.trainable_tokens_delta"
_NOT_QUANTIZED = ["vision_tower", "lm_head", *NEW_PARTS]


def quantization_for(config: StageConfig, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """The settings of transformers for a 4-bit backbone, or None if the backbone is not quantized.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if config.bits == 16:
        return None
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError("bits=4 needs bitsandbytes; pip install 'evotok[quant]'") from error
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quant_type,
        bnb_4bit_use_double_quant=config.double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=_NOT_QUANTIZED,
    )


def add_lora(model: EvoTokLlavaForConditionalGeneration, config: StageConfig) -> PeftModel:
    """Put LoRA adapters on all linear layers of the backbone."""
    layers = {name.split(".")[-1] for name, m in model.language_model.named_modules() if isinstance(m, nn.Linear)}
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # peft accepts any number: it divides it by the rank
        lora_dropout=config.lora_dropout,
        target_modules=rf"language_model\.(.*\.)?({'|'.join(sorted(layers))})",
    )
    if config.gradient_checkpointing:
        model.enable_input_require_grads()
    set_seed(config.seed)  # the same initial adapters, however many random numbers loading the model has taken
    return _peft_model(model, lora)


def _peft_model(model: EvoTokLlavaForConditionalGeneration, settings: LoraConfig) -> PeftModel:
    adapted = get_peft_model(model, settings)
    assert isinstance(adapted, PeftModel)
    return adapted


def describe_base(config: StageConfig, fingerprints: Mapping[str, str | None]) -> dict[str, Any]:
    """The content of `base.json`: the name of the model that adapters are trained on, and its `base_fingerprints`.

    Of an absolute path only the last part is kept, so that an adapter does not reveal folders of the machine.
    """
    source = Path(config.model_name_or_path)
    return {"name": source.name if source.is_absolute() else config.model_name_or_path, **fingerprints}


# On disk -----------------------------------------------------------------------------------------------------


def _trained(model: PeftModel) -> dict[str, str]:
    """Names of the trained parameters in an adapter file, mapped to their names in the model.

    The rows of new tokens have the names of peft's `trainable_token_indices`, so that peft can
    read them without this package.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    rows = {
        f"{PREFIX}{MODULE}.{of_table}": f"{PREFIX}{name}.{_PEFT_ROWS}"
        for name, of_table in zip(table_names(plain_model(model)), ("inputs", "outputs"), strict=True)
    }
    return {name.replace(".default.", ".") if ".lora_" in name else rows.get(name, name): name for name in names}


def save_adapter(model: PeftModel, folder: Path, state_dict: dict[str, Tensor], base: dict[str, Any]) -> None:
    """Write all trained parameters of a model to an adapter folder.

    Args:
        state_dict: the parameters by their names in the model.
        base: the description of the base model from `describe_base`.
    """
    trained = _trained(model)
    tensors = {saved: state_dict[name].detach().cpu().contiguous() for saved, name in trained.items()}
    modules = {plain_name(name).split(".")[0] for name in trained.values() if ".lora_" not in name} - {MODULE}
    settings, rows = copy.copy(model.peft_config["default"]), plain_model(model).new_token_rows
    assert isinstance(settings, LoraConfig)
    if rows is not None:
        tables = filter(None, table_names(plain_model(model)))
        token_ids = rows.token_ids
        assert isinstance(token_ids, Tensor)
        settings.trainable_token_indices = {name: token_ids.tolist() for name in tables}
    settings.base_model_name_or_path, settings.inference_mode = base["name"], True
    settings.modules_to_save = sorted(modules) or None
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    apply_umask(folder / WEIGHTS)
    settings.save_pretrained(str(folder))
    head = {name: getattr(model.config, name) for name in HEAD_SETTINGS}
    write_json(folder / BASE, {**base, **head})
    with settings_to_save(plain_model(model)):
        plain_model(model).generation_config.save_pretrained(folder)


@torch.no_grad()
def load_adapter(model: PeftModel, folder: Path) -> None:
    """Load an adapter folder of `save_adapter` into a model with the same adapters.

    Raises:
        UserError: the folder has other parameters or other shapes.
    """
    tensors = _read_adapter(folder / WEIGHTS)
    parameters, trained = dict(model.named_parameters()), _trained(model)
    if set(tensors) != set(trained):
        unmatched = sorted(set(tensors) ^ set(trained))
        raise UserError(
            f"{folder} was saved by a run that trained other parameters: {len(unmatched)} differ, such as "
            f"{unmatched[0]}; keep the settings of that run"
        )
    for saved, name in trained.items():
        if tensors[saved].shape != parameters[name].shape:
            raise UserError(
                f"{folder}: {saved} is {tuple(tensors[saved].shape)}, expected {tuple(parameters[name].shape)}; "
                "was lora_r changed?"
            )
        parameters[name].copy_(tensors[saved])


def _read_adapter(file: Path) -> dict[str, Tensor]:
    if cause := damage_of(file):
        raise UserError(f"{file} {cause}")
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {describe_error(error)}; copy it again") from error


def merge(base: str | Path, adapter: str | Path, output: str | Path, vision_tower: str | Path | None = None) -> None:
    """Merge an adapter into the model that it was trained on, and write the merged model.

    Args:
        base: that model: an EvoTok-LLaVA folder, or the causal LM if training started from one.
        adapter: folder of the adapter, or a checkpoint of the run.
        output: new folder.
        vision_tower: EvoTok tokenizer folder; required with a causal LM.

    Raises:
        UserError: a folder does not hold a base model or an adapter, the adapter was trained on another model, or the
            output cannot be written.
    """
    adapter = Path(adapter)
    if not all((adapter / name).is_file() for name in (SETTINGS, WEIGHTS, BASE)):
        inside = adapter / "adapter" / SETTINGS
        hint = f"; did you mean {str(inside.parent)!r}?" if inside.is_file() else ""
        raise UserError(f"{str(adapter)!r} holds no adapter ({SETTINGS}, {WEIGHTS} and {BASE}){hint}")
    facts = read_json(adapter / BASE)
    if "name" not in facts or not {"fingerprint", "sha256"} & set(facts):
        raise UserError(f"{adapter / BASE} does not identify the model that the adapter was trained on; copy it again")
    if Path(base).exists() and not has_fingerprint(base, facts):
        raise UserError(
            f"the adapter in {str(adapter)!r} was trained on {facts['name']!r} with other weights than those in "
            f"{str(base)!r}, or other configuration or tokenizer files; merge it into that model"
        )
    if Path(base).is_dir() and model_type_of(base) == EvoTokLlavaConfig.model_type:
        model, processor = load_model(base, "auto")
    elif vision_tower is None:
        raise UserError(f"{str(base)!r} is a text model; pass --vision_tower FOLDER, the tokenizer it was trained with")
    else:
        head = {name: facts[name] for name in HEAD_SETTINGS if name in facts}  # old adapters: all depth
        model, processor = assemble(base, vision_tower, **head, dtype="auto")
    if (adapter / GENERATION_CONFIG_NAME).is_file():  # older adapters lack the file
        read_json(adapter / GENERATION_CONFIG_NAME)
        with reading(str(adapter / GENERATION_CONFIG_NAME), "copy the folder of the adapter again"):
            model.generation_config = GenerationConfig.from_pretrained(adapter)
    adapted = _with_adapter(model, adapter)
    with reading(str(adapter / WEIGHTS), "train the adapter again"):  # peft rejects NaN and infinite weights
        merged = adapted.merge_and_unload(safe_merge=True)
    assert isinstance(merged, EvoTokLlavaForConditionalGeneration)
    merge_new_token_rows(merged)

    def write(folder: Path) -> None:
        save_model(merged, folder)
        processor.save_pretrained(folder)

    write_whole_folder(output, write)


def _with_adapter(model: EvoTokLlavaForConditionalGeneration, folder: Path) -> PeftModel:
    """The model with the adapter and the other trained modules of a folder."""
    read_json(folder / SETTINGS)
    with reading(str(folder / SETTINGS), "copy the folder of the adapter again"):
        settings = LoraConfig.from_pretrained(str(folder))
    assert isinstance(settings, LoraConfig)
    modules, settings.modules_to_save = settings.modules_to_save or (), None
    settings.base_model_name_or_path = None  # peft would warn about a base that has been moved
    if settings.trainable_token_indices is not None:
        add_new_token_rows(model)
        settings.trainable_token_indices, modules = None, [*modules, MODULE]
    with reading(str(folder / SETTINGS), "copy the folder of the adapter again"):  # peft looks for the layers it names
        adapted = _peft_model(model, settings)
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(".lora_" in name or plain_name(name).split(".")[0] in modules)
    load_adapter(adapted, folder)
    return adapted
