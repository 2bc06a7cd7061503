"""Options of answers that may contain text and images."""

from dataclasses import dataclass, field, replace

from evotok_plugin.errors import UserError
from evotok_plugin.sampling import SamplingOptions
from llava_ext.generation.answer_settings import MAX_NEW_TOKENS, TextSettings
from llava_ext.generation.model_interface import ModelInterface
from llava_ext.generation.options import DrawingOptions
from llava_ext.generation.selection_options import SelectionOptions


@dataclass(frozen=True)
class AnswerOptions:
    """Options of an answer.

    Attributes:
        max_new_tokens: text tokens of the answer, delimiters not counted; an image that has started is finished. None
            takes the model's setting (`generation_config`), or 256 if it has none. An answer also ends where the
            language model's positions end.
        max_images: images per answer.
        image_first: always start with an image, and stop after it.
        text: sampling of text tokens; None takes the model's `generation_config`, which is greedy unless it sets
            `do_sample`.
        drawing: settings of images that differ from the model's own.
        preview_every: positions between two previews of an image; 0 disables previews.
        best_of: candidates drawn for an answer that is one image (`image_first`), of which the best one is kept, as in
            `generate_images`. Answers in which the model decides when to draw have no candidates.

    Raises:
        UserError: a number is out of its range, or the options allow neither text nor images.
    """

    max_new_tokens: int | None = None
    max_images: int = 4
    image_first: bool = False
    text: SamplingOptions | None = None
    drawing: DrawingOptions = field(default_factory=DrawingOptions)
    preview_every: int = 0
    best_of: int = 1

    def __post_init__(self) -> None:
        SelectionOptions(self.best_of)  # checks the range
        if self.best_of > 1 and not self.image_first:
            raise UserError(
                f'best_of={self.best_of} needs answers that are one image: image_first, or modalities="image"'
            )
        for name in ("max_new_tokens", "max_images", "preview_every"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise UserError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.image_first and not self.max_images:
            raise UserError("an image is required but max_images is 0")
        if self.max_new_tokens == 0 and not self.image_first:
            raise UserError("max_new_tokens must be at least 1: the model has no room to answer")

    def complete(self, model: ModelInterface, settings: TextSettings, prompt_length: int) -> "AnswerOptions":
        """Options with values for everything, from these, the settings of text and the model's own.

        Args:
            prompt_length: steps of the prompt, which count in `max_length`.

        Raises:
            UserError: a drawing setting has values for another number of levels.
        """
        max_new_tokens = self.max_new_tokens
        if max_new_tokens is None:
            max_new_tokens = MAX_NEW_TOKENS if settings.max_new_tokens is None else settings.max_new_tokens
            if settings.max_new_tokens is None and settings.max_length is not None:
                max_new_tokens = max(1, settings.max_length - prompt_length)
        text = settings.sampling if self.text is None else self.text
        return replace(self, max_new_tokens=max_new_tokens, text=text, drawing=self.drawing.for_model(model))
