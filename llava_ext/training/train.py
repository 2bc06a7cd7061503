"""One training stage, from a recipe to a model folder: `python -m llava_ext.training.train --recipe pretrain`."""

import argparse
import logging
import math
import os
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import is_flash_attn_2_available

from evotok_plugin.common.folders import scratch_folder
from evotok_plugin.common.recipes import add_arguments, flags_of, reject_unknown_flags
from evotok_plugin.data.files import local_path
from evotok_plugin.errors import UserError
from evotok_plugin.model_folder import model_type_of, open_config
from evotok_plugin.tokenizer_folder import open_tokenizer
from llava_ext.assembly import assemble
from llava_ext.configuration_evotok_llava import EvoTokLlavaConfig, check_length
from llava_ext.data.collators import Collator, PackedCollator
from llava_ext.data.dataset import ConversationDataset
from llava_ext.data.packing import PackedDataset
from llava_ext.generation.options import DrawingOptions, read_settings, store_settings
from llava_ext.model_folder import base_fingerprints, load_model, read_tower, set_tower_aside
from llava_ext.modeling_evotok_llava import EvoTokLlavaForConditionalGeneration
from llava_ext.new_tokens import add_new_token_rows
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor
from llava_ext.training.adapters import add_lora, describe_base, merge, quantization_for
from llava_ext.training.build_data import build_dataset
from llava_ext.training.checkpoints import (
    RunShape,
    check_checkpoints,
    checkpoint_folder,
    mark_finished,
    owned_folder,
    publish,
    steps_of,
)
from llava_ext.training.config import StageConfig, check_head, check_reporting, new_head_settings
from llava_ext.training.llava_flags import translate
from llava_ext.training.output import ReplacedRun, begin, check_inputs, plan_output, restore_replaced
from llava_ext.training.parameter_groups import choose_trainable, freezes_tables, learning_rates, part_of, size_of
from llava_ext.training.samples import check_parts_have_samples, counts_in_words, samples_of_parts
from llava_ext.training.settings import check_new_parts, contents_of, inputs_of, stage_values
from llava_ext.training.trainer import EvoTokTrainer
from llava_ext.training.zero import whole_models, zero_stage

logger = logging.getLogger("llava_ext")


def main(argv: list[str] | None = None) -> int:
    """Run a stage; user errors end as one line and exit code 2."""
    try:
        recipe, overrides = parse(sys.argv[1:] if argv is None else argv)
        run_stage(recipe, overrides)
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"error: {cause_of(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def parse(argv: list[str]) -> tuple[str, dict]:
    """Recipe and overrides of a command line, LLaVA's flags translated.

    Raises:
        UserError: an unknown flag, or one of LLaVA's that is not supported.
    """
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--recipe", required=True, help="YAML file, or the name of a recipe of the project")
    add_arguments(parser, StageConfig)
    arguments, rest = parser.parse_known_args(translate(argv, say))
    reject_unknown_flags(rest, flags_of(parser))
    overrides = vars(arguments)
    return overrides.pop("recipe"), overrides


def say(line: str) -> None:
    """Print a line on the first process, before logging is configured."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def cause_of(error: Exception) -> str:
    """One line; of an error in a data-loading process, which comes with a traceback, its last."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].removeprefix(f"{type(error).__name__}: ") if "worker process" in lines[0] else " ".join(lines)


def run_stage(recipe: str, overrides: dict) -> None:
    """Recipe -> model, data, what trains -> Trainer -> model folder.

    Raises:
        ValueError, FloatingPointError: the user's input, or a loss that is NaN or infinite; what is saved stays.
        SystemExit: the run was asked to stop; its last step is saved.
    """
    started = time.monotonic()
    values = stage_values(recipe, overrides, say)
    check_reporting(values)
    config = StageConfig(**values)
    configure_logging(config)
    check_data_paths(config)
    check_length(config.model_name_or_path, config.model_max_length)
    plan = plan_output(config, values, RunShape(config.world_size, zero_stage(config), method_of(config)))
    if plan.finished_steps:
        logger.info(
            "%s holds a finished run (%s steps); pass --overwrite true to train again",
            config.output_dir,
            plan.finished_steps,
        )
        for change in plan.applied:
            logger.info("  %s (without effect on a finished run)", change)
        return
    trainer, facts = prepare_training(config, values)
    check_inputs(plan, config, facts)
    num_steps, checkpoint = total_steps(trainer), plan.checkpoint
    check_checkpoints(config.output_dir, num_steps)
    describe_length(trainer, num_steps)
    begin(config, values, plan, facts)
    trainer.add_callback(ReplacedRun())
    try:
        if checkpoint is None or steps_of(checkpoint) < num_steps:
            checkpoint = train(trainer, config, checkpoint)
    except BaseException:
        restore_replaced(config)
        raise
    if config.process_index == 0:
        write_model(checkpoint, config)
        steps, seconds = steps_of(checkpoint), round(time.monotonic() - started, 1)
        mark_finished(config.output_dir, {"steps": steps, "seconds": seconds})
        logger.info("finished %d steps in %.0f s", steps, seconds)


def prepare_training(config: StageConfig, values: dict) -> tuple[EvoTokTrainer, dict[str, Any]]:
    """The trainer with model and data, and the facts that identify its inputs."""
    transformers.set_seed(config.seed)
    model, processor = build_model(config)
    source = config.model_name_or_path
    if os.path.isdir(source) and model_type_of(source) == EvoTokLlavaConfig.model_type:
        check_new_parts(values, model.config, source)
        check_tower(config, model)
    model.config.check_length(config.model_max_length)
    model.config.check_processor(processor)
    store_settings(model.generation_config, read_settings(config.image_generation or {}))
    DrawingOptions().for_model(model)  # values one a level must be as many as the model's levels
    dataset = build_dataset(config, model, processor)
    check_parts_have_samples(model, config, dataset)
    facts = {
        "data": inputs_of(dataset.records, dataset.kinds, dataset.lengths),
        "images": contents_of(dataset.records),
        "tower": model.vision_tower.fingerprint(),
    }
    fingerprints = base_fingerprints(source)
    if fingerprints["sha256"] is not None:
        facts |= {"weights": fingerprints["fingerprint"], "sha256": fingerprints["sha256"]}
    model = ready_to_train(model, config)
    describe(model, config, dataset)
    trainer = EvoTokTrainer(
        model=model,
        args=config,
        train_dataset=PackedDataset(dataset) if config.packing else dataset,
        data_collator=(PackedCollator if config.packing else Collator)(processor),
        processing_class=processor,
        shape=RunShape(config.world_size, zero_stage(config), method_of(config)),
        base=describe_base(config, fingerprints) if config.lora_enable else None,
    )
    return trainer, facts


def check_data_paths(config: StageConfig) -> None:
    """Check that the entries of `data_path` exist, before a model is loaded.

    Raises:
        UserError: one does not.
    """
    for path in config.data_path:
        if not path.startswith("hf:") and not set("*?[{") & set(path) and not os.path.exists(local_path(path)):
            raise UserError(
                f"data file {path} does not exist; expected .json, .jsonl, .parquet, .tar or hf:NAME (--data_path)"
            )


def check_tower(config: StageConfig, model: EvoTokLlavaForConditionalGeneration) -> None:
    """Refuse another tokenizer than the one that a model has.

    Raises:
        UserError: `vision_tower` is set and has other weights.
    """
    if not config.vision_tower:
        return
    with whole_models(config):
        tower, _ = open_tokenizer(config.vision_tower, "cpu")
    if tower.fingerprint() != model.vision_tower.fingerprint():
        raise UserError(
            f"{config.model_name_or_path!r} has a tokenizer of its own, and --vision_tower {config.vision_tower} has "
            "other weights; leave --vision_tower out, or start from a causal LM"
        )


def ready_to_train(model: EvoTokLlavaForConditionalGeneration, config: StageConfig) -> torch.nn.Module:
    """The model without the tokenizer among its modules, with adapters where there are to be some, the right parts
    free."""
    set_tower_aside(model)
    if freezes_tables(config):
        add_new_token_rows(model)
    trained = add_lora(model, config) if config.lora_enable else model
    choose_trainable(trained, config)
    return trained


def method_of(config: StageConfig) -> str:
    """How the backbone is trained: full, lora or qlora."""
    return ("qlora" if config.bits == 4 else "lora") if config.lora_enable else "full"


def total_steps(trainer: EvoTokTrainer) -> int:
    """Optimizer steps of the whole run, as Trainer counts them; it would add one to a run that has all of them."""
    config = trainer.args
    if config.max_steps > 0:
        return config.max_steps
    steps_an_epoch = math.ceil(len(trainer.get_train_dataloader()) / config.gradient_accumulation_steps)
    return math.ceil(config.num_train_epochs * max(1, steps_an_epoch))


def describe_length(trainer: EvoTokTrainer, num_steps: int) -> None:
    """Log steps, epochs and the global batch size."""
    config = trainer.args
    parts = (config.per_device_train_batch_size, config.gradient_accumulation_steps, config.world_size)
    batches = max(1, len(trainer.get_train_dataloader()))
    logger.info(
        "  %d steps (%.2f epochs) of %d samples (%d a device x %d accumulated x %d processes)",
        num_steps,
        num_steps * config.gradient_accumulation_steps / batches,
        math.prod(parts),
        *parts,
    )


def train(trainer: EvoTokTrainer, config: StageConfig, checkpoint: Path | None) -> Path:
    """Train from a checkpoint or from the start; the checkpoint of the last step."""
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    check_engine(trainer, config)
    last = checkpoint_folder(config.output_dir, trainer.state.global_step)
    if trainer.interruption.signal:
        logger.info("stopped at step %d, saved as %s; run the same command to resume", trainer.state.global_step, last)
        raise SystemExit(128 + trainer.interruption.signal)
    return last


def write_model(checkpoint: Path, config: StageConfig) -> None:
    """Put the model of a checkpoint into the output folder; LoRA also folds its adapters into the backbone."""
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
            "the adapter is in %s; a whole model: evotok-llava merge %s %s%s -o FOLDER", adapter, base, adapter, tower
        )
        return
    with scratch_folder(output_dir / "merged") as scratch:
        with whole_models(config):
            merge(config.model_name_or_path, adapter, scratch / "model", config.vision_tower)
        publish(scratch / "model", output_dir)
    logger.info("the adapter is in %s, the model with it folded in in %s", adapter, output_dir)


def configure_logging(config: StageConfig) -> None:
    """Rank 0 says what happens, the others only what goes wrong."""
    level = logging.INFO if config.process_index == 0 else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger.setLevel(level)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed and peft call what their libraries are about to rename, once a step and process.
    warnings.filterwarnings("ignore", category=FutureWarning)


def attention_for(config: StageConfig) -> str:
    """flash-attention 2 where it is importable and the device is CUDA, else PyTorch's SDPA."""
    if config.attn_implementation != "auto":
        return config.attn_implementation
    flash = is_flash_attn_2_available() and config.device.type == "cuda" and (config.bf16 or config.fp16)
    return "flash_attention_2" if flash else "sdpa"


def build_model(config: StageConfig) -> tuple[EvoTokLlavaForConditionalGeneration, EvoTokLlavaProcessor]:
    """Go on from an EvoTok-LLaVA folder, or put one together from a causal LM and a tokenizer."""
    attention = attention_for(config)
    dtype = torch.bfloat16 if config.bf16 and config.device.type == "cuda" else torch.float32
    logger.info("attention: %s; weights: %s; device: %s", attention, dtype, config.device)
    quantization = quantization_for(config, dtype)
    source = config.model_name_or_path
    if os.path.isdir(source):
        if model_type_of(source) == EvoTokLlavaConfig.model_type:
            check_head(config, open_config(EvoTokLlavaConfig, source))
            model, processor = load_model(source, dtype, attention, quantization)
            if zero_stage(config) == 3:
                with whole_models(config):
                    model.vision_tower = read_tower(source)
            return model, processor
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith(f"{config.workspace}/"):
        raise UserError(
            f"model folder {source!r} does not exist; "
            f"`bash scripts/pretrain.sh --workspace {config.workspace}` makes one, "
            "or name a folder or hub id with --model_name_or_path"
        )
    if not config.vision_tower:
        raise UserError(f"{source!r} is a text model; pass --vision_tower FOLDER, an EvoTok tokenizer, with it")
    with whole_models(config):
        return assemble(
            source,
            config.vision_tower,
            **new_head_settings(config),
            dtype=dtype,
            attn_implementation=attention,
            quantization_config=quantization,
        )


def describe(model: torch.nn.Module, config: StageConfig, dataset: ConversationDataset) -> None:
    """Say what trains, how fast and on what, and what will be saved, before the first step."""
    tower = sum(p.numel() for p in model.vision_tower.parameters())
    logger.info("  %-16s %10.2f M parameters  frozen", "vision_tower", tower / 1e6)
    samples = samples_of_parts(dataset)
    for part, rate in learning_rates(config).items():
        members = [p for name, p in model.named_parameters() if part_of(name) == part]
        if not members:
            continue
        total, trained = (sum(map(size_of, some)) for some in (members, [p for p in members if p.requires_grad]))
        state = f"learning rate {rate:g}, {samples[part]} samples" if trained else "frozen"
        if 0 < trained < total:
            state += f", {trained / 1e6:.2f} M of them"
        logger.info("  %-16s %10.2f M parameters  %s", part, total / 1e6, state)
    logger.info("  %d samples (%s); %d process(es)", len(dataset), counts_in_words(dataset), config.world_size)
    what = {
        "full": "the whole model",
        "lora": "adapters and trained modules; at the end also the model with the adapters folded in",
        "qlora": f"adapters and trained modules, not the backbone in 4 bits ({config.quant_type})",
    }[method_of(config)]
    logger.info("  saved in %s: %s", config.output_dir, what)


def check_engine(trainer: EvoTokTrainer, config: StageConfig) -> None:
    """Fail rather than report a DeepSpeed run that was none."""
    if config.deepspeed:
        kind = type(trainer.model_wrapped).__name__
        if kind != "DeepSpeedEngine":
            raise UserError(f"DeepSpeed was asked for but the engine is {kind}; check the launcher")
        logger.info("engine: %s, ZeRO stage %d", kind, trainer.model_wrapped.zero_optimization_stage())


if __name__ == "__main__":
    sys.exit(main())
