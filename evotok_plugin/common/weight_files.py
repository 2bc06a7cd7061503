"""Files of model folders: config.json, the files with the weights, their content, and diagnosis of damaged ones."""

import functools
import hashlib
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from evotok_plugin.common import foreign_files
from evotok_plugin.common.digests import sha256_of_file
from evotok_plugin.common.foreign_files import describe_error, open_regular
from evotok_plugin.errors import UserError

CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_LFS = b"version https://git-lfs.github.com/spec/"
_PAGES = (b"<!doctype", b"<html", b"<?xml")
# The files, in addition to the weights, that text and images of a model depend on.
_RELEVANT = (
    "config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def damage_of(file: Path) -> str | None:
    """Diagnose a damaged file: the end of a sentence that begins with its path, or None.

    Only the first bytes are read; of a safetensors file, the header and the length are checked.
    """
    try:
        with open_regular(file) as opened:
            head = opened.read(512)
    except OSError as error:
        return f"cannot be read: {error.strerror}; download or copy it again"
    if not head:
        return "is empty; download or copy it again"
    if head.startswith(_LFS):
        return "is a Git LFS pointer, not the file itself; run `git lfs pull` in the repository that it came from"
    if head.lstrip().lower().startswith(_PAGES):
        return "is a web page, not the file itself; download it again, with a login where the model asks for one"
    if file.suffix != ".safetensors":
        return None
    if not any(head):
        return "begins with zeros, so its download or copy was interrupted; get it again"
    if head.startswith((b"PK\x03\x04", b"\x80\x02")):
        return "is a pickled file under the name of a safetensors file; convert it, or rename it to pytorch_model.bin"
    try:
        with safe_open(file, "pt"):
            return None
    except (OSError, SafetensorError, ValueError) as error:
        return f"is cut off or damaged ({describe_error(error)}); download or copy it again"


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: the file cannot be read, or is not a JSON object.
    """
    if cause := damage_of(file):
        raise UserError(f"{file} {cause}")
    return foreign_files.read_json(file)


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


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files that a model folder is loaded from: one file, or those that its index names.

    Raises:
        UserError: the folder has no weights, or some of the files that its index names are missing.
    """
    folder = Path(folder)
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if not (folder / INDEX).exists():
        shards = sorted(folder.glob("model-*.safetensors"))
        missing = f"{INDEX} is missing for its {len(shards)} shards" if shards else f"no {SINGLE}"
        raise UserError(f"{str(folder)!r} holds no weights ({missing}); download or copy the folder again")
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{folder / INDEX}: expected a weight_map of file names; download or copy it again")
    files = sorted(set(names.values()))
    if outside := [name for name in files if Path(name).name != name]:
        raise UserError(f"{folder / INDEX} names {outside[0]!r}, expected a file of the folder")
    if absent := [name for name in files if not (folder / name).is_file()]:
        raise UserError(
            f"{folder / absent[0]} does not exist, but {INDEX} names it ({len(absent)} of {len(files)} files are "
            "missing); download or copy the folder again"
        )
    return [folder / name for name in files]


def named_weights(folder: str | Path) -> Iterator[tuple[str, Any, Callable[[], Tensor]]]:
    """Yield name, slice and loader of every weight; values are read only when the loader is called.

    Raises:
        UserError: a file is missing or damaged.
    """
    for path in weight_files(folder):
        if cause := damage_of(path):
            raise UserError(f"{path} {cause}")
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is not a mapping
                    yield name, file.get_slice(name), functools.partial(file.get_tensor, name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read: {describe_error(error)}") from error


def folder_fingerprint(folder: str | Path, without: Collection[str] = ()) -> str:
    """sha256 of all files that the text and images of a model depend on: weights, configuration, tokenizer, templates.

    Args:
        without: names of files to leave out.

    Raises:
        UserError: the folder has no weights, or a file cannot be read.
    """
    folder, names = Path(folder), [name for name in _RELEVANT if name not in without]
    files = sorted([*weight_files(folder), *(path for name in names if (path := folder / name).is_file())])
    try:
        with ThreadPoolExecutor() as pool:  # hashing releases the GIL
            digests = list(pool.map(sha256_of_file, files))
    except OSError as error:
        raise UserError(f"{str(folder)!r} cannot be read: {describe_error(error)}") from error
    lines = "\n".join(f"{path.name} {digest}" for path, digest in zip(files, digests, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()
