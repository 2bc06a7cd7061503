"""The schema of a tokenizer training run."""

from dataclasses import dataclass, field

from evotok_plugin.common.recipes import LARGEST_COUNT, MERGED, check_seed
from evotok_plugin.errors import UserError
from evotok_plugin.teachers.layers import TeacherLayers

REPORTERS = ("tensorboard", "wandb")
PARTS = ("all", "decoders", "pixel_decoder", "semantic_decoder")


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(kw_only=True)
class TokenizerTrainingConfig:
    """The settings of `evotok train`; the defaults are those of the paper (arXiv 2603.12108)."""

    data: list[str] = field(metadata=_help("folders of images, tar shards, parquet, or hf:NAME"))
    output_dir: str = field(metadata=_help("folder for checkpoints, metrics, pictures and the model"))
    data_weights: list[float] | None = field(default=None, metadata=_help("weight of each source (default: its size)"))
    val_data: list[str] | None = field(default=None, metadata=_help("images to validate on (default: a held-out part)"))
    init_from: str | None = field(
        default=None, metadata=_help("tokenizer folder whose weights and sizes the run starts from")
    )
    train_parts: str = field(
        default="all",
        metadata=_help(
            "with init_from: all, decoders, pixel_decoder or semantic_decoder; other parts stay as they are"
        ),
    )
    preset: str = field(default="paper", metadata=_help("model sizes: tiny, base, paper or paper_384"))
    model: dict = field(
        default_factory=dict,
        metadata={**_help("fields of EvoTokConfig that differ from the preset"), MERGED: True},
    )
    teacher: str | None = field(
        default=None,
        metadata=_help(
            "target of the semantic features: folder or hub id of SigLIP, SigLIP2, CLIP, ViT, DINOv2 or DINOv3, "
            "timm:NAME, or timm:NAME:FILE.safetensors"
        ),
    )
    teacher_layer: str | None = field(
        default=None,
        metadata=_help(
            "layer -2, sum -2+-6, or by depth 4:6,16:-2 (default: second-to-last layer of a ViT, last stage of a CNN)"
        ),
    )
    teacher_size: int | None = field(
        default=None, metadata=_help("pixels at which the teacher sees images (default: as its positions require)")
    )
    teacher_standardize: bool = field(
        default=False,
        metadata=_help("standardize each channel of the teacher's features, measured on the first images"),
    )
    init_encoder: bool = field(
        default=True, metadata=_help("initialize the encoder from the teacher: SigLIP, CLIP, ViT or DINOv2")
    )
    semantic_share: float = field(
        default=0.5,
        metadata=_help("with encoder_backbone: standard deviation of features relative to pixels in the first latents"),
    )
    freeze_encoder: bool = field(default=False, metadata=_help("train only quantizer and decoders"))
    feature_cache: bool = field(
        default=False, metadata=_help("keep the features of frozen networks in memory; needs --augment false")
    )
    max_steps: int = field(default=500_000, metadata=_help("number of training steps"))
    batch_size: int = field(default=256, metadata=_help("images per step, over all processes"))
    learning_rate: float = field(default=1e-4, metadata=_help("learning rate after the warm-up"))
    warmup_steps: int = field(default=0, metadata=_help("steps of linear warm-up of the learning rate"))
    cosine_decay: bool = field(default=False, metadata=_help("cosine decay to zero, otherwise constant"))
    grad_clip: float = field(default=1.0, metadata=_help("maximum norm of the gradient"))
    bf16: bool = field(default=False, metadata=_help("bfloat16 autocast; the code search stays in fp32"))
    gradient_checkpointing: bool = field(default=False, metadata=_help("less memory for a third more computation"))
    compile: bool = field(default=False, metadata=_help("torch.compile the networks"))
    weights_ema: float = field(default=0.0, metadata=_help("decay of the weight average that is saved; 0: no average"))
    pixel_loss: str = field(default="l2", metadata=_help("l2 or l1"))
    pixel_weight: float = field(default=1.0, metadata=_help("weight of the pixel loss"))
    lpips_weight: float = field(default=1.0, metadata=_help("weight of the perceptual loss LPIPS; 0: not loaded"))
    commitment_weight: float = field(default=1.0, metadata=_help("weight of the commitment loss"))
    semantic_weight: float = field(
        default=1.0, metadata=_help("weight of the cosine and folded cosine losses to the teacher")
    )
    gan_weight: float = field(default=0.5, metadata=_help("weight of the adversarial loss; 0: no discriminator"))
    gan_start: int = field(default=20_000, metadata=_help("first step of the discriminator"))
    gan_adaptive: bool = field(default=False, metadata=_help("scale the adversarial term by gradient norms"))
    kmeans_images: int = field(default=0, metadata=_help("images for k-means of the initial codebooks; 0: random"))
    augment: bool = field(default=True, metadata=_help("random scale, crop and flip"))
    val_fraction: float = field(
        default=0.01, metadata=_help("held-out fraction of the images, chosen by a hash of their names")
    )
    val_images: int = field(default=256, metadata=_help("number of held-out images per validation"))
    val_every: int = field(default=2000, metadata=_help("steps between two validations"))
    save_every: int = field(default=2000, metadata=_help("steps between two checkpoints"))
    keep_checkpoints: int = field(default=2, metadata=_help("number of checkpoints to keep"))
    log_every: int = field(default=20, metadata=_help("steps between two lines of metrics"))
    report_to: str = field(default="tensorboard", metadata=_help("tensorboard, wandb, both or none"))
    max_loss_growth: float = field(
        default=100.0, metadata=_help("stop when a term exceeds the usual loss by this factor, ten steps in a row")
    )
    min_code_usage: float = field(
        default=0.05, metadata=_help("warn when a level uses a smaller fraction of its codes between validations")
    )
    num_workers: int = field(default=0, metadata=_help("processes that decode images; 0: the training process"))
    max_bad_fraction: float = field(default=0.001, metadata=_help("tolerated fraction of broken images"))
    seed: int = field(default=0, metadata=_help("seed of the initial weights and of the order of the images"))
    overwrite: bool = field(default=False, metadata=_help("start over even if output_dir contains a run"))

    def __post_init__(self) -> None:
        if isinstance(self.data, str):
            self.data = [self.data]
        if not self.data:
            raise UserError("data names no images; pass --data FOLDER or put it into the recipe")
        if self.pixel_loss not in ("l1", "l2"):
            raise UserError(f"pixel_loss must be l1 or l2, got {self.pixel_loss!r}")
        if self.train_parts not in PARTS:
            raise UserError(f"train_parts must be one of {', '.join(PARTS)}, got {self.train_parts!r}")
        if self.report_to not in (*REPORTERS, "both", "none"):
            raise UserError(f"report_to must be {', '.join(REPORTERS)}, both or none, got {self.report_to!r}")
        if self.semantic_weight > 0 and not self.teacher:
            raise UserError(
                "semantic_weight is above 0 but teacher is not set; pass --teacher FOLDER (a vision transformer), or "
                "train only on pixels with --semantic_weight 0, as the recipe photos does"
            )
        self._check_without_effect()
        for name in ("max_steps", "batch_size", "val_every", "save_every", "log_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in (
            "learning_rate", "warmup_steps", "grad_clip", "pixel_weight", "lpips_weight", "commitment_weight",
            "semantic_share", "semantic_weight", "gan_weight", "gan_start", "kmeans_images", "val_images",
            "num_workers", "max_bad_fraction",
        ):  # fmt: skip
            if not getattr(self, name) >= 0:  # also true for NaN
                raise UserError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.batch_size >= LARGEST_COUNT:
            raise UserError(f"batch_size must be below {LARGEST_COUNT}, got {self.batch_size}")
        check_seed(self.seed)
        if self.teacher_layer is not None:
            TeacherLayers.parse(self.teacher_layer)
        if self.teacher_size is not None and self.teacher_size < 1:
            raise UserError(f"teacher_size must be at least 1 pixel, got {self.teacher_size}")
        if self.max_loss_growth <= 1:
            raise UserError(f"max_loss_growth must be above 1, got {self.max_loss_growth}")
        for name in ("val_fraction", "weights_ema"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")

    def _check_without_effect(self) -> None:
        if self.teacher and self.semantic_weight <= 0:
            raise UserError(
                f"teacher {self.teacher} has no effect with semantic_weight {self.semantic_weight:g}; raise "
                "--semantic_weight, or omit --teacher"
            )
        defaults = type(self)
        if self.train_parts != "all" and not self.init_from:
            raise UserError(f"train_parts {self.train_parts} needs trained other parts; pass --init_from FOLDER")
        if self.train_parts == "semantic_decoder" and not self.teacher:
            raise UserError("train_parts semantic_decoder needs a target; pass --teacher and --semantic_weight 1")
        if self.train_parts == "pixel_decoder" and self.teacher:
            raise UserError(
                f"teacher {self.teacher} has no effect with train_parts pixel_decoder; pass --semantic_weight 0 and "
                "omit --teacher"
            )
        has_start = bool(self.init_from)
        if "encoder_backbone" in self.model and not has_start:
            has_start = bool(self.teacher) and self.init_encoder
            if not has_start:
                raise UserError(
                    f"encoder_backbone {self.model['encoder_backbone']} would stay at random weights; pass --teacher "
                    f"timm:{self.model['encoder_backbone']}[:FILE] with --init_encoder true, or --init_from FOLDER"
                )
        if self.freeze_encoder and not has_start:
            raise UserError(
                "freeze_encoder needs an encoder with an encoder_backbone, or one from --init_from FOLDER; the "
                "bottleneck of others would stay at random weights"
            )
        for name in ("teacher_layer", "teacher_size", "teacher_standardize"):
            if not self.teacher and getattr(self, name) != getattr(defaults, name):
                raise UserError(f"{name} {getattr(self, name)} has no effect without --teacher; omit --{name}")
        if self.feature_cache and self.augment:
            raise UserError(
                "feature_cache has no effect with augment, which never repeats an image; pass --augment false"
            )
        if "encoder_backbone" not in self.model and self.semantic_share != defaults.semantic_share:
            raise UserError(f"semantic_share {self.semantic_share:g} has no effect without encoder_backbone; omit it")
        for name in ("gan_start", "gan_adaptive"):
            if self.gan_weight <= 0 and getattr(self, name) != getattr(defaults, name):
                raise UserError(
                    f"{name} {getattr(self, name)} has no effect with gan_weight {self.gan_weight:g}; raise "
                    f"--gan_weight, or omit --{name}"
                )
        if self.val_data and self.val_fraction != defaults.val_fraction:
            raise UserError(
                f"val_fraction {self.val_fraction:g} has no effect with val_data, which names the images to validate "
                "on; omit --val_fraction or --val_data"
            )

    @property
    def reporters(self) -> tuple[str, ...]:
        """The services that receive figures and pictures, in addition to metrics.jsonl."""
        return {"both": REPORTERS, "none": ()}.get(self.report_to, (self.report_to,))
