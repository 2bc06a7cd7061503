"""Checkpoints that are whole or not there: a marker file is written last, and only marked ones are resumed."""

import json
import logging
import os
from pathlib import Path

import torch.distributed as dist
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

MARKER = "COMPLETE.json"
FINISHED = "finished.json"


def _barrier() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def _write_json(path: Path, value: dict) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2))
    os.replace(temporary, path)


def mark_complete(folder: Path, world_size: int) -> None:
    """Flush a checkpoint to disk and write its marker: the sizes of all its files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    _write_json(folder / MARKER, {"world_size": world_size, "files": sizes})


def is_complete(folder: Path) -> bool:
    """Whether the marker is there and every file has the size it names."""
    marker = folder / MARKER
    if not marker.is_file():
        return False
    files = json.loads(marker.read_text())["files"]
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in files.items())


def find_resumable(output_dir: str | Path, world_size: int) -> Path | None:
    """The newest whole checkpoint of a run, or None.

    Raises:
        ValueError: it was written by another number of processes.
    """
    candidates = [p for p in Path(output_dir).glob("checkpoint-*") if p.name.split("-")[-1].isdigit()]
    for folder in sorted(candidates, key=lambda p: int(p.name.split("-")[-1]), reverse=True):
        if not is_complete(folder):
            logger.warning("%s is incomplete (the run was stopped while saving); trying the one before", folder)
            continue
        saved = json.loads((folder / MARKER).read_text())["world_size"]
        if saved != world_size:
            raise ValueError(
                f"{folder} was written by {saved} processes and cannot be resumed by {world_size}; "
                f"start with NPROC={saved}, or pass --overwrite true to begin anew"
            )
        return folder
    return None


def mark_finished(output_dir: str | Path, facts: dict) -> None:
    """Note that a run reached its end."""
    _write_json(Path(output_dir) / FINISHED, facts)


def finished_facts(output_dir: str | Path) -> dict | None:
    """What `mark_finished` noted, or None."""
    path = Path(output_dir) / FINISHED
    return json.loads(path.read_text()) if path.is_file() else None


class CompletionMarker(TrainerCallback):
    """Marks every checkpoint of the Trainer once all ranks have written their part."""

    def on_save(self, args, state, control, **kwargs):
        _barrier()
        if state.is_world_process_zero:
            mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}", args.world_size)
        _barrier()
