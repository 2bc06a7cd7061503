"""Configuration of the multimodal LLM that reads and draws images with one EvoTok tokenizer."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, PreTrainedConfig

from evotok_plugin import EvoTokConfig
from evotok_plugin.errors import UserError
from evotok_plugin.model_folder import open_config
from evotok_plugin.tokenizer_settings import check_types
from llava_ext.vocabulary import ResidualVocabulary

IMAGE_HEADS = ("depth", "flat")
RESIDUAL_EMBEDDINGS = ("tied", "free")
HEAD_SETTINGS = ("image_head", "residual_embeddings", "head_hidden_size", "head_num_layers", "head_num_heads")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Reject a value that is not one of the choices.

    Raises:
        UserError: the value is not one of them.
    """
    if value not in choices:
        raise UserError(f"{name}: expected {' or '.join(choices)}, got {value!r}")


def max_positions_of(text_config: PreTrainedConfig) -> int | None:
    """Largest sequence length of a language model; None if its configuration sets no limit."""
    limit = getattr(text_config, "max_position_embeddings", None)
    return limit if limit is not None and limit > 0 else None


def check_length(folder: str | Path, num_steps: int) -> None:
    """Compare a sequence length with the positions of a model in a local folder, before loading the model.

    Raises:
        UserError: the model has fewer positions.
    """
    if not Path(folder).is_dir():
        return  # a hub id, which is checked after loading
    try:
        config = open_config(AutoConfig, folder)
    except UserError:
        return  # loading the model reports the cause
    _check_steps(max_positions_of(config.get_text_config()), num_steps)


def _check_steps(limit: int | None, num_steps: int) -> None:
    if limit is not None and num_steps > limit:
        raise UserError(
            f"model_max_length {num_steps} is more than the {limit} positions (max_position_embeddings) of the "
            f"language model; set it to at most {limit}"
        )


class EvoTokLlavaConfig(PreTrainedConfig):
    """A text backbone, an image tokenizer, and the token ids that represent images in a sequence.

    Attributes:
        text_config: configuration of any causal LM in transformers.
        vision_config: configuration of the EvoTok tokenizer.
        image_token_id: placeholder for one position of an image that is read.
        image_start_token_id, image_end_token_id: delimiters around every image, read or drawn.
        residual_token_offset: first id of the reserved range of residual tokens.
        image_head: predictor of residual tokens. "depth": a depth transformer after one LLM step per position; "flat":
            the LLM itself, with one step per residual token.
        residual_embeddings: rows of the flat head. "tied": computed from the codebook vectors; "free": learned
            independently.
        head_hidden_size, head_num_layers, head_num_heads: sizes of the depth transformer.
    """

    model_type = "evotok_llava"
    sub_configs = {"text_config": AutoConfig, "vision_config": EvoTokConfig}
    # Trainer leaves these outputs out of its predictions, which are then the logits alone.
    keys_to_ignore_at_inference = [
        "past_key_values",
        "image_hidden_states",
        "last_hidden_state",
        "text_loss",
        "image_loss",
        "num_text_tokens",
        "num_image_positions",
    ]

    # `__post_init__` replaces dictionaries and None by configurations, so readers always find these types.
    text_config: PreTrainedConfig = None  # type: ignore[assignment]
    vision_config: EvoTokConfig = None  # type: ignore[assignment]
    image_token_id: int = 0
    image_start_token_id: int = 1
    image_end_token_id: int = 2
    residual_token_offset: int = 3
    image_head: str = "depth"
    residual_embeddings: str = "tied"
    head_hidden_size: int = 2560
    head_num_layers: int = 6
    head_num_heads: int = 40
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            text_config: dict | PreTrainedConfig | None = None,
            vision_config: dict | EvoTokConfig | None = None,
            **settings: Any,
        ) -> None: ...

    def __post_init__(self, **kwargs):
        check_types(self, EvoTokLlavaConfig.__annotations__)
        text = self.text_config if self.text_config is not None else {"model_type": "qwen2"}
        self.text_config = AutoConfig.for_model(**text) if isinstance(text, dict) else text
        vision = self.vision_config if self.vision_config is not None else {}
        self.vision_config = EvoTokConfig(**vision) if isinstance(vision, dict) else vision
        self.tie_word_embeddings = bool(self.tie_word_embeddings or self.text_config.tie_word_embeddings)
        check_choice("image_head", self.image_head, IMAGE_HEADS)
        check_choice("residual_embeddings", self.residual_embeddings, RESIDUAL_EMBEDDINGS)
        if self.head_hidden_size % self.head_num_heads:
            raise UserError(
                f"head_hidden_size {self.head_hidden_size} is not a multiple of head_num_heads {self.head_num_heads}"
            )
        delimiters = (self.image_token_id, self.image_start_token_id, self.image_end_token_id)
        inside = [i for i in delimiters if 0 <= i - self.residual_token_offset < self.residual_vocabulary.size]
        if inside or len(set(delimiters)) < 3:
            raise UserError(
                f"image token ids {delimiters} must differ and lie outside the residual range that starts at "
                f"{self.residual_token_offset} and contains {self.residual_vocabulary.size} ids"
            )
        steps = 2 + max(self.vision_config.num_positions, self.steps_per_drawn_image)
        if self.max_positions is not None and steps > self.max_positions:
            raise UserError(
                f"an image takes {steps} steps with its delimiters, but the language model has "
                f"{self.max_positions} positions (max_position_embeddings)"
            )
        super().__post_init__(**kwargs)

    @property
    def auto_map(self) -> dict[str, Any]:
        """Classes of a folder with its own code, empty without any: TRL reads it without asking whether it exists."""
        return self.__dict__.setdefault("auto_map", {})

    @auto_map.setter
    def auto_map(self, value: dict[str, Any] | None) -> None:
        self.__dict__["auto_map"] = value or {}

    def to_dict(self) -> dict[str, Any]:
        """Return all settings, without an empty `auto_map`."""
        values = super().to_dict()
        if not values.get("auto_map"):
            values.pop("auto_map", None)
        return values

    @property
    def residual_vocabulary(self) -> ResidualVocabulary:
        """Residual tokens for the levels that the pixel decoder reads."""
        vision = self.vision_config
        return ResidualVocabulary(self.residual_token_offset, vision.pixel_depth, vision.codebook_size)

    @property
    def steps_per_drawn_image(self) -> int:
        """Number of LLM steps of a drawn image, without its delimiters."""
        vision = self.vision_config
        return vision.num_positions * (vision.pixel_depth if self.image_head == "flat" else 1)

    @property
    def max_positions(self) -> int | None:
        """Largest sequence length of the language model; None if it has no limit."""
        return max_positions_of(self.text_config)

    def check_length(self, num_steps: int) -> None:
        """Check that samples of `num_steps` steps fit into the language model.

        Raises:
            UserError: the language model has fewer positions.
        """
        _check_steps(self.max_positions, num_steps)

    def check_processor(self, processor: Any) -> None:
        """Check that an `EvoTokLlavaProcessor` belongs to this model.

        Raises:
            UserError: the processor belongs to another model, or its tokenizer has tokens that this model lacks.
        """
        processor.check_tokenizer()
        vision = self.vision_config
        expected = {
            "num_positions": vision.num_positions,
            "num_levels": vision.pixel_depth,
            "codebook_size": vision.codebook_size,
            "image_head": self.image_head,
            "image_token_id": self.image_token_id,
            "image_start_id": self.image_start_token_id,
            "image_end_id": self.image_end_token_id,
            "residual_token_offset": self.residual_token_offset,
        }
        for name, value in expected.items():
            if getattr(processor, name) != value:
                hint = (
                    "set processor.residual_token_offset = model.config.residual_token_offset"
                    if name == "residual_token_offset"
                    else "load both from one folder"
                )
                raise UserError(
                    f"model and processor differ: {name} is {value} in the model and {getattr(processor, name)} in the "
                    f"processor; {hint}"
                )
        if processor.image_processor.size != vision.image_size:
            raise UserError(
                f"the model expects images of {vision.image_size} pixels, the processor makes images of "
                f"{processor.image_processor.size}; load both from one folder"
            )
        if len(processor.tokenizer) > self.text_config.vocab_size:
            raise UserError(
                f"the tokenizer has {len(processor.tokenizer)} tokens, but the language model has rows for "
                f"{self.text_config.vocab_size}; call model.resize_token_embeddings({len(processor.tokenizer)})"
            )


AutoConfig.register(EvoTokLlavaConfig.model_type, EvoTokLlavaConfig, exist_ok=True)
