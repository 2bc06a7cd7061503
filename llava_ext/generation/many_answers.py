"""Answers to many requests in one batch: the next request joins when a row is free."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from evotok_plugin.errors import UserError
from llava_ext.generation.answer_engine import AnswerEngine, AnswerRow
from llava_ext.generation.answer_options import AnswerOptions
from llava_ext.generation.events import CandidateDrawn, Event, Finished, ImageDrawn
from llava_ext.generation.model_interface import ModelInterface
from llava_ext.generation.selection import Candidate, Selector, candidates_for, make_selector
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor


@dataclass(eq=False)
class AnswerRequest:
    """A request for one answer.

    Attributes:
        conversation: Hugging Face messages that end with the user's; requests may share the list.
        prompt: what an image should show, for `options.best_of`.
        options: options that differ from the model's own.
        seed: of the answer; image i of it is drawn with seed + i.
    """

    conversation: list[dict[str, Any]]
    prompt: str
    options: AnswerOptions
    seed: int


class ManyAnswersMixin(ModelInterface):
    """`answer_all` of the model class."""

    def answer_all(
        self, requests: Iterable[AnswerRequest], processor: EvoTokLlavaProcessor, max_rows: int
    ) -> Iterator[tuple[AnswerRequest, Event]]:
        """Answer requests, whatever their options are; yields each event with its request.

        Answers depend only on their own request, as those of `stream`, and an answer that is one image is that of
        `generate_images`. With `best_of` the events of an answer are its best image and its end.

        Args:
            requests: read one by one, when a row is free for the next one.
            max_rows: answers that are generated together; with `best_of`, candidates.

        Raises:
            UserError: a conversation leaves no room for an answer, an option does not fit the model, or a prompt is
                missing where candidates are scored for it.
        """
        self.config.check_processor(processor)
        engine, candidates = AnswerEngine(self, processor), _Candidates(self, processor)
        source, owners = iter(requests), dict[AnswerRow, AnswerRequest]()
        waiting: deque[tuple[AnswerRow, AnswerRequest]] = deque()
        while True:
            joining: list[AnswerRow] = []
            while len(owners) < max_rows:
                if not waiting:
                    if (request := next(source, None)) is None:
                        break
                    waiting.extend((row, request) for row in candidates.rows(request))
                row, request = waiting.popleft()
                owners[row] = request
                joining.append(row)
            if joining:
                engine.admit(joining)
            if not owners:
                return
            for row, event in engine.step():
                request = owners[row]
                if request.options.best_of == 1:
                    yield request, event
                else:
                    candidates.add(request, row, event)
                if isinstance(event, Finished):
                    del owners[row]
            yield from candidates.selected()


@dataclass
class _Drawn:
    """The candidates of a request, and what is known of their answers."""

    candidates: Sequence[Candidate]
    rows: Sequence[AnswerRow]
    events: dict[AnswerRow, CandidateDrawn] = field(default_factory=dict)
    ends: dict[AnswerRow, Finished] = field(default_factory=dict)


class _Candidates:
    """The candidates of all requests with `best_of`; those of requests that are complete in one step are scored
    together."""

    def __init__(self, model: ModelInterface, processor: EvoTokLlavaProcessor) -> None:
        self._model, self._processor = model, processor
        self._requests: dict[AnswerRequest, _Drawn] = {}
        self._selectors: dict[int, Selector] = {}  # by `best_of`

    def rows(self, request: AnswerRequest) -> list[AnswerRow]:
        """The rows of a request: one, or one per candidate."""
        best_of = request.options.best_of
        if best_of == 1:
            return [AnswerRow(request.conversation, request.options, request.seed)]
        if not request.prompt.strip():
            raise UserError(f"best_of={best_of} scores images for a prompt, which is empty; set best_of to 1")
        candidates = candidates_for([request.prompt], [request.seed], best_of)
        rows = [AnswerRow(request.conversation, request.options, one.seed) for one in candidates]
        self._requests[request] = _Drawn(candidates, rows)
        return rows

    def add(self, request: AnswerRequest, row: AnswerRow, event: Event) -> None:
        """Add what a candidate's answer has yielded."""
        if isinstance(event, CandidateDrawn):
            self._requests[request].events[row] = event
        elif isinstance(event, Finished):
            self._requests[request].ends[row] = event

    @torch.no_grad()
    def selected(self) -> list[tuple[AnswerRequest, Event]]:
        """The best image and the end of every request whose candidates are all drawn."""
        events: list[tuple[AnswerRequest, Event]] = []
        complete = [request for request, drawn in self._requests.items() if len(drawn.ends) == len(drawn.rows)]
        for best_of in dict.fromkeys(request.options.best_of for request in complete):
            same = [request for request in complete if request.options.best_of == best_of]
            found = [self._requests.pop(request) for request in same]
            candidates = [replace(one, image=place) for place, drawn in enumerate(found) for one in drawn.candidates]
            codes = torch.stack([drawn.events[row].codes for drawn in found for row in drawn.rows])
            if best_of not in self._selectors:
                self._selectors[best_of] = make_selector(self._model, self._processor, best_of, judge=None)
            choices = self._selectors[best_of].add(candidates, codes)
            pixels = self._model.vision_tower.decode_pixels(torch.stack([one.codes for one in choices]))
            images = self._processor.image_processor.to_pil(pixels)
            for request, drawn, choice, image in zip(same, found, choices, images, strict=True):
                row = drawn.rows[choice.candidate.number]
                events += [(request, ImageDrawn(0, 0, image, choice.codes, choice)), (request, drawn.ends[row])]
        return events
