"""Open a causal LM as a text backbone: a folder (also sharded or quantized), a hub id, or a GGUF file."""

import logging
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from evotok_plugin.common.foreign_files import describe_error, reading
from evotok_plugin.common.weight_checks import HARMLESS, check_report, check_values
from evotok_plugin.common.weight_files import CONFIG, read_config
from evotok_plugin.errors import UserError
from evotok_plugin.model_folder import load_whole, open_config, open_tokenizer_folder
from llava_ext.attention_support import supported_attention

logger = logging.getLogger("llava_ext")

GGUF = ".gguf"
_QUANTIZATION = "quantization_config"  # in the config.json of quantized weights


@dataclass(frozen=True)
class Backbone:
    """A causal LM with full-precision weights, unless it was quantized on request, and its tokenizer."""

    model: Any
    tokenizer: Any


def is_gguf(source: str | Path) -> bool:
    """Whether a causal LM is given as a GGUF file."""
    return Path(source).suffix.lower() == GGUF


def open_backbone(
    source: str | Path,
    dtype: torch.dtype | str = torch.float32,
    attn_implementation: str = "sdpa",
    quantization_config: object | None = None,
) -> Backbone:
    """Open a causal LM and its tokenizer; every weight must be present and fit.

    Weights of a GGUF file and of a folder with a `quantization_config` are dequantized, so that they can be trained and
    saved. They keep the rounding of the quantized weights.

    Args:
        source: a folder, a hub id, or a GGUF file of an architecture that transformers reads.
        dtype: of the weights, or "auto".
        attn_implementation: "sdpa" becomes "eager" for a backbone without SDPA.
        quantization_config: a quantization config of transformers, to quantize the backbone while it loads.

    Raises:
        UserError: incomplete or damaged files, quantized weights that cannot be read on this machine, or quantized
            weights that are to be quantized again.
    """
    config = open_backbone_config(source)
    stored = getattr(config, _QUANTIZATION, None)
    if quantization_config is not None and (is_gguf(source) or stored is not None):
        raise UserError(
            f"{str(source)!r} holds quantized weights, which cannot be quantized again; leave out --bits 4, or start "
            "from a folder with full-precision weights"
        )
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": supported_attention(config, attn_implementation)}
    if is_gguf(source):
        return _read_gguf(Path(source), options)
    tokenizer = open_tokenizer_folder(source, "the text tokenizer")
    if stored is not None:
        return Backbone(_dequantized(source, stored, options), tokenizer)
    model = load_whole(AutoModelForCausalLM, source, quantization_config=quantization_config, **options)
    return Backbone(model, tokenizer)


def open_backbone_config(source: str | Path) -> PreTrainedConfig:
    """Read the configuration of a causal LM in a folder, of a hub id or in a GGUF file.

    Raises:
        UserError: it cannot be read, or the source is not one of these.
    """
    path = Path(source)
    check_source(source)
    if not is_gguf(source):
        if path.is_dir():
            read_config(source)
        return open_config(AutoConfig, source)
    _require_gguf()
    with reading(source, "pass the whole file of a causal LM of an architecture that transformers reads"):
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    assert isinstance(config, PreTrainedConfig)
    return config


def check_source(source: str | Path) -> None:
    """Check that a path is not a file of another kind, a missing GGUF file, or a folder with nothing but GGUF files.

    Raises:
        UserError: it is.
    """
    path = Path(source)
    if is_gguf(source) and not path.is_file():
        raise UserError(f"GGUF file {str(source)!r} does not exist; pass the path of the file, not of a folder")
    if not is_gguf(source) and path.exists() and not path.is_dir():
        raise UserError(
            f"text model {str(source)!r} is a file; pass the folder of a causal LM, a hub id or a GGUF file"
        )
    if path.is_dir() and not (path / CONFIG).is_file() and (files := sorted(path.glob(f"*{GGUF}"))):
        raise UserError(f"{str(source)!r} has no {CONFIG}; pass a GGUF file itself: {files[0]}")


def _require_gguf() -> None:
    if find_spec("gguf") is None:
        raise UserError("reading a GGUF file needs the package gguf: pip install 'evotok[gguf]'")


def _read_gguf(file: Path, options: dict[str, Any]) -> Backbone:
    """Read a GGUF file with transformers, which dequantizes it, and move its weights into a plain model."""
    with reading(file, "pass the whole file of a causal LM of an architecture that transformers reads"):
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        gguf_config = getattr(transformers, "GgufConfig", None)  # of newer versions, which could keep packed weights
        if gguf_config is not None:
            options = options | {_QUANTIZATION: gguf_config(dequantize=True)}
        read: Any = AutoModelForCausalLM.from_pretrained
        model, report = read(
            file.parent, gguf_file=file.name, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    what = repr(str(file))
    check_report(report, what, HARMLESS, remedy="download or copy the file again")
    check_values(model.state_dict(), what)
    tokenizer.init_kwargs.pop("gguf_file", None)
    tokenizer.name_or_path = ""
    return Backbone(_plain(model), tokenizer)


def _dequantized(folder: str | Path, stored: Any, options: dict[str, Any]) -> PreTrainedModel:
    """Load quantized weights and dequantize them."""
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    method = str(getattr(method, "value", method))
    try:
        model = load_whole(AutoModelForCausalLM, folder, **options).dequantize()
    except (UserError, ValueError, RuntimeError, ImportError, NotImplementedError) as error:
        raise UserError(
            f"the weights in {str(folder)!r} are quantized with {method}, which cannot be dequantized here: "
            f"{describe_error(error)}; install the package of the method, use a GPU if it needs one, or pass a folder "
            "with full-precision weights"
        ) from error
    model.to(model.dtype if options["dtype"] == "auto" else options["dtype"])
    logger.info("  %s: weights dequantized (%s)", folder, method)
    return _plain(model)


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class with the same tensors and without a quantizer, which transformers refuses to save."""
    config = model.config
    if hasattr(config, _QUANTIZATION):
        delattr(config, _QUANTIZATION)
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), strict=True, assign=True)
    for name, buffer in model.named_buffers():  # those that are computed from the configuration are not in a state dict
        owner, _, leaf = name.rpartition(".")
        plain.get_submodule(owner)._buffers[leaf] = buffer
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain.requires_grad_(True).eval()
