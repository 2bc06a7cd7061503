"""Checkpoints that are whole or not there: a marker file is written last, and only marked ones are resumed.

A run's own checkpoints are the one place where pickles are read, by transformers and DeepSpeed: optimizer, scheduler
and random states with `torch.load(weights_only=True)`, DeepSpeed's `global_step*/*.pt` with `weights_only=False`. So
resume only runs whose folder you trust; models and adapters, which travel, are safetensors.
"""

import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from llava_ext.new_tokens import ROWS_FILE

logger = logging.getLogger("llava_ext")

MARKER = "COMPLETE.json"
FINISHED = "finished.json"
STATE = "trainer_state.json"
_MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model")


@dataclass(frozen=True)
class RunShape:
    """What must be the same for a checkpoint to be resumed: how the state is spread, and what it is a state of."""

    world_size: int
    zero_stage: int = 0
    method: str = "full"

    def check(self, saved: dict, folder: Path) -> None:
        """Compare with what a checkpoint's marker says.

        Raises:
            ValueError: it was written by a run of another shape.
        """
        if saved["world_size"] != self.world_size:
            raise ValueError(
                f"{folder} was written by {saved['world_size']} processes and cannot be resumed by {self.world_size}, "
                "because each holds its own part of the optimizer; "
                f"start with NPROC={saved['world_size']}, or pass --overwrite true to begin anew"
            )
        for name, wanted in (("zero_stage", self.zero_stage), ("method", self.method)):
            if saved.get(name, wanted) != wanted:
                raise ValueError(
                    f"{folder} was written with {name} {saved[name]} and cannot be resumed with {wanted}; "
                    "go on as before, choose another --output_dir, or pass --overwrite true to begin anew"
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
    """A run's checkpoints, oldest first, whole or not."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.split("-")[-1]))


def mark_complete(folder: Path, shape: RunShape) -> None:
    """Flush a checkpoint to disk and write its marker: the run's shape and the sizes of all files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    _write_json(folder / MARKER, {**asdict(shape), "files": sizes})


def is_complete(folder: Path) -> bool:
    """Whether the marker is there and every file has the size it names."""
    marker = folder / MARKER
    if not marker.is_file():
        return False
    files = json.loads(marker.read_text())["files"]
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in files.items())


def finish_checkpoint(folder: Path, shape: RunShape, is_first: bool, keep: int | None) -> None:
    """Mark a checkpoint that all processes have written their part of, then drop the oldest beyond `keep`."""
    barrier()
    if is_first:
        mark_complete(folder, shape)
        for old in checkpoints(folder.parent)[:-keep] if keep else []:
            _remove(old)
    barrier()


def _remove(folder: Path) -> None:
    (folder / MARKER).unlink(missing_ok=True)  # first: half a checkpoint must not look like one that was damaged
    shutil.rmtree(folder)


def find_resumable(output_dir: str | Path, shape: RunShape) -> Path | None:
    """The newest whole checkpoint of a run, or None if it has none yet.

    Raises:
        ValueError: it was written by a run of another shape, or all that there are have been damaged.
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
        raise ValueError(
            f"{damaged[0]} was complete once and has been changed since (its {MARKER} names other files), and there is "
            "no other checkpoint; restore it, or pass --overwrite true to begin anew"
        )
    return None


def drop_incomplete(output_dir: str | Path) -> None:
    """Clear away what a stopped run has left half-written, so that no old file mixes with new ones and none counts
    among the checkpoints that are kept. One that was complete once is only renamed."""
    for folder in checkpoints(output_dir):
        if not (folder / MARKER).is_file():
            shutil.rmtree(folder)
        elif not is_complete(folder):
            aside = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)


def steps_of(checkpoint: Path) -> int:
    """How many optimizer steps a checkpoint has behind it."""
    return json.loads((checkpoint / STATE).read_text())["global_step"]


def publish(source: Path, folder: Path) -> None:
    """Put the model of a checkpoint into its place, each file whole or not at all, the configuration last.

    Raises:
        ValueError: it cannot be written; the checkpoint stays.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = [path for path in source.iterdir() if path.suffix in _MODEL_SUFFIXES]
        files = [path for path in files if path.name not in (MARKER, ROWS_FILE)]
        for path in sorted(files, key=lambda path: path.name.endswith("config.json")):
            temporary = folder / f".{path.name}.part"
            temporary.unlink(missing_ok=True)
            _link_or_copy(path, temporary)
            os.replace(temporary, folder / path.name)
    except OSError as error:
        raise ValueError(
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
