"""The schema of a training run: Hugging Face's TrainingArguments and what a LLaVA user expects beside them."""

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import integration_utils

from evotok_plugin.errors import UserError
from evotok_plugin.training.reporters import check_reporters
from llava_ext.configuration_evotok_llava import (
    HEAD_SETTINGS,
    IMAGE_HEADS,
    RESIDUAL_EMBEDDINGS,
    EvoTokLlavaConfig,
    check_choice,
)
from llava_ext.generation.options import read_settings

DEEPSPEED_FOLDER = Path(__file__).resolve().parents[1] / "deepspeed"


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(kw_only=True)
class StageConfig(TrainingArguments):
    """One training stage. A recipe names what differs from these defaults, a flag what differs from the recipe.

    `{workspace}` in a path stands for the value of `workspace`.
    """

    workspace: str = field(default="outputs", metadata=_help("folder that `{workspace}` in paths stands for"))
    model_name_or_path: str | None = field(
        default=None, metadata=_help("an EvoTok-LLaVA folder to go on from, or a causal LM to start from")
    )
    vision_tower: str | None = field(
        default=None, metadata=_help("EvoTok tokenizer folder; needed when starting from a causal LM")
    )
    data_path: list[str] | None = field(
        default=None, metadata=_help("what to train on: .json, .jsonl, .parquet, .tar, patterns, folders, hf:NAME")
    )
    data_weights: list[float] | None = field(
        default=None, metadata=_help("share of each entry of data_path; without them every sample comes once an epoch")
    )
    image_folder: str | None = field(default=None, metadata=_help("folder that the records' image paths start from"))
    code_cache: str | None = field(default=None, metadata=_help("folder for the images' codes; made when absent"))
    caption_task: str = field(
        default="both", metadata=_help("what to make of an image with only a caption: read, draw or both")
    )
    max_bad_fraction: float = field(default=0.001, metadata=_help("share of unusable samples that is tolerated"))
    model_max_length: int = field(default=2048, metadata=_help("LLM steps a sample may have; text beyond is cut"))
    prompt_dropout: float = field(default=0.1, metadata=_help("share of drawing samples whose prompt is emptied"))
    tune_projectors: bool = field(default=True, metadata=_help("train both projectors"))
    tune_read_projector: bool | None = field(
        default=None, metadata=_help("train the projector of images that are read; defaults to tune_projectors")
    )
    tune_write_projector: bool | None = field(
        default=None, metadata=_help("train the projector of images that are drawn; defaults to tune_projectors")
    )
    tune_image_head: bool = field(default=True, metadata=_help("train the image head"))
    tune_language_model: bool = field(default=True, metadata=_help("train the text backbone"))
    image_head: str | None = field(
        default=None,
        metadata=_help("of a new model: depth (one LLM step a position, the default) or flat (one a residual token)"),
    )
    residual_embeddings: str | None = field(
        default=None,
        metadata=_help("of a new flat head: tied (rows follow from the codebooks, the default) or free (tables)"),
    )
    head_hidden_size: int = field(default=2560, metadata=_help("width of a new depth transformer"))
    head_num_layers: int = field(default=6, metadata=_help("layers of a new depth transformer"))
    head_num_heads: int = field(default=40, metadata=_help("heads of a new depth transformer"))
    mm_projector_lr: float | None = field(default=None, metadata=_help("learning rate of both projectors"))
    image_head_lr: float | None = field(default=None, metadata=_help("learning rate of the image head"))
    language_model_lr: float | None = field(
        default=None,
        metadata=_help("learning rate of the text backbone or its adapters; each defaults to learning_rate"),
    )
    lora_enable: bool = field(default=False, metadata=_help("train LoRA adapters in place of the backbone"))
    lora_r: int = field(default=64, metadata=_help("LoRA rank"))
    lora_alpha: float = field(default=16.0, metadata=_help("LoRA scale"))
    lora_dropout: float = field(default=0.05, metadata=_help("LoRA dropout"))
    bits: int = field(default=16, metadata=_help("4: QLoRA, adapters on a backbone quantized by bitsandbytes"))
    quant_type: str = field(default="nf4", metadata=_help("4-bit numbers: nf4 or fp4"))
    double_quant: bool = field(default=True, metadata=_help("quantize the scales of 4-bit weights, too"))
    attn_implementation: str = field(
        default="auto", metadata=_help("auto (flash_attention_2 where it can run, else sdpa), or one of transformers'")
    )
    group_by_modality_length: bool = field(default=True, metadata=_help("batches of one kind and alike lengths"))
    packing: bool = field(
        default=False, metadata=_help("several samples in a row of model_max_length steps; a batch counts rows")
    )
    text_loss_weight: float = field(default=1.0, metadata=_help("of the text tokens' mean loss"))
    image_loss_weight: float = field(default=1.0, metadata=_help("of the image positions' mean loss"))
    group_lengths: bool = field(default=True, metadata=_help("false: batches of one kind, of whatever lengths"))
    image_generation: dict | None = field(
        default=None,
        metadata=_help(
            "how the model draws unless told otherwise, e.g. '{guidance_scale: 3.0, top_k: 900}'; by default as the "
            "model that training starts from"
        ),
    )
    warmup_ratio: float | None = field(default=None, metadata=_help("warm-up as a share of all steps"))
    overwrite: bool = field(default=False, metadata=_help("train again although output_dir holds a finished run"))

    remove_unused_columns: bool = False
    logging_steps: float = 10
    save_total_limit: int | None = 2
    report_to: None | str | list[str] = "tensorboard"

    def __post_init__(self) -> None:
        if isinstance(self.data_path, str):
            self.data_path = [self.data_path]
        for name in ("model_name_or_path", "vision_tower", "image_folder", "code_cache", "output_dir"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value.replace("{workspace}", self.workspace))
        self.data_path = [path.replace("{workspace}", self.workspace) for path in self.data_path or []]
        self._check()
        if self.warmup_ratio is not None:
            self.warmup_steps = self.warmup_ratio
        if self.deepspeed == "none":
            self.deepspeed = None
        if isinstance(self.deepspeed, str):
            self.deepspeed = str(find_deepspeed_config(self.deepspeed))
        _prepare_processes(self)
        os.environ["TENSORBOARD_LOGGING_DIR"] = os.path.join(self.output_dir, "tensorboard")
        super().__post_init__()
        if self.n_gpu > 1:
            raise UserError(
                f"{self.n_gpu} GPUs are visible to one process, which cannot split a batch over them; start a process "
                "for each with NPROC=N or torchrun, or choose one with CUDA_VISIBLE_DEVICES=0"
            )
        if self.deepspeed and self.use_cpu:
            import deepspeed

            # ZeRO-3 partitions while the model loads and asks deepspeed.comm for the number of ranks.
            deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
        gathers = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
        if self.deepspeed and self.hf_deepspeed_config.is_zero3() and not self.hf_deepspeed_config.is_true(gathers):
            raise UserError(
                f"{self.deepspeed}: without {gathers.split('.')[1]} no weights are saved that could be "
                "opened; set it to true"
            )
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if self.world_size != launched:
            raise UserError(
                f"the launcher started {launched} processes but training sees {self.world_size}; "
                "start it with scripts/*.sh and NPROC, or with torchrun"
            )

    def _check(self) -> None:
        for name in ("model_name_or_path", "output_dir"):
            if not getattr(self, name):
                raise UserError(f"{name} is not set; pass --{name} or put it into the recipe")
        if not self.data_path:
            raise UserError("data_path is not set; pass --data_path FILE.json or put it into the recipe")
        for name in ("text_loss_weight", "image_loss_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be below 0, got {getattr(self, name)}")
        if not (self.text_loss_weight or self.image_loss_weight):
            raise UserError("text_loss_weight and image_loss_weight are both 0: there is no loss; raise one of them")
        if self.image_generation is not None:
            read_settings(self.image_generation)
        if self.image_head is not None:
            check_choice("image_head", self.image_head, IMAGE_HEADS)
        if self.residual_embeddings is not None:
            check_choice("residual_embeddings", self.residual_embeddings, RESIDUAL_EMBEDDINGS)
        if not 0 <= self.prompt_dropout < 1:
            raise UserError(f"prompt_dropout must lie in [0, 1), got {self.prompt_dropout}")
        projectors = self.tune_projectors or self.tune_read_projector or self.tune_write_projector
        if not (projectors or self.tune_image_head or self.tune_language_model or self.lora_enable):
            raise UserError("nothing would train: enable one of tune_projectors, tune_image_head, tune_language_model")
        if self.bits not in (4, 16):
            raise UserError(f"bits must be 16, or 4 for QLoRA, got {self.bits}")
        if self.quant_type not in ("nf4", "fp4"):
            raise UserError(f"quant_type must be nf4 or fp4, got {self.quant_type!r}")
        if self.bits == 4 and not self.lora_enable:
            raise UserError("a 4-bit backbone is trained through adapters; pass --lora_enable true, or --bits 16")
        if self.save_total_limit is not None and self.save_total_limit < 1:
            raise UserError(f"save_total_limit must be at least 1, got {self.save_total_limit}")


def new_head_settings(config: StageConfig) -> dict[str, Any]:
    """Settings of the run for a new model's image head, named as in `EvoTokLlavaConfig`.

    Raises:
        UserError: a setting of the other kind of head.
    """
    said = {name: getattr(config, name) for name in HEAD_SETTINGS}
    if said["residual_embeddings"] is not None and said["image_head"] != "flat":
        raise UserError(
            "residual_embeddings has no effect on a depth transformer; pass --image_head flat, or "
            "--residual_embeddings none"
        )
    return {name: getattr(EvoTokLlavaConfig, name) if value is None else value for name, value in said.items()}


def check_head(config: StageConfig, model: EvoTokLlavaConfig) -> None:
    """Refuse to go on from a model with another image head than the run asks for.

    Raises:
        UserError: it has another.
    """
    for name in ("image_head", "residual_embeddings"):
        asked, has = getattr(config, name), getattr(model, name)
        if asked not in (None, has):
            raise UserError(
                f"{name} is {has!r} in {config.model_name_or_path!r}, but {asked!r} is asked for; leave --{name} out, "
                "or start from a causal LM"
            )


def check_reporting(values: Mapping[str, Any]) -> None:
    """Check the reporters that settings name, before any work.

    Raises:
        UserError: an unknown one, one whose package is missing, or wandb without a key.
    """
    given = values.get("report_to", StageConfig.report_to)
    names = [given] if isinstance(given, str) else list(given or [])
    if names in (["all"], ["none"]):
        return
    known = integration_utils.INTEGRATION_TO_CALLBACK
    for name in names:
        if name not in known:
            raise UserError(f"report_to: unknown reporter {name!r}; expected none, all or some of {', '.join(known)}")
    check_reporters(names)
    others = set(names) - {"tensorboard", "wandb"} - set(integration_utils.get_available_reporting_integrations())
    if others:
        raise UserError(f"report_to: {', '.join(sorted(others))} is not installed; or pass --report_to none")


def find_deepspeed_config(name_or_path: str) -> Path:
    """A DeepSpeed JSON by path, or by bare name among those of the project (`zero2`).

    Raises:
        UserError: there is none.
    """
    for path in (Path(name_or_path), DEEPSPEED_FOLDER / f"{name_or_path}.json"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in DEEPSPEED_FOLDER.glob("*.json")))
    raise UserError(f"DeepSpeed configuration {name_or_path!r} not found; expected a JSON file or one of: {known}")


def read_deepspeed_config(config: str | dict | None) -> dict | None:
    """A DeepSpeed configuration, given as it is or as `find_deepspeed_config` takes it; None for no DeepSpeed.

    Raises:
        UserError: there is none, or it is not JSON.
    """
    if config in (None, "none") or isinstance(config, dict):
        return None if config == "none" else config
    path = find_deepspeed_config(config)
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"DeepSpeed configuration {path} is not valid JSON: {error}") from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _prepare_processes(config: StageConfig) -> None:
    """Let the same engine run with an accelerator or without, under a launcher or not."""
    if config.deepspeed and "RANK" not in os.environ:
        # Without a launcher DeepSpeed would look for MPI.
        single: dict[str, Any] = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        single |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
        os.environ.update({key: str(value) for key, value in single.items()})
    if torch.cuda.is_available() and not config.use_cpu:
        return
    config.use_cpu = True
    config.tf32 = None
    config.dataloader_pin_memory = False
    if config.deepspeed:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed.ops

        # An all-reduce kernel for inference only, which would otherwise be compiled for minutes at the first start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
