"""The model and settings behind drawn images, for the head of contact sheets: from lmms-eval and from the images."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llava_ext.model_folder import default_model_folder
from llava_ext.serving.image_files import read_png_text

VARIOUS, _SHORT = "various", 16  # characters of a fingerprint
_OURS = ("evotok", "hf")  # lmms-eval's default name stands for this project's model
# lmms-eval's arguments that decide what is drawn, with the label of their row.
_ARGUMENTS = {"model": "model", "model_args": "model arguments", "gen_kwargs": "--gen_kwargs", "limit": "limit"}


def of_command_line(args: Any) -> dict[str, str]:
    """Rows for the model and the options of an lmms-eval run, from its parsed command line; None gives no rows."""
    given = {label: getattr(args, name, None) for name, label in _ARGUMENTS.items()}
    if given["model"] in _OURS and "pretrained=" not in str(given["model arguments"]):
        given |= {"model": "evotok", "model folder": default_model_folder()}
    return {label: str(value) for label, value in given.items() if value not in (None, "", {})}


def of_images(paths: Iterable[Path]) -> dict[str, str]:
    """Rows for the settings and weights that PNG files record; empty for images of models that record nothing.

    A setting that differs between the images is `VARIOUS`.
    """
    rows: dict[str, str] = {}
    for number, path in enumerate(paths):
        own = _rows_of(read_png_text(path) or {})
        for label in dict.fromkeys([*rows, *own]):
            same = number == 0 or rows.get(label) == own.get(label)
            rows[label] = own.get(label, VARIOUS) if same else VARIOUS
    return rows


def _rows_of(chunks: Mapping[str, str]) -> dict[str, str]:
    try:
        settings = json.loads(chunks.get("settings", "{}"))
    except ValueError:
        settings = {}
    rows = {name: _as_text(value) for name, value in settings.items()} if isinstance(settings, dict) else {}
    weights = chunks.get("weights") or chunks.get("model")
    return {**rows, **({"weights": weights[:_SHORT]} if weights else {})}


def _as_text(value: Any) -> str:
    if isinstance(value, list) and value and all(one == value[0] for one in value):
        value = value[0]  # the same for every level
    return "none" if value in (None, "") else str(value)
