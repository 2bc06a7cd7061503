"""The settings of a training stage: Hugging Face's TrainingArguments and the settings that LLaVA adds to them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from transformers import TrainingArguments
from transformers.integrations import integration_utils

from evotok_plugin.common.processes import Processes
from evotok_plugin.common.recipes import LARGEST_COUNT, REQUIRED, check_seed
from evotok_plugin.errors import UserError
from evotok_plugin.training.reporters import check_reporters
from llava_ext.configuration_evotok_llava import IMAGE_HEADS, RESIDUAL_EMBEDDINGS, check_choice
from llava_ext.data.descriptions import check_share
from llava_ext.generation.options import read_settings

RESUME = "resume"  # key in the metadata of a field that a stage adds: its rule for resuming (see `resume_rules`)


def _help(text: str, required: bool = False) -> dict[str, Any]:
    return {"help": text, REQUIRED: required}


@dataclass(kw_only=True)
class StageConfig(TrainingArguments):
    """One training stage. A recipe overrides these defaults, and flags override the recipe.

    Constructing one checks its values and has no side effects: `TrainingArguments.__post_init__` also chooses the
    device and starts the process group, so it runs in `launch.prepare_processes`. Until then the checks and
    conversions of `TrainingArguments` have not happened, and `device`, `world_size`, `process_index` and
    `hf_deepspeed_config` must not be used.

    `{workspace}` in a path is replaced by the value of `workspace`.
    """

    learns_from_drawings: ClassVar[bool] = False  # whether the stage also trains on drawings of its own

    workspace: str = field(default="outputs", metadata=_help("folder that replaces `{workspace}` in paths"))
    model_name_or_path: str = field(
        default="",
        metadata=_help(
            "EvoTok-LLaVA folder to continue from, or a causal LM (folder, hub id, GGUF file) to start from",
            required=True,
        ),
    )
    vision_tower: str | None = field(
        default=None, metadata=_help("EvoTok tokenizer folder; required when starting from a causal LM")
    )
    data_path: list[str] = field(
        default_factory=list,
        metadata=_help("training data: .json, .jsonl, .parquet, .tar, patterns, folders, hf:NAME", required=True),
    )
    data_weights: list[float] | None = field(
        default=None,
        metadata=_help("share of each entry of data_path; by default every sample is used once per epoch"),
    )
    image_folder: list[str] | None = field(
        default=None,
        metadata=_help(
            "folder that the image paths of the records are relative to; one, or one per entry of data_path"
        ),
    )
    code_cache: str | None = field(
        default=None, metadata=_help("cache folder for the codes of the images; created if it does not exist")
    )
    caption_task: str = field(
        default="both", metadata=_help("use of an image that has only a caption: read, draw or both")
    )
    draw_share: float = field(
        default=0.0,
        metadata=_help(
            "share of the conversations that describe an image that are also drawn from the description (docs/data.md)"
        ),
    )
    max_bad_fraction: float = field(default=0.001, metadata=_help("share of unusable samples that is tolerated"))
    model_max_length: int = field(
        default=2048, metadata=_help("maximum number of LLM steps per sample; longer text is truncated")
    )
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
        metadata=_help(
            "image head of a new model: depth (one LLM step per position, the default) or flat (one per residual token)"
        ),
    )
    residual_embeddings: str | None = field(
        default=None,
        metadata=_help(
            "embeddings of a new flat head: tied (computed from the codebooks, the default) or free (learned tables)"
        ),
    )
    head_hidden_size: int = field(default=2560, metadata=_help("width of a new depth transformer"))
    head_num_layers: int = field(default=6, metadata=_help("number of layers of a new depth transformer"))
    head_num_heads: int = field(default=40, metadata=_help("number of attention heads of a new depth transformer"))
    mm_projector_lr: float | None = field(
        default=None, metadata=_help("learning rate of both projectors (default: learning_rate)")
    )
    image_head_lr: float | None = field(
        default=None, metadata=_help("learning rate of the image head (default: learning_rate)")
    )
    language_model_lr: float | None = field(
        default=None,
        metadata=_help("learning rate of the text backbone or its adapters (default: learning_rate)"),
    )
    lora_enable: bool = field(default=False, metadata=_help("train LoRA adapters instead of the backbone"))
    lora_r: int = field(default=64, metadata=_help("LoRA rank"))
    lora_alpha: float = field(default=16.0, metadata=_help("LoRA scale"))
    lora_dropout: float = field(default=0.05, metadata=_help("LoRA dropout"))
    bits: int = field(default=16, metadata=_help("4: QLoRA, adapters on a backbone quantized by bitsandbytes"))
    quant_type: str = field(default="nf4", metadata=_help("4-bit data type: nf4 or fp4"))
    double_quant: bool = field(default=True, metadata=_help("also quantize the scales of the 4-bit weights"))
    attn_implementation: str = field(
        default="auto",
        metadata=_help("auto (flash_attention_2 if available, else sdpa), or an implementation of transformers"),
    )
    group_by_modality_length: bool = field(
        default=True, metadata=_help("batches of one kind of sample and of similar lengths")
    )
    eval_data: list[str] | None = field(
        default=None,
        metadata=_help("held-out data in the formats of data_path: its losses, and drawings of its prompts"),
    )
    eval_image_folder: str | None = field(
        default=None, metadata=_help("folder of the image paths of eval_data; defaults to image_folder")
    )
    eval_every: int = field(default=500, metadata=_help("steps between two evaluations of eval_data"))
    packing: bool = field(
        default=False,
        metadata=_help("pack several samples into rows of model_max_length steps; the batch size counts rows"),
    )
    text_loss_weight: float = field(default=1.0, metadata=_help("weight of the mean loss of the text tokens"))
    image_loss_weight: float = field(default=1.0, metadata=_help("weight of the mean loss of the image positions"))
    group_lengths: bool = field(default=True, metadata=_help("false: batches of one kind of sample, of any lengths"))
    image_generation: dict | None = field(
        default=None,
        metadata=_help(
            "default drawing settings of the trained model, e.g. '{guidance_scale: 3.0, top_k: 900}'; by default those "
            "of the model that training starts from"
        ),
    )
    reference_batch_size: int | None = field(
        default=None,
        metadata=_help("samples per step over all processes that the learning rate is meant for; only reported"),
    )
    warmup_ratio: float | None = field(default=None, metadata=_help("warm-up as a share of all steps"))
    overwrite: bool = field(default=False, metadata=_help("replace the run that output_dir holds"))
    verify: bool = field(
        default=False, metadata=_help("compare the sha256 of all files of a checkpoint before it is resumed")
    )

    output_dir: str = field(
        default="", metadata=_help("folder for checkpoints, logs and the trained model", required=True)
    )
    remove_unused_columns: bool = field(default=False, metadata=_help("must be false: the collator needs all fields"))
    logging_steps: float = field(default=10, metadata=_help("steps between two lines of metrics"))
    save_total_limit: int | None = field(default=2, metadata=_help("number of checkpoints to keep; none: all"))
    report_to: None | str | list[str] = field(
        default="tensorboard", metadata=_help("tensorboard, wandb, other reporters of transformers, all or none")
    )

    def __post_init__(self) -> None:
        if isinstance(self.data_path, str):
            self.data_path = [self.data_path]
        if isinstance(self.eval_data, str):
            self.eval_data = [self.eval_data]
        if self.eval_data is not None:
            self.eval_data = [path.replace("{workspace}", self.workspace) for path in self.eval_data]
        for name in ("model_name_or_path", "vision_tower", "code_cache", "output_dir", "eval_image_folder"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value.replace("{workspace}", self.workspace))
        if isinstance(self.image_folder, str):
            self.image_folder = [self.image_folder]
        self.data_path = [path.replace("{workspace}", self.workspace) for path in self.data_path or []]
        if self.image_folder is not None:
            self.image_folder = [path.replace("{workspace}", self.workspace) for path in self.image_folder]
        self._check()
        if self.warmup_ratio is not None:
            self.warmup_steps = self.warmup_ratio
        if self.deepspeed == "none":
            self.deepspeed = None

    def _check(self) -> None:
        for name in ("text_loss_weight", "image_loss_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "model_max_length"):
            if not 1 <= getattr(self, name) < LARGEST_COUNT:
                raise UserError(f"{name} must be from 1 to {LARGEST_COUNT - 1}, got {getattr(self, name)}")
        for name in ("learning_rate", "mm_projector_lr", "image_head_lr", "language_model_lr"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise UserError(f"{name} must be at least 0, got {getattr(self, name)}")
        check_seed(self.seed, bits=32)  # numpy's limit
        if not (self.text_loss_weight or self.image_loss_weight):
            raise UserError("text_loss_weight and image_loss_weight are both 0, so the loss is 0; raise one of them")
        check_share(self.draw_share)
        if self.eval_every < 1:
            raise UserError(f"eval_every must be at least 1, got {self.eval_every}")
        if self.image_generation is not None:
            read_settings(self.image_generation)
        if self.image_head is not None:
            check_choice("image_head", self.image_head, IMAGE_HEADS)
        if self.residual_embeddings is not None:
            check_choice("residual_embeddings", self.residual_embeddings, RESIDUAL_EMBEDDINGS)
        if not 0 <= self.prompt_dropout < 1:
            raise UserError(f"prompt_dropout must be at least 0 and below 1, got {self.prompt_dropout}")
        projectors = self.tune_projectors or self.tune_read_projector or self.tune_write_projector
        if not (projectors or self.tune_image_head or self.tune_language_model or self.lora_enable):
            raise UserError("nothing would train: enable one of tune_projectors, tune_image_head, tune_language_model")
        if self.lora_enable and self.lora_r < 1:
            raise UserError(f"lora_r must be at least 1, got {self.lora_r}")
        if self.lora_enable and not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout must be at least 0 and below 1, got {self.lora_dropout}")
        if self.bits not in (4, 16):
            raise UserError(f"bits must be 16, or 4 for QLoRA, got {self.bits}")
        if self.quant_type not in ("nf4", "fp4"):
            raise UserError(f"quant_type must be nf4 or fp4, got {self.quant_type!r}")
        if self.bits == 4 and not self.lora_enable:
            raise UserError("a 4-bit backbone is trained through adapters; pass --lora_enable true, or --bits 16")
        if self.save_total_limit is not None and self.save_total_limit < 1:
            raise UserError(f"save_total_limit must be at least 1, got {self.save_total_limit}")

    def input_paths(self) -> dict[str, list[str]]:
        """Paths that the run reads, by their settings."""
        given: dict[str, list[str | None]] = {
            "model_name_or_path": [self.model_name_or_path],
            "vision_tower": [self.vision_tower],
            "data_path": [*self.data_path],
            "image_folder": [*(self.image_folder or [])],
            "code_cache": [self.code_cache],
            "eval_data": [*(self.eval_data or [])],
            "eval_image_folder": [self.eval_image_folder],
        }
        return {name: [path for path in paths if path and not path.startswith("hf:")] for name, paths in given.items()}

    @property
    def processes(self) -> Processes:
        """This process among those of the run, once `launch.prepare_processes` has been called."""
        return Processes(self.process_index, self.world_size, self.device)


def check_required(config: StageConfig) -> None:
    """Check that the settings without a default are given.

    Raises:
        UserError: one is missing.
    """
    for setting in fields(config):
        if setting.metadata.get(REQUIRED) and not getattr(config, setting.name):
            value = " FILE.json" if setting.name == "data_path" else ""
            raise UserError(f"{setting.name} is not set; pass --{setting.name}{value} or put it into the recipe")


def check_reporting(values: Mapping[str, Any]) -> None:
    """Check the reporters that settings name, before any work.

    Raises:
        UserError: an unknown reporter, a reporter whose package is not installed, or wandb without an API key.
    """
    given = values.get("report_to", StageConfig.report_to)
    names = [given] if isinstance(given, str) else list(given or [])
    if names == ["none"]:
        return
    if names == ["all"]:
        check_reporters(integration_utils.get_available_reporting_integrations())
        return
    known = integration_utils.INTEGRATION_TO_CALLBACK
    for name in names:
        if name not in known:
            raise UserError(f"report_to: unknown reporter {name!r}; expected none, all or some of {', '.join(known)}")
    check_reporters(names)
    others = set(names) - {"tensorboard", "wandb"} - set(integration_utils.get_available_reporting_integrations())
    if others:
        raise UserError(
            f"report_to: {', '.join(sorted(others))} is not installed; install it, or pass --report_to none"
        )
