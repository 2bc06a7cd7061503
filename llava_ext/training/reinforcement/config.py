"""The settings of reinforcement: those of a stage, and prompts, rewards and drawings."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from evotok_plugin.common.recipes import LARGEST_COUNT, REQUIRED
from evotok_plugin.errors import UserError
from llava_ext.generation.options import DrawingOptions
from llava_ext.rewards.loading import read_weights
from llava_ext.training.config import RESUME, StageConfig

READING = "reading"  # the second judge that needs no other model: the reading of the starting model


def _help(text: str, resume: str = "rejected", required: bool = False) -> dict[str, Any]:
    return {"help": text, RESUME: resume, REQUIRED: required}


@dataclass(kw_only=True)
class ReinforceConfig(StageConfig):
    """One run of reinforcement. `data_path` is replayed as in supervised training; without it nothing is."""

    learns_from_drawings: ClassVar[bool] = True

    prompts: list[str] = field(
        default_factory=list,
        metadata=_help("files of prompts to draw: text lines, or JSONL with prompt and tag", "by_content", True),
    )
    heldout_prompts: list[str] = field(
        default_factory=list, metadata=_help("files of prompts that are only evaluated", "irrelevant")
    )
    rewards: dict = field(
        default_factory=dict,
        metadata=_help(
            "weights of rewards by name, e.g. '{clip_score: 1.0}'; package.module:object for own", required=True
        ),
    )
    second_judge: str | None = field(
        default=None,
        metadata=_help(
            f"a reward that is only logged, or {READING!r}: the reading of the starting model", "irrelevant"
        ),
    )
    prompts_per_step: int = field(default=18, metadata=_help("prompts per step, over all processes"))
    drawings_per_prompt: int = field(default=8, metadata=_help("drawings per prompt, which are compared"))
    kl_weight: float = field(default=0.0, metadata=_help("weight of the KL divergence to the starting model"))
    replay_weight: float = field(
        default=1.0, metadata=_help("weight of the loss on samples of data_path; 0: no replay")
    )
    drawing_temperature: float = field(default=1.0, metadata=_help("sampling temperature of the drawings that learn"))
    drawing_batch_size: int = field(default=256, metadata=_help("images that are drawn, and learned, at once"))
    evaluate_every: int = field(
        default=0, metadata=_help("steps between evaluations of held-out and trained prompts; 0: none", "irrelevant")
    )
    evaluation_prompts: int = field(
        default=96, metadata=_help("number of held-out prompts to evaluate, and of trained ones", "irrelevant")
    )
    sample_every: int = field(
        default=0, metadata=_help("steps between pictures of the same prompts in samples/; 0: none", "irrelevant")
    )
    data_path: list[str] = field(
        default_factory=list,
        metadata={"help": "samples to replay: .json, .jsonl, .parquet, .tar, patterns, folders, hf:NAME"},
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout, also of the drawings that learn"})

    def __post_init__(self) -> None:
        for name in ("prompts", "heldout_prompts"):
            paths = getattr(self, name)
            paths = [paths] if isinstance(paths, str) else paths or []
            setattr(self, name, [path.replace("{workspace}", self.workspace) for path in paths])
        super().__post_init__()

    def _check(self) -> None:
        super()._check()
        if self.rewards:
            read_weights(self.rewards)
        if self.drawings_per_prompt < 2:
            raise UserError(
                f"drawings_per_prompt must be at least 2, got {self.drawings_per_prompt}: the drawings of a prompt are "
                "compared with each other"
            )
        for name in ("prompts_per_step", "drawings_per_prompt", "drawing_batch_size", "evaluation_prompts"):
            if not 1 <= getattr(self, name) < LARGEST_COUNT:
                raise UserError(f"{name} must be from 1 to {LARGEST_COUNT - 1}, got {getattr(self, name)}")
        for name in ("kl_weight", "replay_weight", "evaluate_every", "sample_every"):
            if not 0 <= getattr(self, name) < LARGEST_COUNT:
                raise UserError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.drawing_temperature == 0:
            raise UserError("drawing_temperature must be above 0: equal drawings cannot be compared")
        self.drawing_options()
        if self.eval_data:
            raise UserError("eval_data has no effect in reinforcement; pass --heldout_prompts")
        if self.max_steps <= 0:
            raise UserError("reinforcement has no epochs; pass --max_steps N")
        if not self.replays and self.gradient_accumulation_steps > 1:
            raise UserError(
                "gradient_accumulation_steps divides the replayed samples, and nothing is replayed; lower "
                "drawing_batch_size to save memory"
            )

    @property
    def replays(self) -> bool:
        """Whether every step also takes a batch of samples."""
        return bool(self.data_path) and self.replay_weight > 0

    def drawing_options(self) -> DrawingOptions:
        """Settings of the drawings that learn: the distribution of the model, without guidance.

        Raises:
            UserError: the temperature is out of its range.
        """
        return DrawingOptions(guidance_scale=1.0, temperature=self.drawing_temperature, top_k=0, top_p=1.0, min_p=0.0)

    def input_paths(self) -> dict[str, list[str]]:
        return {**super().input_paths(), "prompts": [*self.prompts], "heldout_prompts": [*self.heldout_prompts]}
