"""LoRA and QLoRA: adapters on the backbone, saved beside what else was trained, folded into a whole model.

An adapter folder is one that peft reads: `adapter_model.safetensors` holds the LoRA matrices, as `modules_to_save` the
projectors and the image head, and the image tokens' rows under peft's names for trainable tokens; `base.json` says
which model they were trained on.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig, set_seed
from transformers.utils import GENERATION_CONFIG_NAME

from evotok_plugin.common.files import apply_umask
from evotok_plugin.common.folders import write_whole_folder
from evotok_plugin.common.weight_files import damage_of, read_json
from evotok_plugin.errors import UserError
from evotok_plugin.model_folder import model_type_of, reading
from llava_ext.assembly import NEW_PARTS, assemble
from llava_ext.configuration_evotok_llava import HEAD_SETTINGS, EvoTokLlavaConfig
from llava_ext.generation.options import store_settings
from llava_ext.model_folder import has_fingerprint, load_model, save_model
from llava_ext.modeling_evotok_llava import EvoTokLlavaForConditionalGeneration
from llava_ext.new_tokens import MODULE, add_new_token_rows, table_names, take_rows_back
from llava_ext.training.config import StageConfig
from llava_ext.training.parameter_groups import plain_name

WEIGHTS, SETTINGS, BASE = "adapter_model.safetensors", "adapter_config.json", "base.json"
PREFIX = "base_model.model."  # before the names of a model's parameters in peft's
_PEFT_ROWS = "token_adapter.trainable_tokens_delta"
_NOT_QUANTIZED = ["vision_tower", "lm_head", *NEW_PARTS]


def quantization_for(config: StageConfig, dtype: torch.dtype):
    """transformers' settings for a 4-bit backbone, or None for one as it is.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if config.bits == 16:
        return None
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError("bits=4 needs bitsandbytes; pip install 'evotok[quant]'") from error
    from transformers import BitsAndBytesConfig

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
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=rf"language_model\.(.*\.)?({'|'.join(sorted(layers))})",
    )
    if config.gradient_checkpointing:
        model.enable_input_require_grads()
    set_seed(config.seed)  # whatever engine has loaded the model before, the adapters start alike
    return get_peft_model(model, lora)


def describe_base(config: StageConfig, fingerprints: Mapping[str, str | None]) -> dict:
    """The content of `base.json` on the model that the adapters were trained on: its name without this machine's
    folders, and its `base_fingerprints`."""
    source = Path(config.model_name_or_path)
    return {
        "name": source.name if source.is_absolute() else config.model_name_or_path,
        **fingerprints,
    }


# On disk -----------------------------------------------------------------------------------------------------


def _trained(model: PeftModel) -> dict[str, str]:
    """Names of the trained parameters, as peft writes them and as the model has them.

    New tokens' rows go by the names of peft's `trainable_token_indices`, so that peft alone reads them, too.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    rows = {
        f"{PREFIX}{MODULE}.{of_table}": f"{PREFIX}{name}.{_PEFT_ROWS}"
        for name, of_table in zip(table_names(model.get_base_model()), ("inputs", "outputs"), strict=True)
    }
    return {name.replace(".default.", ".") if ".lora_" in name else rows.get(name, name): name for name in names}


def save_adapter(model: PeftModel, folder: Path, state_dict: dict[str, Tensor], base: dict) -> None:
    """Write all that is trained of a model; `base` is what `describe_base` gave."""
    trained = _trained(model)
    tensors = {saved: state_dict[name].detach().cpu().contiguous() for saved, name in trained.items()}
    modules = {plain_name(name).split(".")[0] for name in trained.values() if ".lora_" not in name} - {MODULE}
    settings, rows = copy.copy(model.peft_config["default"]), model.get_base_model().new_token_rows
    if rows is not None:
        tables = filter(None, table_names(model.get_base_model()))
        settings.trainable_token_indices = {name: rows.token_ids.tolist() for name in tables}
    settings.base_model_name_or_path, settings.inference_mode = base["name"], True
    settings.modules_to_save = sorted(modules) or None
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    apply_umask(folder / WEIGHTS)
    settings.save_pretrained(folder)
    head = {name: getattr(model.config, name) for name in HEAD_SETTINGS}
    (folder / BASE).write_text(json.dumps({**base, **head}, indent=2))
    store_settings(model.generation_config)
    model.generation_config.save_pretrained(folder)


@torch.no_grad()
def load_adapter(model: PeftModel, folder: Path) -> None:
    """Put back what `save_adapter` wrote into a model made in the same way.

    Raises:
        UserError: it does not fit.
    """
    tensors = _read_adapter(folder / WEIGHTS)
    parameters, trained = dict(model.named_parameters()), _trained(model)
    if set(tensors) != set(trained):
        odd = sorted(set(tensors) ^ set(trained))
        raise UserError(f"{folder} was saved by a run that trained something else, e.g. {odd[0]}")
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
        raise UserError(f"{file} cannot be read: {error}") from error


def merge(base: str | Path, adapter: str | Path, output: str | Path, vision_tower: str | Path | None = None) -> None:
    """Fold an adapter into the model it was trained on and write the whole model.

    Args:
        base: that model: an EvoTok-LLaVA folder, or the causal LM if training started from one.
        adapter: folder with the adapter, or a checkpoint of the run.
        output: new folder.
        vision_tower: EvoTok tokenizer folder, with a causal LM.

    Raises:
        UserError: the folders are not what they should be, the base is another one, or the output cannot be written.
    """
    adapter = Path(adapter)
    if not all((adapter / name).is_file() for name in (SETTINGS, WEIGHTS, BASE)):
        inside = adapter / "adapter" / SETTINGS
        hint = f"; did you mean {str(inside.parent)!r}?" if inside.is_file() else ""
        raise UserError(f"{str(adapter)!r} holds no adapter ({SETTINGS}, {WEIGHTS} and {BASE}){hint}")
    facts = read_json(adapter / BASE)
    if "name" not in facts or not {"fingerprint", "sha256"} & set(facts):
        raise UserError(f"{adapter / BASE} does not say which model the adapter was trained on; copy it again")
    if Path(base).is_dir() and not has_fingerprint(base, facts):
        raise UserError(
            f"the adapter in {str(adapter)!r} was trained on {facts['name']!r} with other weights than those in "
            f"{str(base)!r}, or other configuration or tokenizer files; give that model"
        )
    if Path(base).is_dir() and model_type_of(base) == EvoTokLlavaConfig.model_type:
        model, processor = load_model(base, "auto")
    elif vision_tower is None:
        raise UserError(f"{str(base)!r} is a text model; pass --vision_tower FOLDER, the tokenizer it was trained with")
    else:
        head = {name: facts[name] for name in HEAD_SETTINGS if name in facts}  # adapters were once all of depth heads
        model, processor = assemble(base, vision_tower, **head, dtype="auto")
    if (adapter / GENERATION_CONFIG_NAME).is_file():  # of the run; older adapters have none
        model.generation_config = GenerationConfig.from_pretrained(adapter)
    model = _with_adapter(model, adapter).merge_and_unload(safe_merge=True)
    take_rows_back(model)

    def write(folder: Path) -> None:
        save_model(model, folder)
        processor.save_pretrained(folder)

    write_whole_folder(output, write)


def _with_adapter(model: EvoTokLlavaForConditionalGeneration, folder: Path) -> PeftModel:
    """The model with the adapter and the modules of a folder."""
    read_json(folder / SETTINGS)
    with reading(str(folder / SETTINGS), "copy the adapter's folder again"):
        settings = LoraConfig.from_pretrained(folder)
    modules, settings.modules_to_save = settings.modules_to_save or (), None
    settings.base_model_name_or_path = None  # peft warns where the base lies elsewhere now
    if settings.trainable_token_indices is not None:
        add_new_token_rows(model)
        settings.trainable_token_indices, modules = None, [*modules, MODULE]
    adapted = get_peft_model(model, settings)
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(".lora_" in name or plain_name(name).split(".")[0] in modules)
    load_adapter(adapted, folder)
    return adapted
