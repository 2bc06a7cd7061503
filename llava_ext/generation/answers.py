"""The answers of a batch of conversations, step by step; conversations can join while others are being answered.

Every step of the language model advances all rows, whether a row writes text or draws. A row that draws has an
unconditional partner row, which has seen only its negative prompt, from the first step with guidance to the last one.
An answer that is one image takes the steps of `generate_images`: its prompt is run with `<|image_start|>`, and it ends
with its last codes. An answer depends only on its own conversation, options and seed, not on the other rows.

B rows, P partners, G = B + P, N positions, L levels, D width of the language model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.generation import LogitsProcessorList

from evotok_plugin.sampling import sample, uniform_noise
from llava_ext.generation.answer_options import AnswerOptions
from llava_ext.generation.answer_settings import TextSettings, process_logits
from llava_ext.generation.events import (
    CandidateDrawn,
    Event,
    Finished,
    ImageDrawn,
    ImagePreview,
    ImageStarted,
    TextDelta,
)
from llava_ext.generation.head_steps import stepper_for
from llava_ext.generation.model_interface import ModelInterface
from llava_ext.generation.options import DrawingOptions
from llava_ext.generation.previews import preview
from llava_ext.generation.prompt_cache import PromptCache, prompt_keys
from llava_ext.generation.row_tensors import RowInputs, append_to_rows, codes_of_rows
from llava_ext.generation.steps import Steps, check_room
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor

_INCOMPLETE_CHARACTER = "\ufffd"


@dataclass(eq=False)
class _Answer:
    """State of one answer: it writes text, draws an image, or is done."""

    number: int  # in the events
    row: int  # of the steps
    options: AnswerOptions  # complete
    seed: int
    noise: torch.Generator
    prompt: tuple[int, ...]  # ids
    room: int  # steps that it can still take
    processors: LogitsProcessorList
    ids: list[int] = field(default_factory=list)
    num_text_tokens: int = 0
    words: list[int] = field(default_factory=list)  # text ids since the last image
    shown: str = ""  # the part of their text that was emitted
    num_images: int = 0
    image_noise: Sequence[Tensor] | None = None  # (codes per step) for each step of the image being drawn
    drawn: list[tuple[Tensor, int]] = field(default_factory=list)  # of its steps, as in `codes_of_rows`
    guided: range = range(0)  # its steps with guidance
    unguided: list[Tensor] = field(default_factory=list)  # inputs (1, D) after its steps before those with guidance
    must_close: bool = False  # the image is complete, <|image_end|> comes next
    done: bool = False

    @property
    def in_image(self) -> bool:
        return self.image_noise is not None and not self.done

    @property
    def may_be_guided(self) -> bool:
        return self.options.drawing.guided and self.options.max_images > 0


class Answers:
    """A batch of answers in progress: `admit` adds conversations, `step` advances all of them."""

    def __init__(self, model: ModelInterface, processor: EvoTokLlavaProcessor, settings: TextSettings) -> None:
        """
        Args:
            model: in evaluation mode.
        """
        self._model, self._processor, self._settings = model, processor, settings
        self._stepper, self._limit = stepper_for(model), model.config.max_positions
        self._rows: list[_Answer] = []
        self._steps: Steps | None = None
        self._partnered: list[_Answer] = []  # the rows that have a partner, in the order of the partners
        self._prompts = PromptCache()
        self._num_admitted, self._ends, self._device = 0, settings.ends, model.device
        start = processor.image_start_id
        never = [token for token in model.image_token_ids if token != start]
        self._never_written = torch.tensor(never, device=self._device)
        self._filler = self._embed([processor.image_end_id])  # input of rows that are done

    @property
    def num_active(self) -> int:
        """The number of answers that are not complete."""
        return sum(not row.done for row in self._rows)

    @property
    def _image_steps(self) -> int:
        """Steps of an image with its delimiters."""
        return self._stepper.steps_per_image + 2

    @property
    def _steps_after_start(self) -> int:
        """Steps of an image with its last delimiter."""
        return self._image_steps - 1

    # Rows ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def admit(
        self,
        inputs: dict[str, Tensor],
        options: Sequence[AnswerOptions],
        seeds: Sequence[int],
        conversations: Sequence[int] | None = None,
    ) -> list[int]:
        """Run conversations through the model, and answer them from the next step on.

        Args:
            inputs: result of `processor.apply_chat_template(..., add_generation_prompt=True, tokenize=True)`.
            options: complete, one per answer.
            seeds: one per answer.
            conversations: for each answer the row of `inputs` that it answers; by default one answer per row.

        Returns:
            the number of every answer in the events, counted from 0 over all that were admitted.

        Raises:
            UserError: a conversation leaves no room for an answer; nothing has changed then.
        """
        num_rows = len(inputs["input_ids"])
        places = range(num_rows) if conversations is None else conversations
        prompts = prompt_keys(self._model, inputs)
        keys = [(prompts[place], own.image_first) for place, own in zip(places, options, strict=True)]
        known = {key: self._prompts.get(key) for key in keys}
        after = {key: steps for key, steps in known.items() if steps is not None}
        new_keys = [key for key in known if key not in after]
        embeddings = mask = None
        lengths = {key: steps.taken for key, steps in after.items()}
        if new_keys:
            rows = [places[keys.index(key)] for key in new_keys]
            all_rows = rows == list(range(num_rows))
            new_inputs = inputs if all_rows else self._model.select_rows(inputs, rows)
            embeddings, mask = self._model.embed_prompt(**new_inputs)  # left padding
            start = self._embed([self._processor.image_start_id])
            embeddings, mask = append_to_rows(embeddings, mask, start, [image_first for _, image_first in new_keys])
            lengths |= dict(zip(new_keys, mask.sum(dim=1).tolist(), strict=True))
        for key in known:
            check_room(self._model.config.text_config, lengths[key] + (self._steps_after_start if key[1] else 1))
        new, num_active = list[_Answer](), self.num_active
        for own, seed, key in zip(options, seeds, keys, strict=True):
            number, row, prompt = self._num_admitted + len(new), num_active + len(new), key[0].ids
            noise, processors = torch.Generator().manual_seed(seed), LogitsProcessorList()
            if not own.image_first:
                processors = self._settings.processors(self._model, len(prompt))
            room = self._room_for(own, lengths[key])
            new.append(_Answer(number, row, own, seed, noise, prompt, room, processors))
        for text in dict.fromkeys(row.options.drawing.negative_prompt for row in new if row.may_be_guided):
            self._run_negative_prompt(text)  # an error now, and not when the image starts
        if embeddings is not None and mask is not None:
            together = Steps(self._model.language_model, embeddings, mask, mask.shape[1])
            for key, steps in zip(new_keys, together.split(), strict=True):
                after[key] = steps
                self._prompts.put(key, steps)
        self._drop_done()
        self._join([after[key] for key in keys], new)
        self._num_admitted += len(new)
        self._rows += new
        return [row.number for row in new]

    def _room_for(self, options: AnswerOptions, prompt_length: int) -> int:
        """The steps of the longest answer."""
        if options.image_first:
            return self._steps_after_start
        assert options.max_new_tokens is not None
        wanted = options.max_new_tokens + options.max_images * self._image_steps
        return wanted if self._limit is None else min(wanted, self._limit - prompt_length)

    def _join(self, joining: Sequence[Steps], new: list[_Answer]) -> None:
        """Add the new rows after the others, before the partners."""
        num_free = max(row.room for row in [*self._rows, *new])
        if self._steps is None:
            self._steps = Steps.joined(joining, num_free)
            return
        steps, before, count = self._steps, len(self._rows), self._steps.num_rows
        steps.resize(max(steps.longest, *(one.taken for one in joining)), num_free)
        steps.add_rows(Steps.joined(joining, 0))
        steps.select([*range(before), *range(count, count + len(new)), *range(before, count)])

    def _drop_done(self) -> None:
        """Remove the rows of complete answers, and free the cache if there are no others."""
        kept = [row for row in self._rows if not row.done]
        if len(kept) == len(self._rows):
            return
        if not kept:
            self._rows, self._partnered, self._steps = [], [], None
            return
        self._keep(kept, [row for row in self._partnered if not row.done])

    def _keep(self, rows: list[_Answer], partnered: list[_Answer]) -> None:
        """Keep these rows, and the partners of these rows."""
        assert self._steps is not None
        self._steps.select([*(row.row for row in rows), *map(self._partner_of, partnered)])
        self._rows, self._partnered = rows, partnered
        for place, row in enumerate(rows):
            row.row = place

    def _partner_of(self, row: _Answer) -> int:
        return len(self._rows) + self._partnered.index(row)

    def drop(self, number: int) -> None:
        """Stop an answer."""
        for row in self._rows:
            if row.number == number:
                row.done = True
        if not self.num_active:
            self._drop_done()

    def _run_negative_prompt(self, text: str | None) -> Steps:
        """Run a single row through a negative prompt and `<|image_start|>`."""
        key = ("negative", text)
        if (steps := self._prompts.get(key)) is None:
            prompt = self._processor.drawing_prompts([text]).to(self._device)
            ids, mask = prompt["input_ids"], prompt["attention_mask"]
            check_room(self._model.config.text_config, ids.shape[1] + self._steps_after_start)
            embeddings = self._model.get_input_embeddings()(ids)
            steps = Steps(self._model.language_model, embeddings, mask, ids.shape[1])
            self._prompts.put(key, steps)
        return steps

    def _embed(self, tokens: Sequence[int]) -> Tensor:
        return self._model.get_input_embeddings()(torch.tensor(tokens, device=self._device))

    # The loop ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def run(self) -> Iterator[Event]:
        """Step until all answers are complete, and yield events as they occur."""
        while self.num_active:
            yield from self.step()

    @torch.no_grad()
    def step(self) -> Iterator[Event]:
        """Advance all answers by one step, and yield its events as they occur; all of them must be read."""
        next_inputs = RowInputs(len(self._rows), self._filler)
        yield from self._write_text(next_inputs)
        # An image that has just started waits: the language model has not read its <|image_start|> yet.
        drawing = [row for row in self._rows if row.in_image and row.row not in next_inputs]
        self._add_partners(drawing)
        yield from self._draw(drawing, next_inputs)
        if not self.num_active:
            self._drop_done()
            return
        self._drop_partners()
        assert self._steps is not None
        inputs = next_inputs.joined([row.row for row in self._partnered])
        for row in self._rows:
            if row.in_image and 0 < len(row.drawn) <= row.guided.start:
                row.unguided.append(inputs[row.row : row.row + 1])
        self._steps.step(inputs)
        for row in self._rows:
            row.room -= 1
        if 2 * self.num_active <= len(self._rows):  # not for every row: each time, the whole cache is copied
            self._drop_done()

    def _add_partners(self, drawing: Sequence[_Answer]) -> None:
        """Add the partners that the next codes of these rows are the first to be drawn with."""
        groups: dict[tuple[str | None, int], list[_Answer]] = {}
        for row in drawing:
            if row.guided and len(row.drawn) == row.guided.start:
                groups.setdefault((row.options.drawing.negative_prompt, len(row.unguided)), []).append(row)
        for (text, count), together in groups.items():
            partners = Steps.joined([self._run_negative_prompt(text)] * len(together), count)
            if count:
                partners.run(torch.stack([torch.cat(row.unguided) for row in together]))
            assert self._steps is not None
            self._steps.add_rows(partners)
            self._partnered += together
            for row in together:
                row.unguided = []

    def _drop_partners(self) -> None:
        """Drop the partners that no further codes are drawn with."""
        kept = [row for row in self._partnered if row.in_image and len(row.drawn) in row.guided]
        if len(kept) < len(self._partnered):
            self._keep(self._rows, kept)

    # Text ----------------------------------------------------------------------------------------------------

    def _write_text(self, next_inputs: RowInputs) -> Iterator[Event]:
        """Choose the next token of every row that writes text."""
        for row in self._rows:
            if row.options.image_first and not row.ids and not row.done:  # its prompt ends with <|image_start|>
                row.ids.append(self._processor.image_start_id)
                yield ImageStarted(row.number, row.num_images)
                self._start_image(row)
        rows = [row for row in self._rows if not row.done and not row.in_image]
        if not rows:
            return
        tokens = self._choose(rows)
        next_inputs.set([row.row for row in rows], self._embed(tokens))
        for row, token in zip(rows, tokens, strict=True):
            row.ids.append(token)
            if row.must_close:
                row.must_close = False
                if row.room <= 0:
                    yield from self._finish(row)
            elif token == self._processor.image_start_id:
                yield from self._emit_text(row, last=True)
                yield ImageStarted(row.number, row.num_images)
                self._start_image(row)
            else:
                yield from self._append_token(row, token)

    def _append_token(self, row: _Answer, token: int) -> Iterator[Event]:
        row.num_text_tokens += 1
        ended = token in self._ends
        if not ended:
            row.words.append(token)
        assert row.options.max_new_tokens is not None
        no_room = row.num_text_tokens >= row.options.max_new_tokens or row.room <= 0
        yield from self._emit_text(row, last=ended or no_room)
        if ended or no_room:
            yield from self._finish(row)

    def _choose(self, rows: list[_Answer]) -> list[int]:
        """Choose the next token of each row."""
        noise = torch.cat([torch.rand(1, generator=row.noise) for row in rows])  # also of rows that do not choose
        tokens = [self._processor.image_end_id] * len(rows)
        free = [index for index, row in enumerate(rows) if not row.must_close]
        if not free:
            return tokens
        logits = self._logits([rows[index] for index in free])
        for sampling in dict.fromkeys(rows[index].options.text for index in free):
            assert sampling is not None
            same = [place for place, index in enumerate(free) if rows[index].options.text == sampling]
            own = noise[[free[place] for place in same]]
            for place, token in zip(same, sample(logits[same], sampling, own).tolist(), strict=True):
                tokens[free[place]] = token
        return tokens

    def _logits(self, rows: list[_Answer]) -> Tensor:
        """The logits (rows, V) of the next tokens, -inf where a token cannot be written."""
        assert self._steps is not None
        logits = self._model.lm_head(self._steps.hidden[[row.row for row in rows]]).float()
        for index, row in enumerate(rows):
            if len(row.processors):
                ids = torch.tensor([*row.prompt, *row.ids], device=self._device)
                logits[index] = process_logits(row.processors, ids, logits[index : index + 1])[0]
        logits[:, self._never_written] = -torch.inf
        for index, row in enumerate(rows):
            if row.num_images >= row.options.max_images or row.room < self._image_steps:
                logits[index, self._processor.image_start_id] = -torch.inf
        return logits

    def _emit_text(self, row: _Answer, last: bool) -> Iterator[Event]:
        """Emit the new text; an incomplete character waits for its remaining bytes unless this is the `last` call."""
        text = self._processor.tokenizer.decode(row.words, skip_special_tokens=True)
        assert isinstance(text, str)  # of one sequence
        if not last and text.endswith(_INCOMPLETE_CHARACTER):
            return
        if len(text) > len(row.shown):
            yield TextDelta(row.number, text[len(row.shown) :])
            row.shown = text

    def _finish(self, row: _Answer) -> Iterator[Event]:
        row.done = True
        yield Finished(row.number, torch.tensor(row.ids), len(row.prompt))

    # Images --------------------------------------------------------------------------------------------------

    def _start_image(self, row: _Answer) -> None:
        stepper = self._stepper
        noise = uniform_noise(row.seed + row.num_images, stepper.steps_per_image, stepper.codes_per_step)
        row.image_noise = noise.to(self._device).unbind()
        row.guided = stepper.guided_steps(row.options.drawing) if row.may_be_guided else range(0)
        row.drawn, row.unguided, row.words, row.shown = [], [], [], ""

    def _draw(self, rows: Sequence[_Answer], next_inputs: RowInputs) -> Iterator[Event]:
        """Run one step of every image; rows are computed together if their settings, levels and guidance are equal,
        whatever their positions are."""
        at_step: dict[tuple[int, int], list[_Answer]] = {}
        for row in rows:  # before any of them is advanced: each row draws once in this call
            at_step.setdefault((len(row.drawn), id(row.options.drawing)), []).append(row)
        groups: dict[tuple[int, DrawingOptions, tuple[float, ...]], list[_Answer]] = {}
        for (step, _), same in at_step.items():
            drawing = same[0].options.drawing
            key = (step % self._stepper.steps_per_position, drawing, tuple(self._stepper.scales_at(step, drawing)))
            groups.setdefault(key, []).extend(same)
        for (kind, drawing, scales), together in groups.items():
            assert self._steps is not None
            numbers = [row.row for row in together]
            partners = [self._partner_of(row) for row in together] if any(scale != 1 for scale in scales) else []
            noise = torch.stack([row.image_noise[len(row.drawn)] for row in together if row.image_noise is not None])
            codes = self._stepper.draw(self._steps.hidden[numbers + partners], kind, noise, drawing, scales)
            positions = torch.tensor([len(row.drawn) // self._stepper.steps_per_position for row in together])
            next_inputs.set(numbers, self._stepper.embed(codes, kind, positions.to(codes.device)))
            for place, row in enumerate(together):
                row.drawn.append((codes, place))
        yield from self._show(rows)

    def _show(self, rows: Sequence[_Answer]) -> Iterator[Event]:
        """Emit the previews that are due after a step, and the complete images; those of the same step are decoded
        together."""
        num_positions, due = self._stepper.num_positions, dict[int, list[_Answer]]()
        for row in rows:
            drawn, partial_position = divmod(len(row.drawn), self._stepper.steps_per_position)
            every = row.options.preview_every
            if not partial_position and (drawn == num_positions or every and drawn % every == 0):
                due.setdefault(drawn, []).append(row)
        for drawn, together in due.items():
            codes = codes_of_rows([row.drawn for row in together]).unflatten(1, (drawn, -1))
            if drawn == num_positions:
                yield from self._end_images(together, codes)
                continue
            for row, image in zip(together, preview(self._model.vision_tower, self._processor, codes), strict=True):
                yield ImagePreview(row.number, row.num_images, image, drawn, num_positions)

    def _end_images(self, rows: Sequence[_Answer], codes: Tensor) -> Iterator[Event]:
        """Emit the complete images of rows with their codes (rows, N, L); candidates are not decoded."""
        shown = [index for index, row in enumerate(rows) if row.options.best_of == 1]
        pixels = self._model.vision_tower.decode_pixels(codes[shown]) if shown else None
        images = iter([] if pixels is None else self._processor.image_processor.to_pil(pixels))
        ids = self._processor.vocabulary.to_ids(codes).flatten(1).tolist()
        for row, own, own_ids in zip(rows, codes, ids, strict=True):
            row.ids += own_ids
            row.image_noise, row.must_close = None, not row.options.image_first
            if row.options.best_of == 1:
                yield ImageDrawn(row.number, row.num_images, next(images), own)
            else:
                yield CandidateDrawn(row.number, own)
            row.num_images += 1
            if row.options.image_first:
                row.ids.append(self._processor.image_end_id)
                yield from self._finish(row)
