"""The engine of the server, the demo page and the evaluation: answers of different requests share one batch, which they
join at any step and leave when they are complete (continuous batching)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import GenerationConfig

from evotok_plugin.errors import UserError
from llava_ext.generation.answer_options import AnswerOptions
from llava_ext.generation.answer_settings import GREEDY, TextSettings, text_settings
from llava_ext.generation.answers import Answers
from llava_ext.generation.evaluation_view import evaluation_view
from llava_ext.generation.events import Event, Finished
from llava_ext.generation.model_interface import ModelInterface
from llava_ext.generation.thin_view import thin_view
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor

_KEPT_OPTIONS = 64


@dataclass(eq=False)
class AnswerRow:
    """One answer to a conversation: a row of the batch.

    Attributes:
        conversation: Hugging Face messages that end with the user's. Rows that join together and share this list are
            encoded once.
        options: options that differ from the model's own.
        seed: of this answer.
    """

    conversation: list[dict[str, Any]]
    options: AnswerOptions
    seed: int


class AnswerEngine:
    """Answers rows step by step; not thread-safe.

    An answer depends only on its own conversation, options and seed, whatever the other rows are. The model's own
    settings of drawing are read whenever rows join an engine without active rows, those of text when the first rows
    join: use a new engine after these have changed.

    Args:
        model: may be in training mode; the answers are those of evaluation mode.
    """

    def __init__(self, model: ModelInterface, processor: EvoTokLlavaProcessor) -> None:
        self._model, self._processor = model, processor
        self._answers: Answers | None = None
        self._settings: TextSettings | None = None
        self._active: dict[int, AnswerRow] = {}  # by their numbers in `_answers`
        self._complete_options: dict[tuple[AnswerOptions, int], AnswerOptions] = {}

    @property
    def num_active(self) -> int:
        """The number of answers that are not complete."""
        return len(self._active)

    def admit(self, rows: Sequence[AnswerRow]) -> None:
        """Run the conversations through the model, and answer them from the next step on.

        Raises:
            UserError: a conversation leaves no room for an answer, or an option does not fit the model; none of the
                rows has joined then.
        """
        settings = self._settings_for(rows)
        if not self._active:
            self._complete_options.clear()
        if self._answers is None:
            self._answers = Answers(thin_view(evaluation_view(self._model)), self._processor, settings)
        conversations = {id(row.conversation): row.conversation for row in rows}
        inputs = self._processor.apply_chat_template(
            list(conversations.values()), add_generation_prompt=True, tokenize=True
        )
        inputs = {name: value.to(self._model.device) for name, value in inputs.items()}
        places = {key: place for place, key in enumerate(conversations)}
        own_places = [places[id(row.conversation)] for row in rows]
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        options = [
            self._complete(row.options, settings, lengths[place]) for row, place in zip(rows, own_places, strict=True)
        ]
        numbers = self._answers.admit(inputs, options, [row.seed for row in rows], own_places)
        self._active |= dict(zip(numbers, rows, strict=True))

    def _settings_for(self, rows: Sequence[AnswerRow]) -> TextSettings:
        """The model's settings of text; if it has some that are not supported, only rows that write none can join."""
        if self._settings is None:
            try:
                self._settings = text_settings(self._model)
            except UserError:
                if all(row.options.image_first for row in rows):
                    return TextSettings(None, None, GREEDY, frozenset(), None, GenerationConfig())
                raise
        return self._settings

    def _complete(self, options: AnswerOptions, settings: TextSettings, prompt_length: int) -> AnswerOptions:
        key = (options, 0 if options.image_first else prompt_length)  # an image needs no room for text
        if key not in self._complete_options:
            while len(self._complete_options) >= _KEPT_OPTIONS:
                del self._complete_options[next(iter(self._complete_options))]
            self._complete_options[key] = options.complete(self._model, settings, prompt_length)
        return self._complete_options[key]

    def step(self) -> Iterator[tuple[AnswerRow, Event]]:
        """Advance all answers by one step, and yield its events, each with `row` 0; all of them must be read.

        After an exception of the model no row is active any more.
        """
        assert self._answers is not None, "no row was admitted"
        try:
            for event in self._answers.step():
                if (row := self._active.get(event.row)) is None:
                    continue  # of an answer that was dropped
                if isinstance(event, Finished):
                    del self._active[event.row]
                yield row, replace(event, row=0)
        except Exception:
            self._active, self._answers = {}, None
            raise

    def drop(self, rows: Sequence[AnswerRow]) -> None:
        """Stop these answers."""
        for number, row in list(self._active.items()):
            if row in rows and self._answers is not None:
                self._answers.drop(number)
                del self._active[number]
