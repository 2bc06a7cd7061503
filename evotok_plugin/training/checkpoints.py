"""Checkpoints of a tokenizer run: safetensors files, replaced atomically, of which the newest few are kept.

Only files that the run has created are read, replaced or deleted.
"""

import logging
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, optim

from evotok_plugin.common.digests import sha256_of_file
from evotok_plugin.common.files import write_whole, writing
from evotok_plugin.common.foreign_files import describe_error, open_regular, reading
from evotok_plugin.common.owned_folder import OwnedFolder, files_of
from evotok_plugin.errors import UserError
from evotok_plugin.training.resume import RECIPE, read_recipe

logger = logging.getLogger(__name__)

MODEL_FILES = ("config.json", "model.safetensors", "preprocessor_config.json", "processor_config.json")
RUN_FILES = (
    RECIPE, "metrics.jsonl", "bad_images.jsonl", "wandb_id", "teacher.json", "tensorboard/**/events.out.tfevents.*",
    *MODEL_FILES,
)  # fmt: skip


def owned_folder(folder: Path) -> OwnedFolder:
    """The record of what a tokenizer run has created in its output folder."""
    return OwnedFolder(folder, legacy=_entries_without_record)


def _entries_without_record(folder: Path) -> list[str]:
    """Entries of a run from before records existed, recognized by its settings and its checkpoints."""
    complete = [path for path in _numbered(folder) if _is_checkpoint(path)]
    if not complete or not {"data", "output_dir"} <= set(read_recipe(folder) or {}):
        return []
    found = [*files_of(folder, [*RUN_FILES, "validation_*.png"]), *complete]
    return [str(path.relative_to(folder)) for path in found]


def _is_checkpoint(path: Path) -> bool:
    """Whether a file is a checkpoint in the format of this program."""
    try:
        open_regular(path).close()  # opening a pipe would wait for a writer
        with safe_open(path, "pt") as file:
            names = set(file.keys())
    except (OSError, SafetensorError):
        return False
    return "step" in names and any(name.startswith("model.quantizer.") for name in names)


def _numbered(folder: Path) -> list[Path]:
    found = (path for path in folder.glob("checkpoint-*.safetensors") if re.fullmatch(r"checkpoint-\d+", path.stem))
    return sorted(found)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that a run has written, oldest first."""
    owned = owned_folder(folder)
    return [path for path in _numbered(folder) if owned.owns(path.name)]


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, taken from its name."""
    return int(checkpoint.stem.split("-")[1])


def files_in_the_way(folder: Path, max_steps: int) -> list[str]:
    """Names of existing files that checkpoints or validation pictures of a run of `max_steps` would overwrite."""
    found = [*folder.glob("checkpoint-*.safetensors"), *folder.glob("validation_*.png")]
    numbered = ((path, re.fullmatch(r"(?:checkpoint-(\d{9,})|validation_(\d{7,}))", path.stem)) for path in found)
    return [path.name for path, match in numbered if match and int(match[1] or match[2]) <= max_steps]


def describe_run(folder: Path) -> str:
    """Describe the contents of an output folder: "2 checkpoints (the newest: step 400) and a model"."""
    found, owned = checkpoints(folder), owned_folder(folder)
    parts = []
    if found:
        count = "a checkpoint" if len(found) == 1 else f"{len(found)} checkpoints"
        parts.append(f"{count} ({'' if len(found) == 1 else 'the newest: '}step {step_of(found[-1])})")
    if owned.owns("model.safetensors") and (folder / "model.safetensors").is_file():
        parts.append("a model")
    return " and ".join(parts) or f"{len(owned.files())} files of a run without a checkpoint"


def write_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], keep: int) -> Path:
    """Write the checkpoint of a step, record its SHA-256, then remove all but the newest `keep`.

    Raises:
        UserError: it cannot be written, for example because the disk is full, and earlier checkpoints are kept; or one
            of these cannot be deleted.
    """
    path, owned = folder / f"checkpoint-{step:09d}.safetensors", owned_folder(folder)
    values = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    advice = f"{newest_kept(folder)}; make room and run the same command again"
    owned.claim(path.name)
    digests = {name: digest for name, digest in _digests(owned).items() if name != path.name}
    owned.note(sha256=digests)  # a kill between the next two lines leaves a whole file without a digest
    write_whole(path, lambda part: save_file(values, part), sync=True, advice=advice)
    removed = [old.name for old in checkpoints(folder)[:-keep]]
    with writing(folder):
        digests[path.name] = sha256_of_file(path)
        owned.delete(*removed)
    owned.note(sha256={name: digest for name, digest in digests.items() if name not in removed})
    return path


def _digests(owned: OwnedFolder) -> dict[str, str]:
    """The recorded SHA-256 of checkpoints by name; those of earlier versions have none."""
    recorded = owned.facts.get("sha256")
    return recorded if isinstance(recorded, dict) else {}


def newest_kept(folder: Path) -> str:
    """The part of an error message that names the newest checkpoint."""
    found = checkpoints(folder)
    return f"{found[-1]} is kept" if found else "no checkpoint has been written yet"


def read_newest(folder: Path) -> tuple[Path, dict[str, Tensor]] | None:
    """The newest readable checkpoint and its tensors, or None if the run has not written any.

    Raises:
        UserError: there are checkpoints, but none of them can be read.
    """
    found, digests = checkpoints(folder), _digests(owned_folder(folder))
    for path in reversed(found):
        try:
            if digests.get(path.name, digest := sha256_of_file(path)) != digest:
                raise UserError(f"{path} cannot be read: it is not the file that was written (sha256 {digest[:12]}...)")
            with reading(path, verb="read"):
                tensors = load_file(path)
                _check_tensors(tensors, path)
            return path, tensors
        except (OSError, UserError) as error:
            logger.warning("%s; trying the one before", describe_error(error))
    if found:
        raise UserError(
            f"none of the {len(found)} checkpoints in {folder} can be read; pass --overwrite true to start over"
        )
    return None


def _check_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    step = tensors.get("step")
    if step is None or step.numel() != 1 or int(step) != step_of(path):
        raise UserError(f"it does not hold the state after step {step_of(path)}")


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with `prefix.` added to their names."""
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def part(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix.`, without it: the inverse of `under`."""
    return {name[len(prefix) + 1 :]: value for name, value in tensors.items() if name.startswith(prefix + ".")}


def optimizer_tensors(optimizer: optim.Optimizer) -> dict[str, Tensor]:
    """Adam's state as named tensors: `<parameter index>.<name>`."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}


def load_optimizer(optimizer: optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore the state that `optimizer_tensors` returned; learning rates are not changed."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
