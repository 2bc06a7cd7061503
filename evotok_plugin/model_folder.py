"""Strict loading of model folders: every weight must be present, have the right shape and be finite.

All packages read configurations, models, tokenizers and processors through this module. Every exception of
transformers, tokenizers or safetensors becomes one UserError that names the file, the cause and the remedy.
"""

import logging
import math
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from evotok_plugin.common.foreign_files import describe_error, reading
from evotok_plugin.common.weight_files import damage_of, named_weights, read_json, weight_files
from evotok_plugin.errors import UserError

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=PreTrainedModel)
Config = TypeVar("Config", bound=PreTrainedConfig)

CONFIG = "config.json"
# Unexpected weights that can be ignored: buffers that are computed from the configuration.
_HARMLESS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
_CHECKED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_SHOWN = 3
_LAYERS = re.compile(r"^(\w+_)?num_(\w+_)?(layers|blocks)$|^n_layers?$|^(encoder|decoder)_layers$")
_FEWEST_LAYERS = 64  # parts of a configuration that are not used may have numbers up to here
_MOST_GROWTH, _MOST_EXTRA = 4, 1 << 26  # numbers that a model has beyond its weights: tied ones, tables of positions
_MOST_ZERO = 0.25  # share of the weight matrices
GENERATION_CONFIG = "generation_config.json"
# Files of processors and tokenizers that are checked for damage.
_OBJECTS = (
    "processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json",
)  # fmt: skip
_TEXTS = ("chat_template.jinja", "chat_template.json", "merges.txt", "tokenizer.model", "spiece.model", "vocab.txt")


# Configuration -------------------------------------------------------------------------------------------------


def is_model_folder(folder: str | Path) -> bool:
    """Whether this is a folder with a config.json, which may be damaged."""
    return (Path(folder) / CONFIG).is_file()


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read a folder's config.json.

    Raises:
        UserError: the folder or its config.json does not exist, or the file does not hold a JSON object.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"model folder {str(folder)!r} does not exist")
    if not is_model_folder(folder):
        raise UserError(f"{str(folder)!r} is not a model folder: it holds no {CONFIG}")
    return read_json(folder / CONFIG)


def model_type_of(folder: str | Path) -> str:
    """Return the `model_type` of a model folder, or an empty string if its config.json does not name one.

    Raises:
        UserError: the folder does not exist or has no readable config.json.
    """
    kind = read_config(folder).get("model_type", "")
    if not isinstance(kind, str):
        raise UserError(f"{Path(folder) / CONFIG}: expected a name as model_type, got {kind!r}")
    return kind


@overload
def open_config(config_class: type[Config], folder: str | Path, **options: Any) -> Config: ...
@overload
def open_config(config_class: type[AutoConfig], folder: str | Path, **options: Any) -> PreTrainedConfig: ...
def open_config(config_class: Any, folder: str | Path, **options: Any) -> Any:
    """Read the configuration of a folder or hub repository with `config_class`, which may be `AutoConfig`.

    Raises:
        UserError: the configuration is missing or holds values that the class rejects.
    """
    if Path(folder).is_dir():
        read_config(folder)
    where = Path(folder) / CONFIG if Path(folder).is_dir() else repr(str(folder))
    with reading(str(where)):
        return config_class.from_pretrained(folder, **options)


# Weights -------------------------------------------------------------------------------------------------------


@overload
def load_whole(
    model_class: type[Model],
    folder: str | Path,
    *,
    unused: Collection[str] = ...,
    not_needed: Collection[str] = ...,
    **options: Any,
) -> Model: ...
@overload
def load_whole(
    model_class: Any,
    folder: str | Path,
    *,
    unused: Collection[str] = ...,
    not_needed: Collection[str] = ...,
    **options: Any,
) -> Any: ...
def load_whole(
    model_class: Any,
    folder: str | Path,
    *,
    unused: Collection[str] = (),
    not_needed: Collection[str] = (),
    **options: Any,
) -> Any:
    """Load a model with `model_class.from_pretrained`; every weight must be present and fit.

    Tied weights, and weights that the model class itself declares ignorable, are not reported by transformers.

    Args:
        model_class: a model class, or an auto class of transformers.
        folder: a folder, or a hub repository.
        unused: patterns of weights that the folder may hold in addition to the model's own.
        not_needed: patterns of model weights that the folder may lack because they are never used.
        options: passed to `from_pretrained`.

    Raises:
        UserError: damaged files, or weights that are missing, unexpected, of another shape or not finite.
    """
    local = Path(folder).is_dir()
    what = f"{str(folder)!r}"
    if local:
        open_config(getattr(model_class, "config_class", None) or AutoConfig, folder)
        if (Path(folder) / GENERATION_CONFIG).is_file():
            read_json(Path(folder) / GENERATION_CONFIG)  # transformers would ignore a damaged one
        _check_files(Path(folder), pickles=not options.get("use_safetensors"))
    if local:
        _check_size(model_class, Path(folder), options.get("quantization_config"))
    with reading(what, "download, copy or save the folder again"):
        model, report = model_class.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    _check_report(report, what, (*unused, *_HARMLESS), not_needed)
    if local:
        _check_types(model, Path(folder), options.get("quantization_config"))
    check_values(model.state_dict(), what)
    return model


def load_strictly(
    module: nn.Module, weights: dict[str, Tensor], what: str, remedy: str = "download, copy or save the folder again"
) -> None:
    """Load a state dict into a module; every weight must be present, fit and be finite.

    Args:
        what: origin of the weights, for the error message.
        remedy: what the user can do, for the error message.

    Raises:
        UserError: weights that are missing, unexpected, of another shape or not finite.
    """
    expected = module.state_dict()
    _check_report(
        {
            "missing_keys": set(expected) - set(weights),
            "unexpected_keys": set(weights) - set(expected),
            "mismatched_keys": [
                (name, tuple(weights[name].shape), tuple(expected[name].shape))
                for name in expected
                if name in weights and weights[name].shape != expected[name].shape
            ],
        },
        what,
        remedy=remedy,
    )
    check_values(weights, what)
    module.load_state_dict(weights)


def _check_report(
    report: dict[str, Any],
    what: str,
    unused: Collection[str] = (),
    not_needed: Collection[str] = (),
    remedy: str = "download, copy or save the folder again",
) -> None:
    def odd(keys: Collection[str], harmless: Collection[str]) -> list[str]:
        return sorted(key for key in map(str, keys) if not any(re.search(pattern, key) for pattern in harmless))

    shapes = sorted(
        f"{name} {tuple(found)} instead of {tuple(expected)}"
        for name, found, expected in report.get("mismatched_keys", ())
    )
    problems = {
        "missing": odd(report.get("missing_keys", ()), not_needed),
        "unexpected": odd(report.get("unexpected_keys", ()), unused),
        "of another shape": shapes,
    }
    found = [f"{len(names)} {kind} ({_some(names)})" for kind, names in problems.items() if names]
    if found or report.get("error_msgs"):
        detail = "; ".join(found) or describe_error(str(report["error_msgs"]))
        raise UserError(f"{what} does not match this model: weights {detail}; {remedy}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _check_files(folder: Path, pickles: bool) -> None:
    """Check the weight files before transformers opens them, so that the error names the cause of the damage."""
    try:
        files = weight_files(folder)
    except UserError:
        pickled = [*folder.glob("pytorch_model*.bin")]
        if not pickles or not pickled:
            raise
        files = pickled
    for file in files:
        if cause := damage_of(file):
            raise UserError(f"{file} {cause}")


def _check_size(model_class: Any, folder: Path, quantization: Any) -> None:
    """Reject a configuration that describes a far larger model than the weights, before the model is allocated.

    transformers initializes weights that are missing or of another shape, so that a damaged number in config.json could
    take all the memory of the machine.
    """
    if quantization is not None or not list(folder.glob("model*.safetensors")):
        return
    stored = [part.get_shape() for _, part, _ in named_weights(folder)]
    config = open_config(getattr(model_class, "config_class", None) or AutoConfig, folder)
    if getattr(config, "quantization_config", None) is not None:
        return
    for name, value in _numbers_in(config.to_dict()):
        if _LAYERS.search(name) and value > max(len(stored), _FEWEST_LAYERS):
            raise UserError(
                f"{folder / CONFIG}: {name} is {value}, but the folder has only {len(stored)} weights; restore the file"
            )
    mapping = getattr(model_class, "_model_mapping", None)  # of an auto class, whose `from_config` would partition
    made_class = model_class if mapping is None else mapping.get(type(config), None)
    if is_deepspeed_zero3_enabled():  # parts of the model would be partitioned, which is impossible without values
        return
    if not isinstance(made_class, type):  # loading the model reports the cause, or chooses among several classes
        return
    with reading(folder / CONFIG, "restore the file"), torch.device("meta"):
        model = made_class(config)
    described = sum(value.numel() for value in (*model.parameters(), *model.buffers()))
    found = sum(math.prod(shape) for shape in stored)
    if described > _MOST_GROWTH * found + _MOST_EXTRA:
        raise UserError(
            f"{folder / CONFIG} describes a model of {described:,} numbers, but the weights have {found:,}; restore "
            "it, or download or copy the folder again"
        )


def _numbers_in(values: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """The whole numbers in nested settings, by their own names."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _numbers_in(value)
        elif type(value) is int:
            yield str(name), value


def _check_types(model: nn.Module, folder: Path, quantization: Any) -> None:
    """Reject integers stored under the name of a weight, which transformers would convert to floating point."""
    if quantization is not None or getattr(model.config, "quantization_config", None) is not None:
        return
    if not list(folder.glob("model*.safetensors")):
        return
    weights = model.state_dict()
    wrong = [
        f"{name} {kind}"
        for name, kind in ((name, part.get_dtype()) for name, part, _ in named_weights(folder))
        if name in weights and weights[name].is_floating_point() and kind[0] in "IUB" and kind[:2] != "BF"
    ]
    if wrong:
        raise UserError(
            f"{str(folder)!r} holds integers where floating-point weights are expected ({_some(wrong)}), and its "
            f"{CONFIG} does not name a quantization; download or save the folder again"
        )


@torch.no_grad()
def check_values(weights: dict[str, Tensor], what: str) -> None:
    """Reject NaN and infinite weights and models with many all-zero matrices; warn about a few all-zero matrices.

    A few matrices of zeros may be intended (new blocks that start as the identity). Many are the sign of a file that
    was allocated but not filled, as after an interrupted download.

    Raises:
        UserError: values that are not finite, or too many matrices of zeros.
    """
    matrices, zero = 0, list[str]()
    for name, value in weights.items():
        if not isinstance(value, Tensor) or value.is_meta or not value.numel() or value.dtype not in _CHECKED:
            continue
        least, most = torch.stack(torch.aminmax(value)).tolist()
        if not abs(least) < float("inf") or not abs(most) < float("inf"):
            raise UserError(f"{what}: {name} holds values that are NaN or infinite; train or download it again")
        if value.ndim >= 2 and name.endswith("weight"):
            matrices += 1
            zero += [name] if least == most == 0 else []
    if len(zero) > _MOST_ZERO * matrices:
        raise UserError(
            f"{what}: {len(zero)} of {matrices} weight matrices are zero ({_some(zero)}); a download or copy was "
            "probably interrupted, download or copy the folder again"
        )
    if zero:
        logger.warning(
            "%s: %d weight matrices are all zero (%s); was a download interrupted?", what, len(zero), _some(zero)
        )


# Processors ----------------------------------------------------------------------------------------------------


def open_tokenizer_folder(folder: str | Path, what: str = "text tokenizer") -> Any:
    """Open the text tokenizer of a folder or hub repository.

    Args:
        what: name of the tokenizer, for the error message.

    Raises:
        UserError: files are missing or damaged.
    """
    vocabularies = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    return open_processor(
        AutoTokenizer, folder, what, [("tokenizer_config.json",), vocabularies], "copy the folder that it was saved in"
    )


def open_processor(
    processor_class: Any,
    folder: str | Path,
    what: str,
    files: Sequence[Sequence[str]] = (),
    remedy: str = "copy it from the folder that the model was trained or saved in",
    **options: Any,
) -> Any:
    """Open a processor of a folder or hub repository with `processor_class.from_pretrained`.

    Args:
        what: name of the processor, for the error message.
        files: groups of file names; of every group at least one file must be in the folder.
        remedy: what the user can do about a missing file, for the error message.

    Raises:
        UserError: files are missing or damaged.
    """
    folder = Path(folder) if Path(folder).is_dir() else folder
    if isinstance(folder, Path):
        for group in files:
            if not any((folder / name).is_file() for name in group):
                raise UserError(f"{what} in {str(folder)!r} is incomplete: {' or '.join(group)} is missing; {remedy}")
        for file in (folder / name for name in _OBJECTS if (folder / name).is_file()):
            read_json(file)
        for file in (folder / name for name in _TEXTS if (folder / name).is_file()):
            if cause := damage_of(file):
                raise UserError(f"{file} {cause}")
    with reading(f"{what} in {str(folder)!r}", remedy):
        return processor_class.from_pretrained(folder, **options)
