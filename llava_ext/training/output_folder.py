"""The output folder of a stage: what may be written there, what is resumed, what is replaced, and when."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from evotok_plugin.common.files import check_output_folder
from evotok_plugin.common.owned_folder import check_replaceable
from evotok_plugin.errors import UserError
from evotok_plugin.training.resume import Change, recipe_to_compare, reject, write_recipe
from llava_ext.training.checkpoints import (
    FINISHED,
    PENDING_REPORTS,
    RunShape,
    barrier,
    check_outputs,
    claim_outputs,
    describe_outputs,
    drop_incomplete,
    find_resumable,
    finished_facts,
    owned_folder,
    steps_of,
)
from llava_ext.training.config import StageConfig
from llava_ext.training.sample_reports import holds_run, place_reports
from llava_ext.training.settings import compare, content_changes

logger = logging.getLogger("llava_ext")


@dataclass
class Plan:
    """Plan for the output folder of a run.

    Attributes:
        checkpoint: the one that is resumed, if any.
        finished_steps: of a run that is finished, with the same settings; 0 if there is something to train.
        applied: settings that are other than before from the checkpoint on.
        moved: paths of inputs that are other than before; their content decides.
    """

    checkpoint: Path | None = None
    finished_steps: int = 0
    applied: list[Change] = field(default_factory=list)
    moved: list[Change] = field(default_factory=list)


def plan_output(config: StageConfig, values: Mapping[str, Any], shape: RunShape) -> Plan:
    """Decide what is resumed or replaced; nothing is created or changed.

    Raises:
        UserError: the folder cannot be written to, holds files of others where the run would write, must not be
            replaced, or holds a run with other settings.
    """
    folder = Path(config.output_dir)
    check_output_folder(folder, "--output_dir")
    if config.process_index == 0 and owned_folder(folder).restore():
        logger.warning("%s: the run that was to be replaced is back; the last start did not reach a step", folder)
    barrier()
    check_outputs(folder, config.lora_enable)
    if config.overwrite:
        check_replaceable(folder, _inputs(config))
    return Plan() if config.overwrite else _plan_resume(config, values, shape)


def _plan_resume(config: StageConfig, values: Mapping[str, Any], shape: RunShape) -> Plan:
    folder = Path(config.output_dir)
    plan = Plan(checkpoint=find_resumable(folder, shape))
    facts = finished_facts(folder)
    state = saved = None
    if facts or plan.checkpoint:
        state = f"a finished run ({facts['steps']} steps)" if facts else f"a run at step {steps_of(plan.checkpoint)}"
        saved = recipe_to_compare(folder, state, config.process_index == 0)
    if saved is not None:
        rejected, plan.applied, plan.moved = compare(saved, values)
        reject(rejected, folder, state)
        if facts and not _asks_for_more(plan.applied, facts["steps"]):
            reject(content_changes({}, {}, plan.moved, at_hand=False), folder, state)
    if facts and not _asks_for_more(plan.applied, facts["steps"]):
        plan.finished_steps = facts["steps"]
    elif facts and plan.checkpoint is None:
        raise UserError(f"{folder} holds a finished run without a checkpoint to continue from; pass --overwrite true")
    _check_asked_checkpoint(config, plan.checkpoint)
    return plan


def _asks_for_more(applied: list[Change], steps: int) -> bool:
    """Whether a finished run is to be longer."""
    for change in applied:
        if change.name == "max_steps" and change.now != change.before:
            return change.now <= 0 or change.now > steps
        if change.name == "num_train_epochs":
            return change.now > change.before
    return False


def _inputs(config: StageConfig) -> dict[str, list[str]]:
    """Paths that the run reads, by their settings."""
    given = {
        "model_name_or_path": [config.model_name_or_path],
        "vision_tower": [config.vision_tower],
        "data_path": config.data_path,
        "image_folder": [config.image_folder],
        "code_cache": [config.code_cache],
    }
    return {name: [path for path in paths if path and not path.startswith("hf:")] for name, paths in given.items()}


def _check_asked_checkpoint(config: StageConfig, found: Path | None) -> None:
    """`resume_from_checkpoint` may say what happens anyway.

    Raises:
        UserError: it names another checkpoint than the one that is resumed.
    """
    asked = config.resume_from_checkpoint
    if asked is None or str(asked).lower() in ("true", "false", "none"):
        if str(asked).lower() == "false" and found:
            raise UserError(f"{found} would be resumed; pass --overwrite true to start over")
        return
    if found is None or Path(asked).resolve() != found.resolve():
        what = f"that is {found}" if found else "there is none"
        raise UserError(
            f"resume_from_checkpoint={asked}: a stage resumes the newest complete checkpoint of its --output_dir by "
            f"itself ({what}); leave it out, and choose the run with --output_dir"
        )


def prepare_output(config: StageConfig, values: Mapping[str, Any], plan: Plan, facts: Mapping[str, Any]) -> None:
    """Make the output folder ready for the first step, once everything has been checked.

    Under `overwrite` the run that is there is moved aside: `ReplacedRun` deletes it after the first step.
    """
    folder = Path(config.output_dir)
    barrier()  # no process is still looking at the folder as it was
    if config.process_index == 0:
        owned = owned_folder(folder)
        has_run = holds_run(owned)
        if config.overwrite and has_run:
            said = describe_outputs(folder)
            if aside := owned.move_aside(keep=PENDING_REPORTS):
                logger.warning("%s holds %s; moved to %s until the first step has succeeded", folder, said, aside)
        if has_run:
            place_reports(folder)
        drop_incomplete(folder)
        owned = owned_folder(folder)
        if plan.checkpoint is not None:
            owned.delete(FINISHED)  # a run that is continued is not finished
        claim_outputs(owned)
        owned.note(**facts)
        saved = {name: value for name, value in values.items() if name not in ("overwrite", "resume_from_checkpoint")}
        step = steps_of(plan.checkpoint) if plan.checkpoint else 0
        write_recipe(folder, saved, plan.applied, step)
    barrier()


def restore_replaced(config: StageConfig) -> None:
    """Move back the run that was to be replaced, if the new one has not made a step."""
    if config.process_index == 0 and owned_folder(config.output_dir).restore():
        logger.warning("%s is as it was before", config.output_dir)


class ReplacedRun(TrainerCallback):
    """Deletes the run that is replaced after the first step of the new one has succeeded."""

    def __init__(self) -> None:
        self._is_deleted = False

    def on_step_end(self, args, state, control, **kwargs):
        if not self._is_deleted and state.is_world_process_zero:
            owned_folder(args.output_dir).finish_replacing()
        self._is_deleted = True


def check_inputs(plan: Plan, config: StageConfig, facts: Mapping[str, Any]) -> None:
    """Compare the inputs of a resumed run with those that it was started with, and report what differs.

    Raises:
        UserError: other data or weights.
    """
    if plan.checkpoint is None:
        return
    folder = Path(config.output_dir)
    different = content_changes(owned_folder(folder).facts, facts, plan.moved)
    reject(different, folder, f"a run at step {steps_of(plan.checkpoint)}")
    logger.info("resuming from %s", plan.checkpoint)
    for change in plan.moved:
        logger.info("  %s, with the same content", change)
    for change in plan.applied:
        logger.info("  %s (takes effect from here on)", change)
