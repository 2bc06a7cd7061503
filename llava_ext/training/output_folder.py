"""The output folder of a stage: which run it holds, whether that is resumed or replaced, and when files change."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from evotok_plugin.common.files import check_output_folder, writing
from evotok_plugin.common.owned_folder import check_replaceable
from evotok_plugin.errors import UserError
from evotok_plugin.training.metrics_file import cut_metrics
from evotok_plugin.training.resume import Change, recipe_to_compare, reject, write_recipe
from llava_ext.training.checkpoints import (
    FINISHED,
    PENDING_REPORTS,
    RunShape,
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
from llava_ext.training.resume_rules import compare, content_changes
from llava_ext.training.sample_reports import holds_run, place_reports

logger = logging.getLogger("llava_ext")


@dataclass
class Plan:
    """Plan for the output folder of a run.

    Attributes:
        checkpoint: the checkpoint to resume from, if any.
        finished_steps: steps of a finished run with the same settings; 0 if there is something to train.
        applied: settings that change from the checkpoint on.
        moved: inputs whose paths have changed; their content decides whether the run is resumed.
    """

    checkpoint: Path | None = None
    finished_steps: int = 0
    applied: list[Change] = field(default_factory=list)
    moved: list[Change] = field(default_factory=list)


def plan_output(config: StageConfig, values: Mapping[str, Any], shape: RunShape) -> Plan:
    """Decide whether a run is resumed or replaced; nothing is created or changed.

    Args:
        values: the settings of the run by name, those at their defaults left out.

    Raises:
        UserError: the folder cannot be written to, holds files of another program where the run would write, must not
            be replaced, or holds a run with other settings.
    """
    folder = Path(config.output_dir)
    check_output_folder(folder, "--output_dir")
    if config.processes.is_first:
        with writing(folder):
            is_restored = owned_folder(folder).restore()
        if is_restored:
            logger.warning(
                "%s: the previous run has been restored; the start that was to replace it ended before its first step",
                folder,
            )
    config.processes.barrier()
    check_outputs(folder, config.lora_enable)
    if config.overwrite:
        check_replaceable(folder, config.input_paths())
        return Plan()
    return _plan_resume(config, values, shape)


def _plan_resume(config: StageConfig, values: Mapping[str, Any], shape: RunShape) -> Plan:
    folder = Path(config.output_dir)
    plan = Plan(checkpoint=find_resumable(folder, shape, config.verify))
    facts = finished_facts(folder)
    if facts is not None:
        _plan_after_finished(plan, config, values, facts["steps"])
    elif plan.checkpoint is not None:
        state = f"a run at step {steps_of(plan.checkpoint)}"
        _compare_settings(plan, config, values, state)
    _check_asked_checkpoint(config, plan.checkpoint)
    return plan


def _plan_after_finished(plan: Plan, config: StageConfig, values: Mapping[str, Any], steps: int) -> None:
    """Plan for a folder that holds a finished run: nothing to do, or more steps."""
    folder, state = Path(config.output_dir), f"a finished run ({steps} steps)"
    is_compared = _compare_settings(plan, config, values, state)
    if not _asks_for_more(plan.applied, steps):
        if is_compared:
            reject(content_changes({}, {}, plan.moved, is_known=False), folder, state)
        plan.finished_steps = steps
    elif plan.checkpoint is None:
        raise UserError(f"{folder} holds a finished run without a checkpoint to continue from; pass --overwrite true")


def _compare_settings(plan: Plan, config: StageConfig, values: Mapping[str, Any], state: str) -> bool:
    """Enter the changed settings into the plan; False if the settings of the previous run are not known.

    Raises:
        UserError: a changed setting that a resumed run must keep.
    """
    folder = Path(config.output_dir)
    saved = recipe_to_compare(folder, state, config.processes.is_first)
    if saved is None:
        return False
    rejected, plan.applied, plan.moved = compare(saved, values, type(config))
    reject(rejected, folder, state)
    return True


def _asks_for_more(applied: list[Change], steps: int) -> bool:
    """Whether the changed settings make a finished run longer."""
    for change in applied:
        if change.name == "max_steps" and change.now != change.before:
            return change.now <= 0 or change.now > steps
        if change.name == "num_train_epochs":
            return change.now > change.before
    return False


def _check_asked_checkpoint(config: StageConfig, found: Path | None) -> None:
    """Check `resume_from_checkpoint`, which may only ask for what happens without it.

    Raises:
        UserError: it names another checkpoint than the one that is resumed.
    """
    asked = config.resume_from_checkpoint
    if asked is None or str(asked).lower() in ("true", "false", "none"):
        if str(asked).lower() == "false" and found:
            raise UserError(f"{found} would be resumed; pass --overwrite true to start over")
        return
    if found is None or Path(asked).resolve() != found.resolve():
        newest = str(found) if found else "there is none"
        raise UserError(
            f"resume_from_checkpoint={asked}: a stage always resumes from the newest complete checkpoint of its "
            f"--output_dir ({newest}); leave it out, and choose the run with --output_dir"
        )


def prepare_output(config: StageConfig, values: Mapping[str, Any], plan: Plan, facts: Mapping[str, Any]) -> None:
    """Prepare the output folder for the first step, after all checks.

    With `overwrite` the previous run is moved aside: `ReplacedRun` deletes it after the first step.

    Args:
        facts: facts that identify the inputs of the run, to be recorded in the folder.

    Raises:
        UserError: the folder cannot be written to.
    """
    config.processes.barrier()  # no process is still reading the previous state of the folder
    if config.processes.is_first:
        folder = Path(config.output_dir)
        with writing(folder):
            _prepare_folder(folder, config, values, plan, facts)
    config.processes.barrier()


def _prepare_folder(
    folder: Path, config: StageConfig, values: Mapping[str, Any], plan: Plan, facts: Mapping[str, Any]
) -> None:
    owned = owned_folder(folder)
    has_run = holds_run(owned)
    if config.overwrite and has_run:
        described = describe_outputs(folder)
        if aside := owned.move_aside(keep=PENDING_REPORTS):
            logger.warning("%s holds %s; moved to %s until the first step has succeeded", folder, described, aside)
    if has_run:
        place_reports(folder)
    drop_incomplete(folder, config.verify)
    owned = owned_folder(folder)
    if plan.checkpoint is not None:
        owned.delete(FINISHED)  # a run that continues is not finished
    claim_outputs(owned)
    cut_metrics(folder, steps_of(plan.checkpoint) if plan.checkpoint else None)
    owned.note(**facts)
    saved = {
        name: value for name, value in values.items() if name not in ("overwrite", "verify", "resume_from_checkpoint")
    }
    write_recipe(folder, saved, plan.applied, steps_of(plan.checkpoint) if plan.checkpoint else 0)


def restore_replaced(config: StageConfig) -> None:
    """Move back the run that was to be replaced, unless the new run has made a step."""
    if config.processes.is_first:
        with writing(config.output_dir):
            is_restored = owned_folder(config.output_dir).restore()
        if is_restored:
            logger.warning("%s has been restored to its previous state", config.output_dir)


class ReplacedRun(TrainerCallback):
    """Deletes the replaced run after the first step of the new one has succeeded."""

    def __init__(self) -> None:
        self._is_deleted = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self._is_deleted and state.is_world_process_zero:
            assert args.output_dir is not None
            with writing(args.output_dir):
                owned_folder(args.output_dir).finish_replacing()
        self._is_deleted = True


def check_inputs(plan: Plan, config: StageConfig, facts: Mapping[str, Any]) -> None:
    """Compare the inputs of a resumed run with those at its start, and log the differences.

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
