"""One training stage, from a recipe to a model folder: `python -m llava_ext.training.train --recipe pretrain`."""

import argparse
import logging
import os
import re
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
import yaml
from transformers.utils import is_flash_attn_2_available

from evotok_plugin.recipes import add_arguments, recipe_values
from llava_ext.checkpointing import assemble, load_model, model_type_of
from llava_ext.configuration_evotok_llava import EvoTokLlavaConfig
from llava_ext.data.code_cache import CodeCache, note_broken, write_code_cache
from llava_ext.data.dataset import Collator, ConversationDataset
from llava_ext.data.records import BadSamples, image_names, load_records
from llava_ext.modeling_evotok_llava import EvoTokLlavaForConditionalGeneration
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor
from llava_ext.training.checkpoints import find_resumable, finished_facts, mark_finished
from llava_ext.training.config import StageConfig
from llava_ext.training.trainer import EvoTokTrainer

logger = logging.getLogger("llava_ext")


def main(argv: list[str] | None = None) -> int:
    """Run a stage; user errors end as one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", required=True, help="YAML file, or the name of a recipe of the project")
    add_arguments(parser, StageConfig)
    arguments = vars(parser.parse_args(argv))
    try:
        run_stage(arguments.pop("recipe"), arguments)
    except (ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run_stage(recipe: str, overrides: dict) -> None:
    """Recipe -> model, data, what trains -> Trainer -> model folder."""
    started = time.monotonic()
    values = recipe_values(recipe, StageConfig, overrides)
    config = StageConfig(**values)
    configure_logging(config)
    if not config.overwrite and finished_facts(config.output_dir):
        facts = finished_facts(config.output_dir)
        logger.info(
            "%s holds a finished run (%s steps); pass --overwrite true to train again",
            config.output_dir,
            facts["steps"],
        )
        return
    if config.overwrite and config.process_index == 0:
        shutil.rmtree(config.output_dir, ignore_errors=True)
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    checkpoint = find_resumable(config.output_dir, config.world_size)

    model, processor = build_model(config)
    dataset = build_dataset(config, model, processor)
    choose_trainable(model, config)
    describe(model, config, dataset)
    trainer = EvoTokTrainer(
        model=model, args=config, train_dataset=dataset, data_collator=Collator(processor), processing_class=processor
    )
    if checkpoint is not None:
        logger.info("resuming from %s", checkpoint)
    if config.process_index == 0:
        (Path(config.output_dir) / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    check_engine(trainer, config)
    save_final(trainer, model, processor, config)
    if config.process_index == 0:
        seconds = round(time.monotonic() - started, 1)
        mark_finished(config.output_dir, {"steps": trainer.state.global_step, "seconds": seconds})
        logger.info(
            "finished %d steps in %.0f s; the model is in %s", trainer.state.global_step, seconds, config.output_dir
        )


def configure_logging(config: StageConfig) -> None:
    """Rank 0 says what happens, the others only what goes wrong."""
    level = logging.INFO if config.process_index == 0 else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger.setLevel(level)
    transformers.logging.set_verbosity_error()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


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
    source = config.model_name_or_path
    if os.path.isdir(source):
        if model_type_of(source) == EvoTokLlavaConfig.model_type:
            return load_model(source, dtype, attention)
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith(f"{config.workspace}/"):
        raise ValueError(
            f"model folder {source!r} does not exist; "
            f"`bash scripts/pretrain.sh --workspace {config.workspace}` makes one, "
            "or name a folder or hub id with --model_name_or_path"
        )
    if not config.vision_tower:
        raise ValueError(f"{source!r} is a text model; pass --vision_tower FOLDER, an EvoTok tokenizer, with it")
    sizes = (config.head_hidden_size, config.head_num_layers, config.head_num_heads)
    return assemble(source, config.vision_tower, *sizes, dtype=dtype, attn_implementation=attention)


def build_dataset(
    config: StageConfig, model: EvoTokLlavaForConditionalGeneration, processor: EvoTokLlavaProcessor
) -> ConversationDataset:
    """Check the records, encode their images once, and leave out (by name, up to the limit) what is unusable."""
    report = Path(config.output_dir) / "bad_samples.jsonl" if config.process_index == 0 else None
    bad = BadSamples(report, config.max_bad_fraction)
    records = load_records(config.data_path, config.image_folder, bad)
    total = len(records) + len(bad.reasons)
    bad.check(total)
    names, cache = image_names(records), None
    if names:
        cache = open_code_cache(config, names, model, processor)
        note_broken(cache, names, bad)
        bad.check(total)
        records = [record for record in records if all(name in cache for name in record.images)]
    if bad.reasons:
        logger.warning("left out %d of %d samples; see %s", len(bad.reasons), total, report)
    return ConversationDataset(
        records, processor, cache, config.model_max_length, config.prompt_dropout, seed=config.seed
    )


def open_code_cache(
    config: StageConfig, names: list[str], model: EvoTokLlavaForConditionalGeneration, processor: EvoTokLlavaProcessor
) -> CodeCache:
    """The codes of all images, encoded by rank 0 when they are not on disk yet."""
    folder = Path(config.code_cache or Path(config.output_dir) / "code_cache")
    fingerprint = model.vision_tower.fingerprint()

    def usable() -> CodeCache | None:
        if not (folder / "index.json").is_file():
            return None
        cache = CodeCache(folder, fingerprint)
        return cache if cache.covers(names) else None

    cache = usable()
    if cache is None and config.process_index == 0:
        tower = model.vision_tower.eval().to(config.device)
        write_code_cache(
            folder, config.image_folder, names, tower, processor.image_processor,
            show_progress=not config.disable_tqdm,
        )  # fmt: skip
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
    return cache or CodeCache(folder, fingerprint)


def choose_trainable(model: EvoTokLlavaForConditionalGeneration, config: StageConfig) -> None:
    """Freeze everything, then free what this stage trains; the tokenizer never trains here."""
    model.requires_grad_(False)
    model.read_projector.requires_grad_(config.tune_projectors)
    model.write_projector.requires_grad_(config.tune_projectors)
    model.image_head.requires_grad_(config.tune_image_head)
    if config.lora_enable:
        add_lora(model, config)
    elif config.tune_language_model:
        model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)


def add_lora(model: EvoTokLlavaForConditionalGeneration, config: StageConfig) -> None:
    """Put LoRA adapters on all linear layers of the backbone."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, target_modules="all-linear"
    )
    if config.gradient_checkpointing:
        model.enable_input_require_grads()
    model.language_model = get_peft_model(model.language_model, lora)


def describe(model: EvoTokLlavaForConditionalGeneration, config: StageConfig, dataset: ConversationDataset) -> None:
    """Say what trains and on what, before the first step."""
    for name, part in model.named_children():
        total = sum(p.numel() for p in part.parameters())
        trained = sum(p.numel() for p in part.parameters() if p.requires_grad)
        state = "frozen" if not trained else "trains" if trained == total else f"trains {trained / 1e6:.2f} M of them"
        logger.info("  %-16s %8.2f M parameters  %s", name, total / 1e6, state)
    kinds = [record.kind for record in dataset.records]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("read", "draw", "text") if kind in kinds)
    logger.info("  %d samples (%s); %d process(es)", len(dataset), counts, config.world_size)


def check_engine(trainer: EvoTokTrainer, config: StageConfig) -> None:
    """Fail rather than report a DeepSpeed run that was none."""
    if config.deepspeed:
        kind = type(trainer.model_wrapped).__name__
        if kind != "DeepSpeedEngine":
            raise ValueError(f"DeepSpeed was asked for but the engine is {kind}; check the launcher")
        logger.info("engine: %s, ZeRO stage %d", kind, trainer.model_wrapped.zero_optimization_stage())


def save_final(
    trainer: EvoTokTrainer,
    model: EvoTokLlavaForConditionalGeneration,
    processor: EvoTokLlavaProcessor,
    config: StageConfig,
) -> None:
    """Write the self-contained model folder; adapters are folded into the backbone."""
    if config.lora_enable:
        model.language_model = model.language_model.merge_and_unload()
        if config.process_index == 0:
            model.save_pretrained(config.output_dir)
            processor.save_pretrained(config.output_dir)
    else:
        trainer.save_model(config.output_dir)
    if config.process_index == 0:
        trainer.state.save_to_json(str(Path(config.output_dir) / "trainer_state.json"))


if __name__ == "__main__":
    sys.exit(main())
