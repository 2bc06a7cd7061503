"""Reinforcement, from a recipe to a model: `python -m llava_ext.training.reinforcement.train --recipe reinforce`."""

from evotok_plugin.common import command_line

if __name__ == "__main__":
    command_line.exit_without("train")

import hashlib
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from evotok_plugin.errors import UserError
from evotok_plugin.model_folder import model_type_of
from llava_ext.configuration_evotok_llava import EvoTokLlavaConfig
from llava_ext.data.prompt_files import Prompt, read_prompts
from llava_ext.rewards import WeightedRewards, load_rewards
from llava_ext.training.build_model import make_trainable
from llava_ext.training.deepspeed_config import zero_stage
from llava_ext.training.parameter_groups import plain_model
from llava_ext.training.reinforcement.config import READING, ReinforceConfig
from llava_ext.training.reinforcement.trainer import ReinforceTrainer, Task, frozen_copy
from llava_ext.training.settings import stage_values
from llava_ext.training.train import (
    Stage,
    data_facts,
    log_model,
    model_facts,
    open_data,
    open_model,
    run_command,
    trainer_arguments,
)

logger = logging.getLogger("llava_ext")


def main(argv: list[str] | None = None) -> int:
    """Run the stage; exit codes as those of the other stages."""
    return run_command(REINFORCEMENT, argv)


def read_values(recipe: str, overrides: dict[str, Any], notify: Callable[[str], None]) -> dict[str, Any]:
    """The settings of a run by name, see `settings.stage_values`.

    Prompts of the command line also replace the held-out prompts and the replayed samples of the embedded default.

    Raises:
        UserError: as `settings.stage_values`.
    """
    values = stage_values(recipe, overrides, notify, ReinforceConfig)
    if "prompts" in overrides:
        for name in ("heldout_prompts", "data_path"):
            if name not in overrides and any("{workspace}" in path for path in values.get(name, [])):
                notify(f"--prompts also replaces the recipe's {name}; pass --{name} to set it")
                del values[name]
    return values


def check(config: ReinforceConfig) -> None:
    """Check a prepared config, before anything is loaded.

    Raises:
        UserError: the model cannot draw, partitioned weights, or prompts that do not divide among the processes.
    """
    if zero_stage(config) == 3:
        raise UserError("reinforcement draws with the whole model on every process; pass --deepspeed zero2, not zero3")
    source = config.model_name_or_path
    if os.path.isdir(source) and model_type_of(source) != EvoTokLlavaConfig.model_type:
        raise UserError(
            f"{source!r} holds a {model_type_of(source) or 'nameless'} model, which does not draw yet; reinforcement "
            "continues from the output folder of scripts/finetune.sh"
        )
    if config.prompts_per_step % config.world_size:
        raise UserError(
            f"prompts_per_step {config.prompts_per_step} must be a multiple of the number of processes, "
            f"{config.world_size}"
        )


def prompts_fingerprint(prompts: list[Prompt]) -> str:
    """Identity of prompts: their number and a digest."""
    digest = hashlib.sha256(repr([(prompt.text, prompt.tag) for prompt in prompts]).encode())
    return f"{len(prompts)} prompts, digest {digest.hexdigest()[:16]}"


def prepare(config: ReinforceConfig, values: dict[str, Any]) -> tuple[ReinforceTrainer, dict[str, Any]]:
    """The trainer and the facts that identify its inputs, as in `train.prepare_training`; `prompts` is one of them."""
    prompts = read_prompts(config.prompts)
    heldout = read_prompts(config.heldout_prompts) if config.heldout_prompts else []
    rewards, second_judge = load_rewards(config.rewards), None
    if config.second_judge not in (None, READING):
        second_judge = load_rewards(config.second_judge)
    model, processor = open_model(config, values)
    facts = {"prompts": prompts_fingerprint(prompts), **model_facts(config, model)}
    dataset = open_data(config, model, processor) if config.replays else None
    if dataset is not None:
        facts |= data_facts(dataset)
    trained = make_trainable(model, config)
    log_model(trained, config, dataset)
    reference = frozen_copy(plain_model(trained))
    if config.second_judge == READING:
        from llava_ext.generation.reading_score import ReadingJudge

        second_judge = WeightedRewards({READING: ReadingJudge(reference, processor)}, {READING: 1.0})
    task = Task(prompts, heldout, rewards, second_judge)
    arguments = trainer_arguments(config, processor, dataset)
    return ReinforceTrainer(trained, config, task=task, reference=reference, **arguments), facts


REINFORCEMENT = Stage(
    description="Reinforcement, from a trained model and prompts to a model folder.",
    example="python -m llava_ext.training.reinforcement.train --recipe reinforce --max_steps 10",
    schema=ReinforceConfig,
    read_values=read_values,
    check=check,
    prepare=prepare,
)

if __name__ == "__main__":
    sys.exit(main())
