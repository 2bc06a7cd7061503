"""Checks of `--model_args` and `--gen_kwargs`: a value that has no effect is an error that names the known options."""

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from eval_tasks.registration import GivenKwargs
from evotok_plugin.errors import UserError
from llava_ext.generation.selection_options import MOST_CANDIDATES

# Type, minimum and maximum of each number; options for drawing may be lists with one value per level.
_NUMBERS: dict[str, tuple[type, float, float]] = {
    "max_new_tokens": (int, 1, float("inf")),
    "num_beams": (int, 1, float("inf")),
    "num_images": (int, 1, float("inf")),
    "max_images": (int, 0, float("inf")),
    "best_of": (int, 1, MOST_CANDIDATES),
    "seed": (int, float("-inf"), float("inf")),
    "guidance_scale": (float, 1, float("inf")),
    "guidance_interval": (float, 0, 1),
    "guidance_rescale": (float, 0, 1),
    "temperature": (float, 0, float("inf")),
    "top_k": (int, 0, float("inf")),
    "top_p": (float, 0, 1),
    "min_p": (float, 0, 1),
    "repetition_penalty": (float, 1e-6, float("inf")),
}
_LISTS = ("guidance_scale", "guidance_interval", "temperature", "top_k", "top_p", "min_p")  # of numbers
_SAMPLING = ("temperature", "top_k", "top_p")
MODALITIES = ("text", "image", "edit", "document", "reconstruction")


def split_lists(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert texts such as "0:0.5" to lists of numbers: lmms-eval separates options, not values, by commas.

    Only options for drawing are converted; a text that is not of this form is left for `check_values`.
    """
    return {name: _numbers(value) if name in _LISTS else value for name, value in values.items()}


def _numbers(value: Any) -> Any:
    if not isinstance(value, str) or ":" not in value:
        return value
    try:
        numbers = [float(part) for part in value.split(":")]
    except ValueError:
        return value
    return [int(number) if number.is_integer() else number for number in numbers]


def check_values(values: Mapping[str, Any], where: str) -> None:
    """Check the type and range of the values with known names, as parsed by lmms-eval; None means not set.

    Args:
        where: for the error: the option or task that the values come from.

    Raises:
        UserError: a value of the wrong type or out of range.
    """
    for name, value in values.items():
        if value is None:
            continue
        if name in _NUMBERS:
            for one in value if isinstance(value, (list, tuple)) else (value,):
                _check_number(name, one, where)
        elif name == "do_sample" and not isinstance(value, bool):
            raise UserError(f"{where}: do_sample must be true or false, got {value!r}")
        elif name == "modality" and value not in MODALITIES:
            raise UserError(f"{where}: modality must be {', '.join(MODALITIES)}, got {value!r}")
        elif name == "until" and not isinstance(value, str) and not _is_texts(value):
            raise UserError(f"{where}: until must be a text or a list of texts, got {value!r}")


def _check_number(name: str, value: Any, where: str) -> None:
    kind, least, most = _NUMBERS[name]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or (kind is int and value != int(value)):
        noun = "a whole number" if kind is int else "a number"
        raise UserError(f"{where}: {name} must be {noun}, got {value!r}")
    if not least <= value <= most:
        limits = f"at least {least:g}" if most == float("inf") else f"from {least:g} to {most:g}"
        raise UserError(f"{where}: {name} must be {limits}, got {value!r}")


def _is_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value)


def check_given(tasks: Mapping[str, GivenKwargs], known: Mapping[str, Collection[str]]) -> None:
    """Check that every key of `--gen_kwargs` has an effect on at least one task of the run.

    Args:
        tasks: the keys of `--gen_kwargs`, by task.
        known: names of options by modality.

    Raises:
        UserError: a key without effect.
    """
    given = {name for task in tasks.values() for name in task.given}
    used = {name for task in tasks.values() for name in _used(task, known)}
    for name in sorted(given - used):
        everything = sorted({key for keys in known.values() for key in keys})
        if name in _SAMPLING and any(name in known[task.modality] for task in tasks.values()):
            raise UserError(
                f"--gen_kwargs: {name} has no effect because these tasks answer without sampling; add do_sample=true "
                f"and a temperature above 0, or leave {name} out"
            )
        near = difflib.get_close_matches(name, everything, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}? " if near and near[0] != name else ""
        lists = "; ".join(f"for {kind}: {', '.join(sorted(keys))}" for kind, keys in known.items() if keys)
        raise UserError(f"--gen_kwargs: {name} has no effect on {', '.join(sorted(tasks))}; {hint}options {lists}")


def _used(task: GivenKwargs, known: Mapping[str, Collection[str]]) -> set[str]:
    names = {*known.get(task.modality, ()), "modality"}
    return names if task.modality != "text" or task.samples else names - set(_SAMPLING)


def parse_batch_size(batch_size: int | str, max_batch_size: int | str | None, automatic: int) -> int:
    """Parse `--batch_size` and `--max_batch_size`.

    Args:
        automatic: the batch size for "auto" and "auto:N" (N, the number of attempts of other models, is ignored).

    Raises:
        UserError: an invalid batch size, or a `max_batch_size` without effect.
    """
    is_auto = str(batch_size) == "auto" or (str(batch_size).startswith("auto:") and str(batch_size)[5:].isdigit())
    if max_batch_size is not None and not is_auto:
        raise UserError(f"max_batch_size has no effect with batch_size {batch_size}; leave one out, or pass auto")
    value = (max_batch_size or automatic) if is_auto else batch_size
    if not str(value).isdigit() or int(value) < 1:
        name = "max_batch_size" if is_auto else "batch_size"
        raise UserError(f"{name} must be a number of at least 1{'' if is_auto else ' or auto'}, got {value!r}")
    return int(value)


def parse_model_args(text: str, others: Mapping[str, Any]) -> dict[str, Any]:
    """Parse `key=value,key=value` as lmms-eval does, and merge it with the options that have their own flags.

    Raises:
        UserError: a key without a value, or an option that is given twice.
    """
    from lmms_eval.utils import simple_parse_args_string

    try:
        given = simple_parse_args_string(text)
    except ValueError as error:
        raise UserError(f"--model_args must be KEY=VALUE,KEY=VALUE, got {text!r}") from error
    flags = {key: value for key, value in others.items() if value is not None}
    # lmms-eval always passes its default batch size; one in --model_args takes precedence.
    if "batch_size" in given and flags.get("batch_size") in (1, "1"):
        del flags["batch_size"]
    if twice := sorted(set(given) & set(flags)):
        raise UserError(f"{twice[0]} is given twice, in --model_args and as --{twice[0]}; leave one out")
    return given | flags
