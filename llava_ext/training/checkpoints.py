"""Checkpoints that are whole or not there: a marker file is written last, and only marked ones are resumed.

A run's own checkpoints are the one place where pickles are read, by transformers and DeepSpeed: optimizer, scheduler
and random states with `torch.load(weights_only=True)`, DeepSpeed's `global_step*/*.pt` with `weights_only=False`. So
resume only runs whose folder you trust; models and adapters, which travel, are safetensors.
"""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from evotok_plugin.common.owned_folder import OwnedFolder, delete_files, files_of
from evotok_plugin.errors import UserError
from llava_ext.new_tokens import ROWS_FILE

logger = logging.getLogger("llava_ext")

MARKER = "COMPLETE.json"
FINISHED = "finished.json"
STATE = "trainer_state.json"
_MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model")

REPORTS = ("bad_samples.jsonl", "too_long_samples.jsonl")  # written while the data is checked, before the first step
PENDING_REPORTS = tuple(name.replace(".jsonl", ".new.jsonl") for name in REPORTS)  # next to those of an old run
_RUN_FILES = (
    "recipe.yaml",
    "metrics.jsonl",
    FINISHED,
    *REPORTS,
    *PENDING_REPORTS,
    "tensorboard/**/events.out.tfevents.*",
)
_MODEL_FILES = (
    "model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json",
    "processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
)  # fmt: skip
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json", "base.json")
_STATE_FILES = (
    MARKER, "COMPLETE.tmp", STATE, ROWS_FILE, "*.pt", "*.pth", "*.bin", "latest", "zero_to_fp32.py",
    "global_step*/**/*",
)  # fmt: skip
_NOT_MODEL = (MARKER, STATE, ROWS_FILE)
_CHECKPOINT_FILES = (*_MODEL_FILES, *_ADAPTER_FILES, *_STATE_FILES)


@dataclass(frozen=True)
class RunShape:
    """What must be the same for a checkpoint to be resumed: how the state is spread, and what it is a state of."""

    world_size: int
    zero_stage: int = 0
    method: str = "full"

    def check(self, saved: dict, folder: Path) -> None:
        """Compare with what a checkpoint's marker says.

        Raises:
            UserError: it was written by a run of another shape.
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


def barrier() -> None:
    """Wait for all processes of the run, if there are several."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def _write_json(path: Path, value: dict) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2))
    os.replace(temporary, path)


def checkpoint_folder(output_dir: str | Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return Path(output_dir) / f"checkpoint-{step}"


def checkpoints(output_dir: str | Path) -> list[Path]:
    """A run's checkpoints, oldest first, complete or not; folders of that name from other programs are left out."""
    owned = owned_folder(output_dir)
    found = [path for path in _numbered(output_dir) if entries_of(owned, path)]
    return sorted(found, key=lambda path: int(path.name.split("-")[-1]))


def _numbered(output_dir: str | Path) -> list[Path]:
    found = Path(output_dir).glob("checkpoint-*")
    return [path for path in found if path.name.removeprefix("checkpoint-").isdigit()]


# What the run has created ------------------------------------------------------------------------------------


def owned_folder(output_dir: str | Path) -> OwnedFolder:
    """The record of what a stage has created in its output folder."""
    return OwnedFolder(output_dir, legacy=_entries_without_record)


def _entries_without_record(output_dir: Path) -> list[str]:
    """Entries of a run that was made before there were records, known by its complete checkpoints or its end."""
    whole = {path.name: files for path in _numbered(output_dir) if (files := _files_by_marker(path)) is not None}
    finished = _read_json(output_dir / FINISHED)
    if not whole and not (finished and {"steps", "seconds"} <= set(finished)):
        return []
    patterns = [*_RUN_FILES, *(f"adapter/{name}" for name in (*_ADAPTER_FILES, *_MODEL_FILES))]
    patterns += _MODEL_FILES if finished else []
    written = [str(path.relative_to(output_dir)) for path in files_of(output_dir, patterns)]
    return written + [f"{name}/{file}" for name, files in whole.items() for file in (*files, MARKER)]


def _read_json(path: Path) -> dict | None:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _files_by_marker(folder: Path) -> dict[str, int] | None:
    """The sizes of a checkpoint's files as its marker names them; None without a marker of this program."""
    marker = _read_json(folder / MARKER) or {}
    files = marker.get("files")
    return files if "world_size" in marker and isinstance(files, dict) else None


def entries_of(owned: OwnedFolder, checkpoint: Path) -> list[str]:
    """The recorded entries of a checkpoint; none of a folder that the run has not created."""
    return [entry for entry in owned.entries if entry.startswith(f"{checkpoint.name}/")]


def check_outputs(output_dir: str | Path, lora: bool) -> None:
    """Check that the files of a run can be created in its output folder.

    Raises:
        UserError: one of them is there, and no run of this program has created it.
    """
    names = [*_RUN_FILES, *_MODEL_FILES, *(f"adapter/{name}" for name in _ADAPTER_FILES if lora)]
    OwnedFolder.check(owned_folder(output_dir), *names)


def check_checkpoints(output_dir: str | Path, num_steps: int) -> None:
    """Check that no checkpoint of another program is in the way of a run of so many steps.

    Raises:
        UserError: there is one.
    """
    owned = owned_folder(output_dir)
    for path in _numbered(output_dir):
        if int(path.name.split("-")[-1]) <= num_steps and not entries_of(owned, path):
            owned.check(*(f"{path.name}/{name}" for name in _CHECKPOINT_FILES))


def claim_outputs(owned: OwnedFolder) -> None:
    """Record the files that every run creates."""
    owned.claim(*_RUN_FILES)


def claim_checkpoint(folder: Path) -> set[Path]:
    """Record a checkpoint before it is written; the files of others that are in its folder.

    Raises:
        UserError: another program's checkpoint is in the way.
    """
    owned = owned_folder(folder.parent)
    foreign = set(files_of(folder, ["**/*"])) - set(owned.files(entries_of(owned, folder)))
    owned.claim(*(f"{folder.name}/{name}" for name in _CHECKPOINT_FILES))
    return foreign


def delete_checkpoint(folder: Path) -> None:
    """Delete the files of a checkpoint that the run has created."""
    owned = owned_folder(folder.parent)
    (folder / MARKER).unlink(missing_ok=True)  # first: half a checkpoint must not look like one that was damaged
    entries = entries_of(owned, folder)
    delete_files(owned.path, owned.files(entries))
    with contextlib.suppress(OSError):  # on a full disk the record still names files that are gone, which is harmless
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


def mark_complete(folder: Path, shape: RunShape, foreign: Sequence[Path] | set[Path] = ()) -> None:
    """Flush a checkpoint to disk and write its marker: the run's shape and the sizes of all files but `foreign`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)
    files = [path for path in files if path not in foreign]
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    owned = owned_folder(folder.parent)
    owned.exchange(entries_of(owned, folder), [f"{folder.name}/{name}" for name in (*sizes, MARKER)])
    _write_json(folder / MARKER, {**asdict(shape), "files": sizes})


def is_complete(folder: Path) -> bool:
    """Whether the marker is there and every file has the size it names."""
    files = _files_by_marker(folder)
    if files is None:
        return False
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in files.items())


def finish_checkpoint(
    folder: Path, shape: RunShape, is_first: bool, keep: int | None, foreign: Sequence[Path] | set[Path] = ()
) -> None:
    """Mark a checkpoint that all processes have written their part of, then delete the run's oldest beyond `keep`."""
    barrier()
    if is_first:
        mark_complete(folder, shape, foreign)
        for old in checkpoints(folder.parent)[:-keep] if keep else []:
            delete_checkpoint(old)
    barrier()


def find_resumable(output_dir: str | Path, shape: RunShape) -> Path | None:
    """The newest complete checkpoint of a run, or None if it has none yet.

    Raises:
        UserError: it was written by a run of another shape, or all that there are have been damaged.
    """
    damaged = []
    for folder in reversed(checkpoints(output_dir)):
        if not is_complete(folder):
            logger.warning("%s is incomplete; trying the one before", folder)
            damaged += [folder] if (folder / MARKER).is_file() else []
            continue
        shape.check(json.loads((folder / MARKER).read_text()), folder)
        return folder
    if damaged:
        raise UserError(
            f"{damaged[0]} was complete once and has been changed since (its {MARKER} names other files), and there is "
            "no other checkpoint; restore it, or pass --overwrite true to start over"
        )
    return None


def drop_incomplete(output_dir: str | Path) -> None:
    """Delete what a stopped run has left half-written, so that no old file mixes with new ones and none counts among
    the checkpoints that are kept. A checkpoint that was complete once is only renamed."""
    for folder in checkpoints(output_dir):
        if not (folder / MARKER).is_file():
            delete_checkpoint(folder)
        elif not is_complete(folder):
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
    """How many optimizer steps a checkpoint has behind it."""
    return json.loads((checkpoint / STATE).read_text())["global_step"]


def publish(source: Path, folder: Path, owned: OwnedFolder | None = None) -> None:
    """Put the model of a checkpoint into its place, each file whole or not at all, the configuration last.

    Args:
        owned: the record of the output folder that `folder` is or lies in; by default that of `folder`.

    Raises:
        UserError: it cannot be written, or a file of another origin is in the way; the checkpoint stays.
    """
    owned = owned_folder(folder) if owned is None else owned
    place = "" if owned.path == folder else f"{folder.relative_to(owned.path)}/"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = [path for path in source.iterdir() if path.suffix in _MODEL_SUFFIXES and path.name not in _NOT_MODEL]
        files.sort(key=lambda path: path.name.endswith("config.json"))
        owned.claim(*(f"{place}{path.name}" for path in files))
        for path in files:
            temporary = folder / f".{path.name}.part"
            temporary.unlink(missing_ok=True)
            _link_or_copy(path, temporary)
            os.replace(temporary, folder / path.name)
    except OSError as error:
        raise UserError(
            f"the model cannot be written to {folder}: {error}; it is in {source}. "
            "Make room and run the same command again"
        ) from error


def _link_or_copy(path: Path, new: Path) -> None:
    """The same bytes under another name; a second copy of gigabytes only where the file system has no links."""
    try:
        os.link(path, new)
    except OSError:
        shutil.copyfile(path, new)


def mark_finished(output_dir: str | Path, facts: dict) -> None:
    """Note that a run reached its end."""
    _write_json(Path(output_dir) / FINISHED, facts)


def finished_facts(output_dir: str | Path) -> dict | None:
    """What `mark_finished` noted, or None."""
    path = Path(output_dir) / FINISHED
    return json.loads(path.read_text()) if path.is_file() else None
