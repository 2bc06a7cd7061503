"""Tasks that cannot run on this machine: an early warning, and runs that leave such tasks out.

lmms-eval loads the data of all tasks before it runs the first one, so a single task without data ends the whole run.
With `EVOTOK_SKIP_UNAVAILABLE=1`, the tasks that cannot run are left out and listed when the program ends. This module
is part of the entry point and imports almost nothing.
"""

import atexit
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evotok_plugin.errors import UserError

logger = logging.getLogger(__name__)

SKIP_VARIABLE = "EVOTOK_SKIP_UNAVAILABLE"
_GROUP, _ALTERNATIVE = "mmbench", "mmbench_en_dev_static"
_LEFT_OUT: dict[str, str] = {}  # reasons by task, for the list at the end


def skips_unavailable(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether tasks that cannot run are left out.

    Raises:
        UserError: the variable is neither 0 nor 1.
    """
    value = environment.get(SKIP_VARIABLE, "") or "0"
    if value not in ("0", "1"):
        raise UserError(f"{SKIP_VARIABLE} must be 0 or 1, got {value!r}")
    return value == "1"


# Before anything is loaded ---------------------------------------------------------------------------------------


def requested_tasks(arguments: Sequence[str]) -> list[str]:
    """The tasks of an lmms-eval command line, `--tasks a,b` or `--tasks=a,b`; empty without the flag."""
    for place, word in enumerate(arguments):
        flag, has_value, value = word.partition("=")
        if flag == "--tasks":
            text = value if has_value else next(iter(arguments[place + 1 :]), "")
            return [name for name in text.split(",") if name]
    return []


def login_warning(tasks: Sequence[str], has_login: bool, has_local_data: bool, skips: bool) -> str:
    """The warning that upstream's `mmbench` needs a login to the hub; empty if that does not matter here."""
    if _GROUP not in tasks or has_login or has_local_data:
        return ""
    others = [name for name in tasks if name != _GROUP]
    end = f"; without one the run ends before {', '.join(others)}" if others else ""
    if skips:
        end = f"; {SKIP_VARIABLE}=1 is set, so what cannot be loaded is left out"
    advice = "" if skips else f", or set {SKIP_VARIABLE}=1 to leave out what cannot be loaded"
    return (
        f"mmbench: upstream's six tasks need a Hugging Face login (`hf auth login`), and none was found{end}. Log in, "
        f"or evaluate {_ALTERNATIVE} (the English dev split, without an online judge) on local data: `hf download "
        "--repo-type dataset lmms-lab-encoder/MMBench --local-dir DATA/lmms-lab-encoder/MMBench` and "
        "EVOTOK_DATA_ROOT=DATA"
        f"{advice}"
    )


def warn_of_login(data_root_variable: str) -> None:
    """Write the warning of `login_warning` for this process's command line; it is the first line of the output."""
    if os.environ.get("RANK", "0") != "0" or _GROUP not in (tasks := requested_tasks(sys.argv[1:])):
        return
    skips = os.environ.get(SKIP_VARIABLE) == "1"  # loading the tasks rejects other values
    text = login_warning(tasks, has_login(), bool(os.environ.get(data_root_variable)), skips)
    if text:
        print(f"WARNING: {text}", file=sys.stderr, flush=True)


def has_login() -> bool:
    """Whether a token for the hub is stored or set."""
    from huggingface_hub import get_token

    return get_token() is not None


def check_login(task: str, dataset_path: Any, dataset_kwargs: Mapping[str, Any] | None) -> None:
    """Check that a data set whose task demands a login can be requested.

    lmms-eval itself retries the same refusal for ten seconds per task.

    Raises:
        UserError: the task demands a login, there is none, and `datasets` has no copy in its cache.
    """
    demands = (dataset_kwargs or {}).get("token") is True and isinstance(dataset_path, str) and "/" in dataset_path
    if not demands or Path(dataset_path).exists() or has_login() or _is_cached(dataset_path):
        return
    raise UserError(
        f"{task}: upstream's task reads {dataset_path} with a Hugging Face login, and none was found. Log in (`hf auth "
        f"login`), or download it elsewhere (`hf download --repo-type dataset {dataset_path} --local-dir "
        f"DATA/{dataset_path}`) and set EVOTOK_DATA_ROOT=DATA"
    )


def _is_cached(dataset_path: str) -> bool:
    import datasets
    from datasets.naming import camelcase_to_snakecase

    root = Path(os.environ.get("LMMS_EVAL_DATASETS_CACHE") or datasets.config.HF_DATASETS_CACHE)
    owner, _, name = dataset_path.partition("/")
    return (root.expanduser() / f"{owner}___{camelcase_to_snakecase(name)}").is_dir()


# Leaving tasks out -----------------------------------------------------------------------------------------------


def load_available(load: Callable[[str], dict], members: Callable[[str], Sequence[str]], names: Sequence[str]) -> dict:
    """Load the tasks that can run; of a group with a task that cannot, the other members.

    Args:
        load: loads a task or group; any error means that it cannot run.
        members: the tasks and groups within a group; empty for a task.

    Raises:
        UserError: none of the tasks can run.
    """
    left_out: dict[str, str] = {}
    loaded: dict = {}
    for name in names:
        loaded |= _load_one(load, members, name, left_out)
    _LEFT_OUT.update(left_out)
    if left_out:
        atexit.unregister(_list_left_out)
        atexit.register(_list_left_out)
    if not loaded:
        raise UserError(f"none of the tasks can run: {_as_text(left_out)}")
    return loaded


def _load_one(
    load: Callable[[str], dict], members: Callable[[str], Sequence[str]], name: str, left_out: dict[str, str]
) -> dict:
    try:
        return load(name)
    except Exception as error:  # whatever a task's own code raises
        inner = members(name)
        if not inner:
            left_out[name] = " ".join(str(error).split()).removeprefix(f"{name}: ") or type(error).__name__
            logger.warning("left out: %s: %s", name, left_out[name])
            return {}
    return {key: task for member in inner for key, task in _load_one(load, members, member, left_out).items()}


def _as_text(left_out: Mapping[str, str]) -> str:
    return "; ".join(f"{name} ({reason})" for name, reason in left_out.items())


def _list_left_out() -> None:
    """Repeat at the end of the output, below the table of results, which tasks are not in it."""
    if os.environ.get("RANK", "0") == "0":
        for name, reason in _LEFT_OUT.items():
            print(f"NOT MEASURED {name}: {reason}", file=sys.stderr)
