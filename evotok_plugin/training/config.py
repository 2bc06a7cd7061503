"""The schema of a tokenizer training run."""

from dataclasses import dataclass, field


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(kw_only=True)
class TokenizerTrainingConfig:
    """What a recipe of `evotok train` may hold; the defaults are the paper's (DESIGN, section 1)."""

    data: str = field(metadata=_help("folder of images, searched recursively"))
    output_dir: str = field(metadata=_help("where checkpoints, metrics, pictures and the model go"))
    preset: str = field(default="paper", metadata=_help("model sizes: tiny, base or paper"))
    model: dict = field(default_factory=dict, metadata=_help("fields of EvoTokConfig that differ from the preset"))
    teacher: str | None = field(default=None, metadata=_help("SigLIP folder or hub id: semantic target and start"))
    init_encoder: bool = field(default=True, metadata=_help("start the encoder from the teacher"))
    max_steps: int = 500_000
    batch_size: int = field(default=256, metadata=_help("images a step over all processes"))
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    cosine_decay: bool = field(default=False, metadata=_help("cosine to zero, else constant"))
    grad_clip: float = 1.0
    bf16: bool = field(default=False, metadata=_help("autocast; the code search stays in fp32"))
    pixel_loss: str = field(default="l2", metadata=_help("l2 or l1"))
    pixel_weight: float = 1.0
    lpips_weight: float = 1.0
    commitment_weight: float = 1.0
    semantic_weight: float = field(default=1.0, metadata=_help("cosine + folded cosine to the teacher"))
    gan_weight: float = 0.5
    gan_start: int = field(default=20_000, metadata=_help("step from which the discriminator takes part"))
    gan_adaptive: bool = field(default=False, metadata=_help("scale the adversarial term by gradient norms"))
    kmeans_images: int = field(default=0, metadata=_help("images whose latents start the codebooks; 0: at random"))
    augment: bool = field(default=True, metadata=_help("random scale, crop and flip"))
    val_fraction: float = field(default=0.01, metadata=_help("share of the images held out, by a hash of their path"))
    val_images: int = field(default=256, metadata=_help("held-out images looked at in a validation"))
    val_every: int = 2000
    save_every: int = 2000
    log_every: int = 20
    num_workers: int = 0
    max_bad_fraction: float = field(default=0.001, metadata=_help("share of broken images that is tolerated"))
    seed: int = 0
    overwrite: bool = field(default=False, metadata=_help("begin anew although output_dir holds a run"))

    def __post_init__(self) -> None:
        if self.pixel_loss not in ("l1", "l2"):
            raise ValueError(f"pixel_loss must be l1 or l2, got {self.pixel_loss!r}")
        if self.semantic_weight > 0 and not self.teacher:
            raise ValueError(
                "semantic_weight is above 0 but there is no teacher; pass --teacher FOLDER (a SigLIP model), or train "
                "pixels alone with --semantic_weight 0"
            )
        for name in ("max_steps", "batch_size", "val_every", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction must lie in [0, 1), got {self.val_fraction}")
