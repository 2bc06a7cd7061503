"""The output folder of a tokenizer run: checks before the run, resumption and replacement of the previous run."""

import contextlib
import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evotok_plugin.common.files import check_output_folder, writing
from evotok_plugin.common.owned_folder import check_replaceable
from evotok_plugin.common.processes import Processes
from evotok_plugin.common.recipes import as_plain
from evotok_plugin.common.run_lock import only_run
from evotok_plugin.data.sources import ImageSource
from evotok_plugin.teacher import Teacher
from evotok_plugin.training.checkpoints import (
    RUN_FILES,
    checkpoints,
    describe_run,
    files_in_the_way,
    owned_folder,
    step_of,
)
from evotok_plugin.training.config import TokenizerTrainingConfig
from evotok_plugin.training.resume import (
    Change,
    changed_contents,
    changes,
    recipe_to_compare,
    reject,
    sample_contents,
    write_recipe,
)

logger = logging.getLogger(__name__)

# How a changed setting is treated on resumption. IRRELEVANT: it has no influence on the weights.
IRRELEVANT = frozenset(
    """
    output_dir overwrite val_images val_every save_every keep_checkpoints log_every report_to max_loss_growth
    min_code_usage num_workers max_bad_fraction feature_cache compile gradient_checkpointing
    """.split()
)
APPLIED = frozenset("max_steps learning_rate grad_clip".split())  # from the checkpoint on, and logged
BY_CONTENT = frozenset("data teacher".split())  # paths that may change if their content is the same
# They would contradict the checkpoint's optimizer, averages or order of data.
REJECTED = frozenset(
    """
    data_weights val_data init_from train_parts preset model teacher_layer teacher_size teacher_standardize
    init_encoder semantic_share freeze_encoder batch_size warmup_steps cosine_decay bf16 weights_ema pixel_loss
    pixel_weight lpips_weight commitment_weight semantic_weight gan_weight gan_start gan_adaptive kmeans_images augment
    val_fraction seed
    """.split()
)

_DIGESTED_IMAGES = 20_000  # of every source
_DIGESTED_VALUES = 1024  # of every weight


class TokenizerOutput:
    """The output folder of a run: `open` checks it, `begin` prepares it for the first step."""

    def __init__(self, folder: Path, config: TokenizerTrainingConfig, processes: Processes) -> None:
        self._folder, self._config, self._processes = folder, config, processes
        self._is_replacing = False
        self._applied: list[Change] = []
        self._moved: list[Change] = []
        self._held = contextlib.ExitStack()

    def close(self) -> None:
        """Let other runs use the folder."""
        self._held.close()

    @classmethod
    def open(cls, folder: Path, config: TokenizerTrainingConfig, processes: Processes) -> "TokenizerOutput":
        """Lock the folder until `close`, restore a run whose replacement did not reach a step, and check the folder.

        Raises:
            UserError: another run uses the folder, or it cannot be written to, contains files of other programs that
                the run would overwrite, must not be replaced, or contains a run with other settings.
        """
        check_output_folder(folder, "--output_dir")
        with contextlib.ExitStack() as held:
            held.enter_context(only_run(folder, processes))
            output = cls._checked(folder, config, processes)
            output._held = held.pop_all()
        return output

    @classmethod
    def _checked(cls, folder: Path, config: TokenizerTrainingConfig, processes: Processes) -> "TokenizerOutput":
        with writing(folder):
            restored = processes.is_first and owned_folder(folder).restore()
        if restored:
            logger.warning("%s: the previous run is restored; the one that replaced it did not reach a step", folder)
        processes.barrier()
        owned_folder(folder).check(*RUN_FILES, *files_in_the_way(folder, config.max_steps))
        output = cls(folder, config, processes)
        if config.overwrite:
            teacher = [config.teacher] if config.teacher else []
            start = [config.init_from] if config.init_from else []
            inputs = {"data": config.data, "val_data": config.val_data or [], "teacher": teacher, "init_from": start}
            check_replaceable(folder, {k: [p for p in v if not p.startswith("hf:")] for k, v in inputs.items()})
        else:
            output._compare()
        return output

    def _compare(self) -> None:
        found = checkpoints(self._folder)
        saved = None
        if found:
            saved = recipe_to_compare(self._folder, self._state(found[-1]), self._processes.is_first)
        if saved is None:
            return
        defaults = as_plain(TokenizerTrainingConfig(data=["-"], output_dir="-", semantic_weight=0))
        defaults["semantic_weight"] = TokenizerTrainingConfig.semantic_weight
        before, now = {**defaults, **saved}, as_plain(self._config)
        irrelevant = IRRELEVANT | (_without_effect(before) & _without_effect(now))
        different = changes(_full_paths(before), _full_paths(now), irrelevant)
        self._applied = [change for change in different if change.name in APPLIED]
        self._moved = [change for change in different if change.name in BY_CONTENT]
        others = [change for change in different if change.name not in APPLIED | BY_CONTENT]
        reject(others, self._folder, self._state(found[-1]))

    def _state(self, checkpoint: Path) -> str:
        return f"a run at step {step_of(checkpoint)}"

    def begin(self, images: list[str], **facts: str | None) -> None:
        """Prepare the folder for the first step, once everything has been checked.

        Args:
            images: `contents_of` the images.
            facts: identities of the run's other inputs, by the names of their settings.

        Raises:
            UserError: the resumed run had other inputs, or the folder cannot be written to.
        """
        found = [] if self._config.overwrite else checkpoints(self._folder)
        if found:
            self._check_inputs(found[-1], facts, images)
        self._processes.barrier()
        if self._processes.is_first:
            with writing(self._folder):
                self._prepare(facts, images, step_of(found[-1]) if found else 0)
        self._processes.barrier()

    def _prepare(self, facts: dict[str, str | None], images: list[str], step: int) -> None:
        owned = owned_folder(self._folder)
        if self._config.overwrite and owned.files():
            previous = describe_run(self._folder)
            aside = owned.move_aside()
            self._is_replacing = True
            logger.warning("%s: %s moved to %s until the first step has succeeded", self._folder, previous, aside)
        owned.claim(*RUN_FILES)
        owned.note(**facts, images=images)
        saved = {name: value for name, value in as_plain(self._config).items() if name != "overwrite"}
        write_recipe(self._folder, saved, self._applied, step)

    def _check_inputs(self, checkpoint: Path, facts: dict[str, str | None], images: list[str]) -> None:
        before = owned_folder(self._folder).facts
        different = [
            Change(name, before[name], facts[name]) for name in facts if before.get(name, facts[name]) != facts[name]
        ]
        if not before:  # a run from before inputs were recorded: only their paths are known
            different += self._moved
        different = different or changed_contents(before.get("images"), images)
        reject(different, self._folder, self._state(checkpoint))
        for change in self._moved:
            logger.info("%s, with the same content", change)
        for change in self._applied:
            logger.info("%s (takes effect from step %d on)", change, step_of(checkpoint))

    def finish_replacing(self) -> None:
        """Delete the replaced run after the first step; later calls have no effect."""
        if self._is_replacing:
            with writing(self._folder):
                owned_folder(self._folder).finish_replacing()
            self._is_replacing = False

    def restore(self) -> None:
        """Move the replaced run back if the new one has not completed a step."""
        if self._is_replacing and owned_folder(self._folder).restore():
            self._is_replacing = False
            logger.warning("%s: the previous run is restored", self._folder)


def _without_effect(values: dict) -> set[str]:
    """Settings that have no effect because of others; earlier versions accepted values for them."""
    names = {"val_fraction"} if values["val_data"] else set()
    return names | ({"gan_start", "gan_adaptive"} if values["gan_weight"] == 0 else set())


def _full_paths(values: dict) -> dict:
    full = dict(values)
    for name in BY_CONTENT | {"val_data"}:
        value = full.get(name)
        if isinstance(value, str):
            full[name] = os.path.abspath(value)
        elif value:
            full[name] = [path if path.startswith("hf:") else os.path.abspath(path) for path in value]
    return full


def identity_of(sources: Sequence[ImageSource]) -> str:
    """Identity of a run's images by name: their number and a digest of their names.

    Of a source with more than 20000 images, that many names are used, evenly spread.
    """
    digest = hashlib.sha256()
    for source in sources:
        count = min(len(source), _DIGESTED_IMAGES)
        for index in np.linspace(0, len(source) - 1, count).round().astype(int).tolist():
            digest.update(f"{source.key(index)}\n".encode(errors="surrogateescape"))
    return f"{sum(map(len, sources))} images, digest {digest.hexdigest()[:16]}"


def contents_of(sources: Sequence[ImageSource]) -> list[str]:
    """Identity of a run's images by content (`sample_contents`), source after source."""
    return [
        digest
        for source in sources
        if hasattr(source, "content")
        for digest in sample_contents(source.content, range(len(source)))
    ]


def fingerprint_of(teacher: Teacher | None) -> str | None:
    """Identity of a teacher: a digest of the names, shapes and first values of its weights; None without a teacher."""
    if teacher is None:
        return None
    digest = hashlib.sha256()
    for name, weight in sorted(teacher.tower.used_weights().items()):
        values = weight.detach().flatten()[:_DIGESTED_VALUES].float().cpu().numpy()
        digest.update(f"{name}{tuple(weight.shape)}".encode() + values.tobytes())
    return digest.hexdigest()[:16]
