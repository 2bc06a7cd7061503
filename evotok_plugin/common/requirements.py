"""The libraries of the extra `models`, which everything but the vision tower for LLaVA requires."""

import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from evotok_plugin.errors import UserError

TRANSFORMERS = (5, 17)
"""The oldest supported version."""

_PYTHON = (3, 11)
_OTHERS = ("yaml", "tqdm", "jinja2")
_ADVICE = "pip install 'evotok[models]'"


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
    """Check that the extra `models` is installed.

    Args:
        what: the name or the command that requires it.

    Raises:
        UserError: a library is missing or too old.
    """
    if missing := missing_models():
        raise UserError(
            f"{what} requires {missing}; {_ADVICE} in an environment of its own (the base installation contains only "
            "the vision tower for LLaVA)"
        )
