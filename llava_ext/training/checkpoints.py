"""Checkpoints of a stage: a marker file is written last, and only marked, complete checkpoints are resumed.

Checkpoints are the only files that are unpickled, by transformers and DeepSpeed, and only as tensors, plain values and
a few named classes (`unpickling.py`), so that no code in them runs. Models and adapters, which are shared with others,
are safetensors.
"""

import contextlib
import logging
import os
import shutil
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from evotok_plugin.common.digests import sha256_of_file
from evotok_plugin.common.files import flush, write_json, write_whole, writing
from evotok_plugin.common.foreign_files import readable_json
from evotok_plugin.common.owned_folder import OwnedFolder, delete_files, files_of
from evotok_plugin.common.processes import Processes
from evotok_plugin.common.weight_files import read_json
from evotok_plugin.errors import UserError
from llava_ext.new_tokens import ROWS_FILE

logger = logging.getLogger("llava_ext")

MARKER = "COMPLETE.json"
FINISHED = "finished.json"
STATE = "trainer_state.json"
_SMALL = 1 << 20  # bytes of a file whose sha256 is compared at every start
_MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model")

REPORTS = ("bad_samples.jsonl", "too_long_samples.jsonl")  # written while the data is validated
PENDING_REPORTS = tuple(name.replace(".jsonl", ".new.jsonl") for name in REPORTS)  # while a folder holds another run
_RUN_FILES = (
    "recipe.yaml",
    "metrics.jsonl",
    FINISHED,
    *REPORTS,
    *PENDING_REPORTS,
    "tensorboard/**/events.out.tfevents.*",
    "samples/step_*.png",
)
_MODEL_FILES = (
    "model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json",
    "processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
)  # fmt: skip
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json", "base.json")
_STATE_FILES = (
    MARKER, f".{MARKER}.part", "COMPLETE.tmp", STATE, ROWS_FILE, "*.pt", "*.pth", "*.bin", "latest", "zero_to_fp32.py",
    "global_step*/**/*",
)  # fmt: skip
_NOT_MODEL = (MARKER, STATE, ROWS_FILE)
_CHECKPOINT_FILES = (*_MODEL_FILES, *_ADAPTER_FILES, *_STATE_FILES)


@dataclass(frozen=True)
class RunShape:
    """Properties of a run that must be the same when a checkpoint is resumed.

    Attributes:
        world_size: number of processes, each with its own part of the optimizer state.
        zero_stage: ZeRO stage of DeepSpeed, 0 without it.
        method: training method of the backbone: full, lora or qlora.
    """

    world_size: int
    zero_stage: int = 0
    method: str = "full"

    def check(self, saved: dict, folder: Path) -> None:
        """Compare with the marker of a checkpoint.

        Args:
            saved: content of the marker.
            folder: the checkpoint, for the error.

        Raises:
            UserError: the checkpoint was written by a run of another shape.
        """
        if saved["world_size"] != self.world_size:
            raise UserError(
                f"{folder} was written by {saved['world_size']} processes and cannot be resumed by {self.world_size}, "
                "because each holds its own part of the optimizer; "
                f"start with NPROC={saved['world_size']}, or pass --overwrite true to start over"
            )
        for name, wanted in (("zero_stage", self.zero_stage), ("method", self.method)):
            if saved.get(name, wanted) != wanted:
                raise UserError(
                    f"{folder} was written with {name} {saved[name]} and cannot be resumed with {wanted}; "
                    "keep the settings of the run, choose another --output_dir, or pass --overwrite true to start over"
                )


def checkpoint_folder(output_dir: str | Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return Path(output_dir) / f"checkpoint-{step}"


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints of a run, oldest first, complete or not; those of other programs are left out."""
    owned = owned_folder(output_dir)
    found = [path for path in _numbered(output_dir) if entries_of(owned, path)]
    return sorted(found, key=lambda path: int(path.name.split("-")[-1]))


def _numbered(output_dir: str | Path) -> list[Path]:
    found = Path(output_dir).glob("checkpoint-*")
    return [path for path in found if path.name.removeprefix("checkpoint-").isdigit()]


# Files of the run --------------------------------------------------------------------------------------------


def owned_folder(output_dir: str | Path) -> OwnedFolder:
    """The record of the files that a stage has created in its output folder."""
    return OwnedFolder(output_dir, legacy=_entries_without_record)


def _entries_without_record(output_dir: Path) -> list[str]:
    """Entries of a run of a version without records, recognized by complete checkpoints or the mark of its end."""
    complete = {path.name: files for path in _numbered(output_dir) if (files := _files_by_marker(path)) is not None}
    finished = readable_json(output_dir / FINISHED)
    if not complete and not (finished and {"steps", "seconds"} <= set(finished)):
        return []
    patterns = [*_RUN_FILES, *(f"adapter/{name}" for name in (*_ADAPTER_FILES, *_MODEL_FILES))]
    patterns += _MODEL_FILES if finished else []
    written = [str(path.relative_to(output_dir)) for path in files_of(output_dir, patterns)]
    return written + [f"{name}/{file}" for name, files in complete.items() for file in (*files, MARKER)]


def read_marker(folder: Path) -> dict | None:
    """The marker of a checkpoint: the shape of its run, and `files` and `sha256`, size and digest of each file.

    None without a marker of this program, or if it is damaged. Markers of earlier versions have no digests.
    """
    marker = readable_json(folder / MARKER) or {}
    files: Any = marker.get("files")
    digests: Any = marker.get("sha256", {})
    is_whole = isinstance(files, dict) and isinstance(digests, dict) and type(marker.get("world_size")) is int
    if not is_whole or not all(type(size) is int for size in files.values()):
        return None
    return marker if all(_is_inside(name) for name in files) else None


def _is_inside(name: str) -> bool:
    return bool(name) and "\0" not in name and not name.startswith("/") and ".." not in name.split("/")


def _files_by_marker(folder: Path) -> dict[str, int] | None:
    """The sizes of the files of a checkpoint according to its marker; None without a marker of this program."""
    marker = read_marker(folder)
    return None if marker is None else marker["files"]


def entries_of(owned: OwnedFolder, checkpoint: Path) -> list[str]:
    """The recorded entries of a checkpoint; empty for a folder that the run has not created."""
    return [entry for entry in owned.entries if entry.startswith(f"{checkpoint.name}/")]


def check_outputs(output_dir: str | Path, lora: bool) -> None:
    """Check that the files of a run can be created in its output folder.

    Raises:
        UserError: one of them exists and was not created by a run of this program.
    """
    names = [*_RUN_FILES, *_MODEL_FILES, *(f"adapter/{name}" for name in _ADAPTER_FILES if lora)]
    OwnedFolder.check(owned_folder(output_dir), *names)


def check_checkpoints(output_dir: str | Path, num_steps: int) -> None:
    """Check that a run of `num_steps` steps would not overwrite a checkpoint of another program.

    Raises:
        UserError: it would.
    """
    owned = owned_folder(output_dir)
    for path in _numbered(output_dir):
        if int(path.name.split("-")[-1]) <= num_steps and not entries_of(owned, path):
            owned.check(*(f"{path.name}/{name}" for name in _CHECKPOINT_FILES))


def claim_outputs(owned: OwnedFolder) -> None:
    """Record the files that every run creates."""
    owned.claim(*_RUN_FILES)


def claim_checkpoint(folder: Path) -> set[Path]:
    """Record a checkpoint before it is written, and return the files of other programs in its folder.

    Raises:
        UserError: it would overwrite the checkpoint of another program.
    """
    owned = owned_folder(folder.parent)
    foreign = set(files_of(folder, ["**/*"])) - set(owned.files(entries_of(owned, folder)))
    owned.claim(*(f"{folder.name}/{name}" for name in _CHECKPOINT_FILES))
    return foreign


def delete_checkpoint(folder: Path) -> None:
    """Delete the files of a checkpoint that the run has created."""
    owned = owned_folder(folder.parent)
    (folder / MARKER).unlink(missing_ok=True)  # first: a partial checkpoint must not look like a damaged one
    entries = entries_of(owned, folder)
    delete_files(owned.path, owned.files(entries))
    with contextlib.suppress(OSError):  # on a full disk the record keeps the names of deleted files: harmless
        owned.forget(*entries)


def describe_outputs(output_dir: str | Path) -> str:
    """Describe the contents of an output folder: "3 checkpoints (the newest: step 400) and a finished model"."""
    found, owned = checkpoints(output_dir), owned_folder(output_dir)
    parts = []
    if found:
        count = "a checkpoint" if len(found) == 1 else f"{len(found)} checkpoints"
        parts.append(f"{count} ({'' if len(found) == 1 else 'the newest: '}step {found[-1].name.split('-')[-1]})")
    if (Path(output_dir) / FINISHED).is_file() and owned.owns(FINISHED):
        parts.append("a finished model")
    return " and ".join(parts) or f"{len(owned.files())} files of a run without a checkpoint"


# Complete checkpoints ----------------------------------------------------------------------------------------


def mark_complete(folder: Path, shape: RunShape, foreign: Collection[Path] = ()) -> None:
    """Flush a checkpoint and write its marker: the shape of the run, size and sha256 of all files but `foreign`.

    Raises:
        UserError: the marker cannot be written.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)
    files = [path for path in files if path not in foreign]
    with writing(folder):
        for path in (*files, *{path.parent for path in files}, folder.parent):
            flush(path)
        sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
        with ThreadPoolExecutor() as pool:  # hashing releases the GIL
            digests = dict(zip(sizes, pool.map(sha256_of_file, files), strict=True))
    owned = owned_folder(folder.parent)
    owned.exchange(entries_of(owned, folder), [f"{folder.name}/{name}" for name in (*sizes, MARKER)])
    write_json(folder / MARKER, {**asdict(shape), "files": sizes, "sha256": digests}, sync=True)


def is_complete(folder: Path, verify: bool = False) -> bool:
    """Whether a checkpoint has a marker, and every file the size and sha256 that the marker names.

    Args:
        verify: also compute the sha256 of files of more than 1 MiB.
    """
    marker = read_marker(folder)
    if marker is None:
        return False
    sizes, digests = marker["files"], marker.get("sha256", {})
    if not all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items()):
        return False
    hashed = [name for name, size in sizes.items() if name in digests and (verify or size <= _SMALL)]
    try:
        with ThreadPoolExecutor() as pool:
            return list(pool.map(lambda name: sha256_of_file(folder / name), hashed)) == [digests[n] for n in hashed]
    except OSError:
        return False


def finish_checkpoint(
    folder: Path, shape: RunShape, processes: Processes, keep: int | None, foreign: Collection[Path] = ()
) -> None:
    """Mark a checkpoint as complete once all processes have written their parts, then delete the oldest ones.

    Args:
        keep: number of checkpoints to keep; None for all.
        foreign: files of other programs in the folder.

    Raises:
        UserError: the marker cannot be written.
    """
    processes.barrier()
    if processes.is_first:
        mark_complete(folder, shape, foreign)
        for old in checkpoints(folder.parent)[:-keep] if keep else []:
            delete_checkpoint(old)
    processes.barrier()


def find_resumable(output_dir: str | Path, shape: RunShape, verify: bool = False) -> Path | None:
    """The newest complete checkpoint of a run, or None if it has not written one.

    A checkpoint whose marker cannot be read is incomplete: its marker was being written.

    Args:
        verify: as in `is_complete`.

    Raises:
        UserError: it was written by a run of another shape, or all checkpoints are damaged.
    """
    damaged = []
    for folder in reversed(checkpoints(output_dir)):
        marker = read_marker(folder)
        if marker is not None and is_complete(folder, verify):
            shape.check(marker, folder)
            return folder
        logger.warning("%s is %s; trying the previous checkpoint", folder, "damaged" if marker else "incomplete")
        damaged += [folder] if marker else []
    if damaged:
        raise UserError(
            f"{damaged[0]} was complete and has been changed since (its {MARKER} names other content), and the "
            "run has no other checkpoint; restore it, or pass --overwrite true to start over"
        )
    return None


def drop_incomplete(output_dir: str | Path, verify: bool = False) -> None:
    """Delete checkpoints that a stopped run has written in part, and rename those that were complete and are damaged.

    Otherwise their files would mix with new ones, and they would count among the checkpoints that are kept.
    """
    for folder in checkpoints(output_dir):
        if not (folder / MARKER).is_file():
            delete_checkpoint(folder)
        elif not is_complete(folder, verify):
            owned = owned_folder(output_dir)
            aside = _free_name(folder.with_name(f"damaged-{folder.name}"))
            folder.rename(aside)
            entries = entries_of(owned, folder)
            owned.exchange(entries, [entry.replace(folder.name, aside.name, 1) for entry in entries])


def _free_name(folder: Path) -> Path:
    number, free = 1, folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free


def steps_of(checkpoint: Path) -> int:
    """The number of optimizer steps before a checkpoint.

    Raises:
        UserError: the state of the trainer cannot be read.
    """
    step = read_json(checkpoint / STATE).get("global_step")
    if type(step) is not int or step < 0:
        raise UserError(f"{checkpoint / STATE} cannot be read: expected a number of steps as global_step, got {step!r}")
    return step


def publish(source: Path, folder: Path, owned: OwnedFolder | None = None) -> None:
    """Write the model of a checkpoint to a folder, each file atomically, the configuration last.

    Args:
        owned: the record of the output folder that `folder` is or is inside of; by default that of `folder`.

    Raises:
        UserError: it cannot be written, or would overwrite a file of another program; the checkpoint is kept.
    """
    owned = owned_folder(folder) if owned is None else owned
    place = "" if owned.path == folder else f"{folder.relative_to(owned.path)}/"
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            files = [path for path in source.iterdir() if _belongs_to_model(path)]
            files.sort(key=lambda path: path.name.endswith("config.json"))
            owned.claim(*(f"{place}{path.name}" for path in files))
        for path in files:
            write_whole(folder / path.name, partial(_link_or_copy, path))
    except UserError as error:
        raise UserError(f"{error}. The model is in {source}; run the same command again to publish it") from error


def _belongs_to_model(path: Path) -> bool:
    return path.suffix in _MODEL_SUFFIXES and path.name not in _NOT_MODEL


def _link_or_copy(path: Path, new: Path) -> None:
    """Create a hard link to a file, or copy it if the file system does not support links."""
    new.unlink(missing_ok=True)  # a link that a killed process has left: copying would write into its checkpoint
    try:
        os.link(path, new)
    except OSError:
        shutil.copyfile(path, new)


def mark_finished(output_dir: str | Path, facts: dict) -> None:
    """Record that a run reached its end.

    Raises:
        UserError: the mark cannot be written.
    """
    write_json(Path(output_dir) / FINISHED, facts, sync=True)


def finished_facts(output_dir: str | Path) -> dict | None:
    """The facts that `mark_finished` recorded, or None for a run that is not finished.

    Raises:
        UserError: the mark is damaged.
    """
    path = Path(output_dir) / FINISHED
    if not path.is_file():
        return None
    facts = read_json(path)
    if type(facts.get("steps")) is not int:
        raise UserError(f"{path} cannot be read: expected a number of steps; restore it, or pass --overwrite true")
    return facts
