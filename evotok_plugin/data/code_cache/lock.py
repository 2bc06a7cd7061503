"""Exclusive writing to a code cache."""

import contextlib
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from evotok_plugin.common import run_lock
from evotok_plugin.common.processes import Processes
from evotok_plugin.data.code_cache.shards import CacheFacts
from evotok_plugin.errors import UserError

_FILES = r"(shard-\d+\.(npy|json)|cache\.json)"
_TEMPORARY = re.compile(rf"\.{_FILES}\.part|{_FILES}\.tmp")  # names of `write_whole`, and of earlier versions


@contextlib.contextmanager
def only_run(folder: Path, facts: CacheFacts, processes: Processes) -> Iterator[None]:
    """Prepare the folder and lock it against other runs.

    Raises:
        UserError: another run has locked the folder, it is not a cache, or it contains codes of another tokenizer.
    """
    with run_lock.only_run(folder, processes, partial(_make_ready, folder, facts)):
        yield


def _make_ready(folder: Path, facts: CacheFacts) -> None:
    """Write `cache.json` if the cache is new, and remove unfinished files of a killed run."""
    if (folder / "cache.json").is_file():
        CacheFacts.read(folder).check(folder, facts.fingerprint, facts.image_size)
    elif next(folder.glob("shard-*"), None) is not None:
        raise UserError(
            f"{str(folder)!r} contains shard files but no cache.json that describes them; choose another folder"
        )
    else:
        facts.write(folder)
    for path in folder.iterdir():
        orphan = re.fullmatch(r"shard-\d+\.npy", path.name) and not path.with_suffix(".json").exists()
        if orphan or _TEMPORARY.fullmatch(path.name):
            path.unlink()
