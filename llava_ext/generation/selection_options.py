"""Settings of the selection among drawn candidates: those of a call, and the model's own in generation_config.json."""

from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

from evotok_plugin.errors import UserError
from llava_ext.generation.options import checked_entry

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from llava_ext.generation.model_interface import ModelInterface

IMAGE_SELECTION = "image_selection"  # the entry of generation_config.json that holds a model's settings
MOST_CANDIDATES = 1024
_KEYS = ("best_of", "instruction")


@dataclass(frozen=True)
class SelectionOptions:
    """Settings of the selection. None leaves a setting to the model (`generation_config.image_selection`).

    Attributes:
        best_of: candidates that `generate_images` draws per image; 1 draws each image once, without a selection.
        instruction: the user's text under an image, to which the model answers with a prompt when it reads a candidate.

    Raises:
        UserError: a value is out of its range.
    """

    best_of: int | None = None
    instruction: str | None = None

    def __post_init__(self) -> None:
        count = self.best_of
        if count is not None and (
            not isinstance(count, Integral) or isinstance(count, bool) or not 1 <= count <= MOST_CANDIDATES
        ):
            raise UserError(f"best_of must be a whole number from 1 to {MOST_CANDIDATES}, got {count!r}")
        if self.instruction is not None and not (isinstance(self.instruction, str) and self.instruction.strip()):
            raise UserError(f"instruction: expected a text that is not empty, got {self.instruction!r}")

    def for_model(self, model: "ModelInterface") -> "CompleteSelection":
        """Fill every setting that is None from the model's `generation_config`, then from the library's defaults.

        Raises:
            UserError: the model's own settings are invalid.
        """
        own = _stored(getattr(model, "generation_config", None))
        return CompleteSelection(
            best_of=self.best_of or own.best_of or DEFAULTS.best_of,
            instruction=self.instruction or own.instruction or DEFAULTS.instruction,
        )


@dataclass(frozen=True)
class CompleteSelection:
    """The settings of `SelectionOptions`, all of them set."""

    best_of: int
    instruction: str


# Used where a model's generation_config has no settings.
DEFAULTS = CompleteSelection(best_of=1, instruction="Write a prompt for this image.")


def read_selection(values: Any) -> SelectionOptions:
    """Parse the entry `image_selection` of a generation_config.json; settings that it leaves out are None.

    Raises:
        UserError: it is not a mapping, has an unknown key, or a value is out of its range.
    """
    given = checked_entry(IMAGE_SELECTION, values, _KEYS)
    try:
        return SelectionOptions(**given)
    except UserError as error:
        raise UserError(f"{IMAGE_SELECTION}: {error}") from None


def _stored(config: "GenerationConfig | None") -> SelectionOptions:
    """Return the settings that a generation config has; all None if it has no entry."""
    values = getattr(config, IMAGE_SELECTION, None)
    return SelectionOptions() if values is None else read_selection(values)
