"""One training stage, from a recipe to a model folder: `python -m llava_ext.training.train --recipe pretrain`."""

from evotok_plugin.common import command_line

if __name__ == "__main__":
    command_line.exit_without("train")

import argparse
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import set_seed

from evotok_plugin.common.command_parser import CommandParser, examples_of
from evotok_plugin.common.files import check_output_folder
from evotok_plugin.common.folders import scratch_folder
from evotok_plugin.common.interruption import check_stopped, stop_on_signals
from evotok_plugin.common.recipes import flags_of, recipe_help, reject_unknown_flags
from evotok_plugin.common.run_lock import only_run
from evotok_plugin.data.files import local_path
from evotok_plugin.errors import UserError
from evotok_plugin.model_folder import model_type_of
from llava_ext.configuration_evotok_llava import EvoTokLlavaConfig, check_length
from llava_ext.data.collators import Collator, PackedCollator
from llava_ext.data.dataset import ConversationDataset
from llava_ext.data.packing import PackedDataset
from llava_ext.data.record_table import RecordTable
from llava_ext.generation.options import DrawingOptions, read_settings, store_settings
from llava_ext.model_folder import base_fingerprints
from llava_ext.modeling_evotok_llava import EvoTokLlavaForConditionalGeneration
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor
from llava_ext.training.adapters import describe_base, merge
from llava_ext.training.build_data import build_dataset, build_heldout
from llava_ext.training.build_model import build_model, check_tower, make_trainable, training_method
from llava_ext.training.checkpoints import (
    RunShape,
    check_checkpoints,
    checkpoint_folder,
    mark_finished,
    owned_folder,
    publish,
    steps_of,
)
from llava_ext.training.config import StageConfig, check_reporting, check_required
from llava_ext.training.deepspeed_config import unpartitioned_models, zero_stage
from llava_ext.training.flag_groups import add_stage_flags
from llava_ext.training.head_settings import check_given_head_settings
from llava_ext.training.launch import prepare_processes
from llava_ext.training.output_folder import (
    ReplacedRun,
    check_inputs,
    plan_output,
    prepare_output,
    restore_replaced,
)
from llava_ext.training.parameter_groups import (
    group_of,
    learning_rates,
    numel_of,
    plain_model,
)
from llava_ext.training.resume_rules import image_fingerprints, records_fingerprint
from llava_ext.training.run_length import describe_recipe
from llava_ext.training.sample_counts import check_groups_have_samples, counts_in_words, samples_of_groups
from llava_ext.training.settings import stage_values
from llava_ext.training.stage_flags import translate_flags
from llava_ext.training.trainer import EvoTokTrainer

logger = logging.getLogger("llava_ext")


@dataclass(frozen=True)
class Stage:
    """A kind of training stage.

    Attributes:
        description: of its command.
        example: a call of its command.
        schema: its settings.
        read_values: reads a recipe and overrides like `settings.stage_values`.
        check: checks a config for which `launch.prepare_processes` has been called, before anything is loaded.
        prepare: makes its trainer like `prepare_training`.
    """

    description: str
    example: str
    schema: type[StageConfig]
    read_values: Callable[[str, dict[str, Any], Callable[[str], None]], dict[str, Any]]
    check: Callable[[Any], None]
    prepare: Callable[[Any, dict[str, Any]], tuple[EvoTokTrainer, dict[str, Any]]]


def main(argv: list[str] | None = None) -> int:
    """Run a stage; the exit code is 2 for a user error, 128 + the number of a signal that stopped it."""
    return run_command(SUPERVISED, argv)


def run_command(stage: Stage, argv: list[str] | None = None) -> int:
    """Run the command of a kind of stage; returns its exit code, see `main`."""

    def work(arguments: argparse.Namespace) -> None:
        _run(stage, arguments)

    return command_line.run(_parser(stage), argv, work, translate=lambda argv: _translate(stage, argv))


def parse(argv: list[str]) -> tuple[str, dict[str, Any]]:
    """The recipe and the overrides of a command line, with LLaVA's flags translated.

    Raises:
        UserError: an unknown flag, or a flag of LLaVA that is not supported.
    """
    parser = _parser(SUPERVISED)
    arguments, rest = parser.parse_known_args(_translate(SUPERVISED, argv))
    reject_unknown_flags(rest, flags_of(parser))
    return _recipe_and_overrides(SUPERVISED, arguments)


def _parser(stage: Stage) -> argparse.ArgumentParser:
    # --debug is a field of TrainingArguments that a stage does not support; on the command line it shows tracebacks.
    parser = CommandParser(
        usage="%(prog)s --recipe RECIPE [--FLAG VALUE ...]",
        description=stage.description,
        epilog=examples_of(stage.example),
        allow_abbrev=False,
        conflict_handler="resolve",
    )
    parser.add_argument("--recipe", required=True, help=recipe_help("llava_ext"))
    add_stage_flags(parser, stage.schema)
    return parser


def _translate(stage: Stage, argv: Sequence[str]) -> list[str]:
    return translate_flags(argv, print_on_first_process, stage.schema)


def _recipe_and_overrides(stage: Stage, arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    given = vars(arguments)
    names = {field.name for field in fields(stage.schema)} - {"debug"}
    return arguments.recipe, {name: value for name, value in given.items() if name in names}


def _run(stage: Stage, arguments: argparse.Namespace) -> None:
    try:
        run_stage(*_recipe_and_overrides(stage, arguments), stage)
    except UserError as error:
        raise UserError(_message_of(error)) from error


def _message_of(error: UserError) -> str:
    """The message of an error; an error in a data-loading process arrives as a traceback, its message last."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if "worker process" not in lines[0]:
        return " ".join(lines)
    name, _, message = lines[-1].partition(": ")
    return message if name.endswith(type(error).__name__) else lines[-1]


def print_on_first_process(line: str) -> None:
    """Print a line to stderr on the first process, before logging is configured."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


@stop_on_signals()
def run_stage(recipe: str, overrides: dict[str, Any], stage: Stage | None = None) -> None:
    """Run a stage: settings, model, data, training, model folder.

    Args:
        overrides: settings that take precedence over the recipe.
        stage: the kind of stage; by default supervised training.

    Raises:
        UserError: wrong settings, files or data, or a loss that is NaN or infinite; saved checkpoints are kept.
        SystemExit: a signal stopped the run; its last step is saved.
        Stopped: a signal arrived before the first step or after the last one.
    """
    started = time.monotonic()
    stage = stage or SUPERVISED
    values = stage.read_values(recipe, overrides, print_on_first_process)
    check_reporting(values)
    config = stage.schema(**values)
    check_required(config)
    prepare_processes(config)
    configure_logging(config)
    check_data_paths(config)
    stage.check(config)
    check_length(config.model_name_or_path, config.model_max_length)
    check_output_folder(config.output_dir, "--output_dir")
    with only_run(config.output_dir, config.processes):
        _run_in_folder(config, recipe, values, stage, started)


def _run_in_folder(config: StageConfig, recipe: str, values: dict[str, Any], stage: Stage, started: float) -> None:
    plan = plan_output(config, values, RunShape(config.world_size, zero_stage(config), training_method(config)))
    if plan.finished_steps:
        logger.info(
            "%s holds a finished run (%s steps); pass --overwrite true to train again",
            config.output_dir,
            plan.finished_steps,
        )
        for change in plan.applied:
            logger.info("  %s (no effect on a finished run)", change)
        return
    trainer, facts = stage.prepare(config, values)
    check_stopped()
    check_inputs(plan, config, facts)
    num_steps, checkpoint = total_steps(trainer), plan.checkpoint
    check_checkpoints(config.output_dir, num_steps)
    logger.info("  %s", trainer.describe_length(num_steps))
    logger.info("  %s", describe_recipe(recipe, config))
    prepare_output(config, values, plan, facts)
    trainer.add_callback(ReplacedRun())
    try:
        check_stopped()
        if checkpoint is None or steps_of(checkpoint) < num_steps:
            checkpoint = train(trainer, config, checkpoint)
    except BaseException:
        restore_replaced(config)
        raise
    if config.processes.is_first:
        write_model(checkpoint, config)
        steps, seconds = steps_of(checkpoint), round(time.monotonic() - started, 1)
        mark_finished(config.output_dir, {"steps": steps, "seconds": seconds})
        logger.info("finished %d steps in %.0f s", steps, seconds)


def prepare_training(config: StageConfig, values: dict[str, Any]) -> tuple[EvoTokTrainer, dict[str, Any]]:
    """The trainer with model and data, and the facts that identify its inputs.

    The facts are `data` and `images` (fingerprints of records and images), `tower` (fingerprint of the tokenizer), and
    `weights` and `sha256` of the model that training starts from, if it is a folder.
    """
    model, processor = open_model(config, values)
    dataset = open_data(config, model, processor)
    facts = {**data_facts(dataset), **model_facts(config, model)}
    heldout = build_heldout(config, model, processor) if config.eval_data else None
    trained = make_trainable(model, config)
    log_model(trained, config, dataset)
    arguments = trainer_arguments(config, processor, dataset)
    return EvoTokTrainer(trained, config, heldout=heldout, **arguments), facts


def open_model(
    config: StageConfig, values: dict[str, Any]
) -> tuple[EvoTokLlavaForConditionalGeneration, EvoTokLlavaProcessor]:
    """The model that a stage starts from, with the drawing settings of the stage, and its processor."""
    set_seed(config.seed)
    model, processor = build_model(config)
    source = config.model_name_or_path
    if os.path.isdir(source) and model_type_of(source) == EvoTokLlavaConfig.model_type:
        check_given_head_settings(values, model.config, source)
        check_tower(config, model)
    model.config.check_length(config.model_max_length)
    model.config.check_processor(processor)
    store_settings(model.generation_config, read_settings(config.image_generation or {}))
    DrawingOptions().for_model(model)  # checks the number of values of settings per level
    return model, processor


def open_data(
    config: StageConfig, model: EvoTokLlavaForConditionalGeneration, processor: EvoTokLlavaProcessor
) -> ConversationDataset:
    """The samples of `data_path`, which every parameter group that trains can learn from."""
    dataset = build_dataset(config, model, processor)
    check_groups_have_samples(model, config, dataset)
    return dataset


def data_facts(dataset: ConversationDataset) -> dict[str, Any]:
    """Facts that identify the records and the images of a run."""
    assert isinstance(dataset.records, RecordTable)
    return {
        "data": records_fingerprint(dataset.records, dataset.kinds, dataset.lengths),
        "images": image_fingerprints(dataset.records),
    }


def model_facts(config: StageConfig, model: EvoTokLlavaForConditionalGeneration) -> dict[str, Any]:
    """Facts that identify the model that a run starts from."""
    facts: dict[str, Any] = {"tower": model.vision_tower.fingerprint()}
    fingerprints = base_fingerprints(config.model_name_or_path)
    if fingerprints["sha256"] is not None:
        facts |= {"weights": fingerprints["fingerprint"], "sha256": fingerprints["sha256"]}
    return facts


def trainer_arguments(
    config: StageConfig, processor: EvoTokLlavaProcessor, dataset: ConversationDataset | None
) -> dict[str, Any]:
    """Arguments of `EvoTokTrainer` next to the model and the config."""
    base = describe_base(config, base_fingerprints(config.model_name_or_path)) if config.lora_enable else None
    return {
        "train_dataset": PackedDataset(dataset) if dataset is not None and config.packing else dataset,
        "data_collator": (PackedCollator if config.packing else Collator)(processor),
        "processing_class": processor,
        "shape": RunShape(config.world_size, zero_stage(config), training_method(config)),
        "base": base,
    }


def check_data_paths(config: StageConfig) -> None:
    """Check that the entries of `data_path` exist, before a model is loaded.

    Raises:
        UserError: an entry does not exist.
    """
    for path in [*config.data_path, *(config.eval_data or [])]:
        if not path.startswith("hf:") and not set("*?[{") & set(path) and not os.path.exists(local_path(path)):
            raise UserError(
                f"data file {path} does not exist; expected .json, .jsonl, .parquet, .tar or hf:NAME (--data_path)"
            )


def total_steps(trainer: EvoTokTrainer) -> int:
    """The number of optimizer steps of the run, as Trainer counts them.

    Trainer itself is not started for a run that has made all of them, because it would add a step.
    """
    config = trainer.args
    if config.max_steps > 0:
        return config.max_steps
    steps_per_epoch = math.ceil(len(trainer.get_train_dataloader()) / config.gradient_accumulation_steps)
    return math.ceil(config.num_train_epochs * max(1, steps_per_epoch))


def train(trainer: EvoTokTrainer, config: StageConfig, checkpoint: Path | None) -> Path:
    """Train from a checkpoint or from the start; returns the checkpoint of the last step.

    Raises:
        UserError: data or disk errors, or a loss that is NaN or infinite.
        SystemExit: a signal stopped the run; its last step is saved.
    """
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    check_engine(trainer, config)
    last = checkpoint_folder(config.output_dir, trainer.state.global_step)
    if trainer.interruption.signal:
        logger.info("stopped at step %d, saved as %s; run the same command to resume", trainer.state.global_step, last)
        raise SystemExit(128 + trainer.interruption.signal)
    return last


def write_model(checkpoint: Path, config: StageConfig) -> None:
    """Write the model of a checkpoint to the output folder; with LoRA, the adapter and the merged model."""
    output_dir = Path(config.output_dir)
    if not config.lora_enable:
        publish(checkpoint, output_dir)
        logger.info("the model is in %s", output_dir)
        return
    adapter = output_dir / "adapter"
    publish(checkpoint, adapter, owned_folder(output_dir))
    if config.bits == 4:
        tower = f" --vision_tower {config.vision_tower}" if config.vision_tower else ""
        base = config.model_name_or_path
        logger.info(
            "the adapter is in %s; merge it into a model: evotok-llava merge %s %s%s -o FOLDER",
            adapter,
            base,
            adapter,
            tower,
        )
        return
    with scratch_folder(output_dir / "merged") as scratch:
        with unpartitioned_models(config):
            merge(config.model_name_or_path, adapter, scratch / "model", config.vision_tower)
        publish(scratch / "model", output_dir)
    logger.info("the adapter is in %s, the merged model in %s", adapter, output_dir)


def configure_logging(config: StageConfig) -> None:
    """Log progress on the first process, and only warnings on the others."""
    logger.setLevel(logging.INFO if config.processes.is_first else logging.WARNING)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def log_model(
    model: EvoTokLlavaForConditionalGeneration | PeftModel, config: StageConfig, dataset: ConversationDataset | None
) -> None:
    """Log what trains, at which learning rate and on how many samples, and what will be saved."""
    tower = sum(parameter.numel() for parameter in plain_model(model).vision_tower.parameters())
    logger.info("  %-16s %10.2f M parameters  frozen", "vision_tower", tower / 1e6)
    samples = {} if dataset is None else samples_of_groups(dataset)
    for group, rate in learning_rates(config).items():
        members = [parameter for name, parameter in model.named_parameters() if group_of(name) == group]
        if not members:
            continue
        total = sum(map(numel_of, members))
        trained = sum(numel_of(parameter) for parameter in members if parameter.requires_grad)
        count = f", {samples[group]} samples" if samples else ""
        state = f"learning rate {rate:g}{count}" if trained else "frozen"
        if 0 < trained < total:
            state += f", {trained / 1e6:.2f} M of them"
        logger.info("  %-16s %10.2f M parameters  %s", group, total / 1e6, state)
    if dataset is not None:
        logger.info("  %d samples (%s); %d process(es)", len(dataset), counts_in_words(dataset), config.world_size)
    saved = {
        "full": "the whole model",
        "lora": "adapters and other trained modules; at the end also the merged model",
        "qlora": f"adapters and other trained modules, without the 4-bit backbone ({config.quant_type})",
    }[training_method(config)]
    logger.info("  saved in %s: %s", config.output_dir, saved)


def check_engine(trainer: EvoTokTrainer, config: StageConfig) -> None:
    """Check that DeepSpeed has trained the model, if the settings ask for it.

    Raises:
        UserError: another engine has.
    """
    if config.deepspeed:
        engine: Any = trainer.model_wrapped
        kind = type(engine).__name__
        if kind != "DeepSpeedEngine":
            raise UserError(f"DeepSpeed was asked for but the engine is {kind}; check the launcher")
        logger.info("engine: %s, ZeRO stage %d", kind, engine.zero_optimization_stage())


SUPERVISED = Stage(
    description="One training stage, from a recipe to a model folder.",
    example="python -m llava_ext.training.train --recipe pretrain --max_steps 10",
    schema=StageConfig,
    read_values=stage_values,
    check=lambda config: None,
    prepare=prepare_training,
)

if __name__ == "__main__":
    sys.exit(main())
