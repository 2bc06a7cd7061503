"""Model folders: open and save an EvoTok-LLaVA model with its processor, and identify its weights."""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evotok_plugin import EvoTokImageProcessor, EvoTokModel
from evotok_plugin.common.digests import sha256_of_file
from evotok_plugin.common.foreign_files import reading
from evotok_plugin.common.processes import resolve_device
from evotok_plugin.common.weight_checks import load_strictly
from evotok_plugin.common.weight_files import folder_fingerprint, named_weights
from evotok_plugin.errors import UserError
from evotok_plugin.model_folder import (
    CONFIG,
    load_whole,
    model_type_of,
    open_config,
    open_processor,
    read_config,
)
from llava_ext.attention_support import supported_attention
from llava_ext.backbone import is_gguf
from llava_ext.configuration_evotok_llava import EvoTokLlavaConfig
from llava_ext.modeling_evotok_llava import EvoTokLlavaForConditionalGeneration
from llava_ext.new_tokens import put_rows_into_tables
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor

TOWER = "vision_tower."  # prefix of the tokenizer's weights in a model folder
INCLUDED_MODEL = Path(__file__).parent / "pretrained" / "scenes"
DEFAULT_MODELS = tuple(
    f"{workspace}/{stage}" for workspace in ("outputs", "outputs/quickstart") for stage in ("finetune", "reinforce")
)


def load_model(
    folder: str | Path,
    dtype: torch.dtype | str = torch.float32,
    attn_implementation: str = "sdpa",
    quantization_config: object | None = None,
) -> tuple[EvoTokLlavaForConditionalGeneration, EvoTokLlavaProcessor]:
    """Load a saved EvoTok-LLaVA folder; every weight must be present and fit.

    Args:
        dtype: of all weights except the tokenizer's, which stay float32; "auto" keeps the dtype they were saved in.
        attn_implementation: "sdpa" becomes "eager" for a backbone without SDPA.
        quantization_config: a quantization config of transformers, to quantize the backbone while it loads.

    Raises:
        UserError: the folder holds another kind of model, or weights are missing, unexpected or of another shape.
    """
    if (Path(folder) / "adapter_config.json").is_file():
        raise UserError(
            f"{str(folder)!r} holds an adapter, not a complete model; merge it into the model that it was trained on: "
            f"evotok-llava merge BASE {folder} -o OUT"
        )
    kind = model_type_of(folder)
    if kind != EvoTokLlavaConfig.model_type:
        raise UserError(
            f"{str(folder)!r} holds a {kind or 'nameless'} model, expected {EvoTokLlavaConfig.model_type}; "
            "pass the output folder of scripts/pretrain.sh or scripts/finetune.sh"
        )
    for part in ("text_config", "vision_config"):
        if not isinstance(read_config(folder).get(part), dict):  # the default has billions of weights
            raise UserError(f"{Path(folder) / CONFIG}: expected an object with model settings as {part}; restore it")
    config = open_config(EvoTokLlavaConfig, folder)
    assert isinstance(config, EvoTokLlavaConfig)
    model = load_whole(
        EvoTokLlavaForConditionalGeneration,
        folder,
        dtype=dtype,
        attn_implementation=supported_attention(config.text_config, attn_implementation),
        quantization_config=quantization_config,
    )
    assert isinstance(model, EvoTokLlavaForConditionalGeneration)
    return model, open_llava_processor(folder, model.config)


def open_llava_processor(folder: str | Path, config: EvoTokLlavaConfig) -> EvoTokLlavaProcessor:
    """Load the processor of a model folder.

    Raises:
        UserError: its files are missing or damaged, or it does not fit the model.
    """
    processor = open_processor(
        EvoTokLlavaProcessor,
        folder,
        "the processor",
        [("processor_config.json",), ("tokenizer_config.json",), ("tokenizer.json",)],
        "copy the processor's files from the folder where the model was trained or saved, "
        "or write them with processor.save_pretrained",
    )
    if not isinstance(processor.image_processor, EvoTokImageProcessor):
        raise UserError(
            f"{Path(folder) / 'processor_config.json'}: expected an EvoTokImageProcessor, got "
            f"{type(processor.image_processor).__name__}"
        )
    if processor.pad_id is None:
        raise UserError(
            f"{Path(folder) / 'tokenizer_config.json'} names neither a pad_token nor an eos_token; restore it from the "
            "folder where the model was trained or saved"
        )
    try:
        config.check_processor(processor)
    except UserError as error:
        raise UserError(f"the processor in {str(folder)!r} does not fit the model: {error}") from error
    with reading(f"the chat template or tokenizer in {str(folder)!r}", "restore it from where the model was saved"):
        turns = [{"role": "user", "content": "<image>\na"}, {"role": "assistant", "content": "b"}]
        if processor.lay_out(turns).num_steps < processor.num_positions:
            raise UserError("the tokens of images are not recognized")
    return processor


def read_tower(folder: str | Path) -> EvoTokModel:
    """Load only the tokenizer of a model folder, in float32 on the CPU, independent of DeepSpeed.

    Raises:
        UserError: its weights are missing or damaged, or do not fit.
    """
    config = open_config(EvoTokLlavaConfig, folder).vision_config
    weights = {name.removeprefix(TOWER): read() for name, _, read in named_weights(folder) if name.startswith(TOWER)}
    tower = EvoTokModel(config)
    load_strictly(tower, weights, f"the tokenizer in {str(folder)!r}")
    tower.quantizer.fix()
    return tower.requires_grad_(False).eval()


def weights_fingerprint(folder: str | Path) -> str:
    """sha256 over the names, shapes, dtypes and first rows of a folder's weights, except the tokenizer's.

    Only for adapters and runs that predate `folder_fingerprint`: weights that differ only in later rows have the same
    value.
    """
    facts = []
    for name, part, read in named_weights(folder):
        if not name.startswith(TOWER):
            row = part[:1] if part.get_shape() else read()
            first = row.flatten().contiguous().view(torch.uint8).numpy().tobytes()
            facts.append(f"{name} {part.get_shape()} {part.get_dtype()} {hashlib.sha256(first).hexdigest()}")
    return hashlib.sha256("\n".join(sorted(facts)).encode()).hexdigest()


def base_fingerprints(folder: str | Path) -> dict[str, str | None]:
    """Identity of the model that training starts from: `sha256` of its files (`folder_fingerprint`), and
    `fingerprint`, which earlier versions compare. Both are None if the folder has no safetensors weights; of a GGUF
    file, only `fingerprint` is."""
    if is_gguf(folder) and Path(folder).is_file():
        return {"fingerprint": None, "sha256": sha256_of_file(Path(folder))}
    if not any(Path(folder).glob("model*.safetensors")):
        return {"fingerprint": None, "sha256": None}
    return {"fingerprint": weights_fingerprint(folder), "sha256": folder_fingerprint(folder)}


def has_fingerprint(folder: str | Path, known: Mapping[str, str | None]) -> bool:
    """Whether a folder's model matches recorded `base_fingerprints`; true if none are recorded.

    Raises:
        UserError: config.json is missing or damaged, or the weights cannot be read.
    """
    if is_gguf(folder) and Path(folder).is_file():
        return known.get("sha256") in (None, sha256_of_file(Path(folder)))
    read_config(folder)  # a damaged file is reported as such, not as another model
    if known.get("sha256") is not None:
        return folder_fingerprint(folder) == known["sha256"]
    return known.get("fingerprint") is None or weights_fingerprint(folder) == known["fingerprint"]


def default_model_folder() -> Path:
    """The newest model trained in the working folder; if there is none, the model included in the package.

    Raises:
        UserError: neither exists.
    """
    found = [Path(folder) for folder in DEFAULT_MODELS if (Path(folder) / CONFIG).is_file()]
    if not found and (INCLUDED_MODEL / CONFIG).is_file():
        return INCLUDED_MODEL
    if not found:
        raise UserError(
            f"no trained model in {' or '.join(DEFAULT_MODELS)}; run `bash scripts/quickstart.sh`, "
            "or pass one with --model"
        )
    return max(found, key=lambda folder: (folder / CONFIG).stat().st_mtime)


# Writing -----------------------------------------------------------------------------------------------------


def set_tower_aside(model: EvoTokLlavaForConditionalGeneration) -> None:
    """Remove the frozen tokenizer from the model's modules for the lifetime of the model; `model.vision_tower` still
    returns it.

    A training engine casts all modules to the training dtype, shards them over processes and saves them with every
    checkpoint. Rounded codebooks would choose other codes, so the engine must not see the tokenizer. Move it to the
    device separately: `model.to` no longer does. `tower_aside` does the same for a block.
    """
    if "vision_tower" in model._modules:
        tower = model.vision_tower
        del model.vision_tower
        object.__setattr__(model, "vision_tower", tower)


@contextlib.contextmanager
def tower_aside(model: EvoTokLlavaForConditionalGeneration) -> Iterator[None]:
    """`set_tower_aside` for a block: afterwards, also after an error, the model has its modules in their old order.

    A model whose tokenizer is already set aside stays that way.
    """
    names = list(model._modules)
    set_tower_aside(model)
    try:
        yield
    finally:
        if "vision_tower" in names:
            following = names[names.index("vision_tower") + 1 :]
            model.add_module("vision_tower", model.__dict__.pop("vision_tower"))
            for name in following:
                model._modules[name] = model._modules.pop(name)


def save_model(
    model: EvoTokLlavaForConditionalGeneration,
    folder: str | Path,
    state_dict: dict[str, Tensor] | None = None,
    **options: Any,
) -> None:
    """Write weights and configuration; the model keeps its modules and weights.

    The dtype in config.json is that of the weights other than the tokenizer's. Rows of new tokens that train separately
    are written into their tables.

    Args:
        state_dict: the weights, if not the model's own (gathered from other processes); the tokenizer's weights are
            always those of the model.
        options: passed to `save_pretrained`.
    """
    with tower_aside(model):  # transformers records the dtype of the first parameter
        weights = put_rows_into_tables(model, dict(model.state_dict() if state_dict is None else state_dict))
        if model.config.tie_word_embeddings:
            weights.pop("lm_head.weight")  # a copy is not recognized as tied
        tower = {f"{TOWER}{name}": value for name, value in model.vision_tower.state_dict().items()}
        model.save_pretrained(folder, state_dict={**weights, **tower}, **options)


@dataclass(frozen=True)
class OpenModel:
    """A model on its device in evaluation mode, with its processor.

    Attributes:
        name: name of the model's folder, without its path.
        fingerprint: fingerprint of the folder's content (`folder_fingerprint`).
    """

    model: EvoTokLlavaForConditionalGeneration
    processor: EvoTokLlavaProcessor
    name: str
    fingerprint: str


def open_model(
    folder: str | Path, device: str | torch.device = "auto", dtype: torch.dtype | str = torch.float32
) -> OpenModel:
    """Open a model folder for inference.

    Args:
        device: a `torch.device`, or a name that `resolve_device` takes.
        dtype: as `load_model` takes it.

    Raises:
        UserError: the folder does not hold such a model, or the device is not available.
    """
    chosen = device if isinstance(device, torch.device) else resolve_device(device)
    model, processor = load_model(folder, dtype)
    model.to(chosen)  # type: ignore[arg-type]  # transformers' decorator of `to` loses `self`
    return OpenModel(model.eval(), processor, Path(folder).resolve().name, folder_fingerprint(folder))
