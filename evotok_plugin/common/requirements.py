"""The extras that commands require: `models`, which all but the vision tower for LLaVA needs, and those of programs."""

import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from evotok_plugin.errors import UserError

TRANSFORMERS = (5, 17)
"""The oldest supported version."""

_PYTHON = (3, 11)
_OTHERS = ("yaml", "tqdm", "jinja2")
_PROGRAMS: dict[str, tuple[str, ...]] = {"models": (), "train": ("peft", "accelerate"), "eval": ("scipy",)}
"""By extra, what its programs import when they start, beside the extra `models`."""


@cache
def missing_models() -> "str | None":
    """The first missing requirement of the extra `models`, as part of a sentence; None if all are met."""
    if sys.version_info < _PYTHON:
        return f"Python {_PYTHON[0]}.{_PYTHON[1]} or newer, found {sys.version_info[0]}.{sys.version_info[1]}"
    try:
        found = version("transformers")
    except PackageNotFoundError:
        return "transformers, which is not installed"
    if tuple(map(int, found.split(".")[:2])) < TRANSFORMERS:
        return f"transformers {TRANSFORMERS[0]}.{TRANSFORMERS[1]} or newer, found {found}"
    absent = [name for name in _OTHERS if find_spec(name) is None]
    return f"{absent[0]}, which is not installed" if absent else None


def require_models(what: str) -> None:
    """Check that the extra `models` is installed; see `require_extra`."""
    require_extra("models", what)


def require_extra(extra: str, what: str) -> None:
    """Check that the libraries that the programs of an extra import are installed.

    Args:
        extra: "models", "train" or "eval".
        what: the name or the command that requires it.

    Raises:
        UserError: a library is missing or too old.
    """
    absent = (f"{name}, which is not installed" for name in _PROGRAMS[extra] if find_spec(name) is None)
    if missing := missing_models() or next(absent, None):
        raise UserError(
            f"{what} requires {missing}; pip install 'evotok[{extra}]' in an environment of its own (the base "
            "installation contains only the vision tower for LLaVA)"
        )
