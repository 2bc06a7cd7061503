"""Answers of text and images in one document: the model decides when to draw, by writing `<|image_start|>`.

Every step of the language model serves all rows of a batch, be they in text or in an image. While any row draws with
guidance, each has a second one beside it that has seen nothing but the negative prompt.

B rows, G = B or 2 B, N positions, L levels, D width of the language model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import LogitsProcessorList

from evotok_plugin.errors import UserError
from evotok_plugin.sampling import SamplingOptions, sample, uniform_noise
from llava_ext.generation.answer_settings import MAX_NEW_TOKENS, TextSettings, process_logits, text_settings
from llava_ext.generation.evaluation_view import evaluation_view
from llava_ext.generation.events import Event, Finished, ImageDrawn, ImagePreview, ImageStarted, TextDelta
from llava_ext.generation.head_steps import stepper_for
from llava_ext.generation.options import IMAGE_GENERATION, DrawingOptions, read_settings, seeds_for
from llava_ext.generation.previews import preview
from llava_ext.generation.steps import Steps, check_room

_HALF_A_CHARACTER = "\ufffd"


@dataclass(frozen=True)
class AnswerOptions:
    """What an answer may hold and how it is written.

    Attributes:
        max_new_tokens: text tokens of a whole answer, delimiters not counted; an image that is begun is finished. None
            takes the model's (`generation_config`), 256 where it has none. An answer ends where the language model's
            positions end.
        max_images: images of an answer.
        image_first: begin with an image, whatever the model would have chosen, and stop behind it.
        text: how words are chosen; None takes the model's `generation_config`: greedily unless it sets `do_sample`.
        drawing: how images are drawn, where it differs from the model's own settings.
        preview_every: positions between two previews of an image; 0 is none.

    Raises:
        UserError: a number below 0, or an answer that could hold nothing.
    """

    max_new_tokens: int | None = None
    max_images: int = 4
    image_first: bool = False
    text: SamplingOptions | None = None
    drawing: DrawingOptions = field(default_factory=DrawingOptions)
    preview_every: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "max_images", "preview_every"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise UserError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.image_first and not self.max_images:
            raise UserError("an image is asked for but max_images is 0")
        if self.max_new_tokens == 0 and not self.image_first:
            raise UserError("max_new_tokens must be at least 1: the model has no room to answer")


@dataclass
class _AnswerState:
    """An answer in the making: in text, in an image (`step` counts its steps), or done."""

    number: int
    seed: int
    noise: torch.Generator
    prompt: Tensor  # ids (T,)
    prompt_length: int  # in steps
    processors: LogitsProcessorList
    ids: list[int] = field(default_factory=list)
    num_text_tokens: int = 0
    words: list[int] = field(default_factory=list)  # text since the last image
    shown: str = ""  # what of it was handed out
    num_images: int = 0
    image_noise: Tensor | None = None  # (steps, codes a step) of the image being drawn
    drawn: list[Tensor] = field(default_factory=list)  # codes (1, l) of its steps
    must_close: bool = False  # its last codes stand, <|image_end|> does not yet
    done: bool = False

    @property
    def in_image(self) -> bool:
        return self.image_noise is not None and not self.done


class Answers:
    """Answers to a batch of conversations; `run` writes them."""

    def __init__(
        self,
        model,
        processor,
        inputs: dict[str, Tensor],
        options: AnswerOptions,
        settings: TextSettings,
        seeds: Sequence[int],
    ) -> None:
        """Take in the conversations (B rows) for a model in evaluation mode; the options are complete."""
        self._model, self._processor, self._options = model, processor, options
        self._stepper, self._limit = stepper_for(model), model.config.max_positions
        embeddings, mask = model.embed_prompt(**inputs)  # (B, S, D) and (B, S), padded on the left
        lengths = mask.sum(dim=1).tolist()
        prompts = [row[real.bool()] for row, real in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
        self._rows = [
            _AnswerState(
                number,
                seed,
                torch.Generator().manual_seed(seed),
                prompt,
                length,
                settings.processors(model, prompt.shape[0]),
            )
            for number, (seed, prompt, length) in enumerate(zip(seeds, prompts, lengths, strict=True))
        ]
        self._check_room(max(lengths))
        self._unprompted = self._without_prompt() if options.drawing.guided and options.max_images else None
        missing = 0 if self._unprompted is None else max(0, self._unprompted.taken - mask.shape[1])
        if missing:  # a partner's prompt must fit into the steps behind it
            embeddings = torch.cat([embeddings.new_zeros(len(seeds), missing, embeddings.shape[2]), embeddings], dim=1)
            mask = torch.cat([mask.new_zeros(len(seeds), missing), mask], dim=1)
        self._width = mask.shape[1]
        self._steps = Steps(model.language_model, embeddings, mask, self._width + self._longest_answer(min(lengths)))
        self._ends = settings.ends
        self._filler = self._embed(processor.image_end_id)

    @property
    def _image_steps(self) -> int:
        """Steps of an image and of what stands around it."""
        return self._stepper.steps_per_image + 2

    def _check_room(self, longest: int) -> None:
        check_room(self._model.config.text_config, longest + (self._image_steps if self._options.image_first else 1))

    def _longest_answer(self, shortest_prompt: int) -> int:
        wanted = self._options.max_new_tokens + self._options.max_images * self._image_steps
        return wanted if self._limit is None else min(wanted, self._limit - shortest_prompt)

    def _room(self, row: _AnswerState) -> int:
        """Steps that a row may still take: so far as there are slots, and as the language model sees."""
        taken = self._steps.taken - self._width
        seen = self._steps.num_free if self._limit is None else self._limit - row.prompt_length - taken
        return min(self._steps.num_free, seen)

    def _without_prompt(self) -> Steps:
        """A row that has seen the negative prompt up to where an image would begin."""
        prompt = self._processor.drawing_prompts([self._options.drawing.negative_prompt]).to(self._model.device)
        ids, mask = prompt["input_ids"][:, :-1], prompt["attention_mask"][:, :-1]
        check_room(self._model.config.text_config, ids.shape[1] + self._image_steps)
        embeddings = self._model.get_input_embeddings()(ids)
        return Steps(self._model.language_model, embeddings, mask, ids.shape[1])

    def _embed(self, token: int) -> Tensor:
        return self._model.get_input_embeddings()(torch.tensor([token], device=self._model.device))

    # The loop ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def run(self) -> Iterator[Event]:
        """Write the answers; what happens comes as it happens."""
        while True:
            following: list[Tensor | None] = [None] * len(self._rows)
            yield from self._write_text(following)
            yield from self._draw(following)
            if all(row.done for row in self._rows):
                return
            self._pair_up()
            embeddings = torch.cat([self._filler if f is None else f for f in following])
            self._steps.step(torch.cat([embeddings, embeddings]) if self._has_partners else embeddings)

    @property
    def _has_partners(self) -> bool:
        return self._steps.num_rows > len(self._rows)

    def _pair_up(self) -> None:
        """A partner for every row as long as one draws with guidance; a new one where an image is about to begin."""
        count, drawing = len(self._rows), [row for row in self._rows if row.in_image]
        if self._unprompted is None:
            return
        if not drawing:
            self._steps.select(list(range(count)))
        elif not self._has_partners:
            self._steps.add_rows(self._unprompted, count)
        else:
            for row in drawing:
                if not row.drawn:
                    self._steps.restart_row(count + row.number, self._unprompted)

    # Text ----------------------------------------------------------------------------------------------------

    def _write_text(self, following: list[Tensor | None]) -> Iterator[Event]:
        rows = [row for row in self._rows if not row.done and not row.in_image]
        if not rows:
            return
        tokens = self._choose(rows)
        for row, token in zip(rows, tokens, strict=True):
            row.ids.append(token)
            following[row.number] = self._embed(token)
            if row.must_close:
                row.must_close = False
                if self._options.image_first or self._room(row) <= 0:
                    yield from self._finish(row)
            elif token == self._processor.image_start_id:
                yield from self._say(row, last=True)
                yield ImageStarted(row.number, row.num_images)
                self._begin_image(row)
            else:
                yield from self._write(row, token)

    def _write(self, row: _AnswerState, token: int) -> Iterator[Event]:
        row.num_text_tokens += 1
        ended = token in self._ends
        if not ended:
            row.words.append(token)
        no_room = row.num_text_tokens >= self._options.max_new_tokens or self._room(row) <= 0
        yield from self._say(row, last=ended or no_room)
        if ended or no_room:
            yield from self._finish(row)

    def _choose(self, rows: list[_AnswerState]) -> list[int]:
        """The next token of each row."""
        hidden = self._steps.hidden[[row.number for row in rows]]
        logits = self._model.lm_head(hidden).float()
        for place, row in enumerate(rows):
            if len(row.processors):
                ids = torch.cat([row.prompt, row.prompt.new_tensor(row.ids)])
                logits[place] = process_logits(row.processors, ids, logits[place : place + 1])[0]
        start = self._processor.image_start_id
        logits[:, [token for token in self._model.image_token_ids if token != start]] = -torch.inf
        forced: dict[int, int] = {}
        for place, row in enumerate(rows):
            if row.must_close:
                forced[place] = self._processor.image_end_id
            elif self._options.image_first and not row.ids:
                forced[place] = self._processor.image_start_id
            elif row.num_images >= self._options.max_images or self._room(row) < self._image_steps:
                logits[place, self._processor.image_start_id] = -torch.inf
        noise = torch.cat([torch.rand(1, generator=row.noise) for row in rows])
        chosen = sample(logits, self._options.text, noise).tolist()
        return [forced.get(place, token) for place, token in enumerate(chosen)]

    def _say(self, row: _AnswerState, last: bool) -> Iterator[Event]:
        """Hand out what is new of the text, but no half of a character while the other half may come."""
        text = self._processor.tokenizer.decode(row.words, skip_special_tokens=True)
        if not last and text.endswith(_HALF_A_CHARACTER):
            return
        if len(text) > len(row.shown):
            yield TextDelta(row.number, text[len(row.shown) :])
            row.shown = text

    def _finish(self, row: _AnswerState) -> Iterator[Event]:
        row.done = True
        yield Finished(row.number, torch.tensor(row.ids))

    # Images --------------------------------------------------------------------------------------------------

    def _begin_image(self, row: _AnswerState) -> None:
        seed, stepper = row.seed + row.num_images, self._stepper
        row.image_noise = uniform_noise(seed, stepper.steps_per_image, stepper.codes_per_step).to(self._model.device)
        row.drawn, row.words, row.shown = [], [], ""

    def _draw(self, following: list[Tensor | None]) -> Iterator[Event]:
        """One step of every image; rows at the same step of theirs go together."""
        # An image that has just begun waits: the language model has not seen its <|image_start|>.
        rows = [row for row in self._rows if row.in_image and following[row.number] is None]
        steps = {row.number: len(row.drawn) for row in rows}  # of now: a row that draws is not to draw again
        for step in sorted(set(steps.values())):
            together = [row for row in rows if steps[row.number] == step]
            numbers = [row.number for row in together]
            partners = [len(self._rows) + n for n in numbers] if self._has_partners else []
            noise = torch.stack([row.image_noise[step] for row in together])
            scale = self._stepper.scale_at(step, self._options.drawing)
            hidden, sampling = self._steps.hidden[numbers + partners], self._options.drawing.sampling
            codes = self._stepper.draw(hidden, step, noise, sampling, scale)
            embeddings = self._stepper.embed(codes, step, step // self._stepper.steps_per_position)
            for place, row in enumerate(together):
                row.drawn.append(codes[place : place + 1])
                following[row.number] = embeddings[place : place + 1]
                yield from self._after_step(row)

    def _after_step(self, row: _AnswerState) -> Iterator[Event]:
        """Show what is drawn; put an image that is whole into the answer."""
        vision, tower, every = self._model.config.vision_config, self._model.vision_tower, self._options.preview_every
        drawn, part_of_a_position = divmod(len(row.drawn), self._stepper.steps_per_position)
        whole = drawn == vision.num_positions
        if part_of_a_position or not (whole or every and drawn % every == 0):
            return
        codes = torch.cat(row.drawn, dim=1).unflatten(1, (-1, vision.pixel_depth))  # (1, p, L)
        if not whole:
            image = preview(tower, self._processor, codes)[0]
            yield ImagePreview(row.number, row.num_images, image, drawn, vision.num_positions)
            return
        image = self._processor.image_processor.to_pil(tower.decode_pixels(codes))[0]
        row.ids += self._processor.vocabulary.to_ids(codes[0]).flatten().tolist()
        row.image_noise, row.must_close = None, True
        yield ImageDrawn(row.number, row.num_images, image, codes[0])
        row.num_images += 1


class InterleavedGenerationMixin:
    """`stream`, and `generate(modalities=...)`, for a model with a language model, an image head and a tokenizer."""

    @torch.no_grad()
    def stream(
        self,
        inputs: dict[str, Tensor],
        processor,
        options: AnswerOptions | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Iterator[Event]:
        """Answer conversations with text and images; what happens comes as it happens.

        Args:
            inputs: what `processor.apply_chat_template(..., add_generation_prompt=True, tokenize=True)` gives, B rows.
            options: what differs from the model's `generation_config`, and up to four images.
            seed: one a row, or an int: row b gets seed + b; image i of a row is drawn with the row's seed + i.

        Raises:
            UserError: as `generate` does.
        """
        yield from self._answer(inputs, processor, options or AnswerOptions(), text_settings(self), seed)

    @torch.no_grad()
    def _answer(
        self,
        inputs: dict[str, Tensor],
        processor,
        options: AnswerOptions,
        settings: TextSettings,
        seed: int | Sequence[int],
    ) -> Iterator[Event]:
        """The events of answers; what the options leave out is taken from the settings and from the model."""
        self.config.check_processor(processor)
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        seeds = seeds_for(seed, inputs["input_ids"].shape[0], "one a conversation")
        most = options.max_new_tokens
        if most is None:
            most = MAX_NEW_TOKENS if settings.max_new_tokens is None else settings.max_new_tokens
            if settings.max_new_tokens is None and settings.max_length is not None:
                most = max(1, settings.max_length - inputs["input_ids"].shape[1])
        text = settings.sampling if options.text is None else options.text
        options = replace(options, max_new_tokens=most, text=text, drawing=options.drawing.for_model(self))
        yield from Answers(evaluation_view(self), processor, inputs, options, settings, seeds).run()

    def generate(self, *args, modalities: str = "text", **kwargs):
        """transformers' `generate` for text; with `modalities` also images.

        Args:
            modalities: "text" is transformers' own and takes all that it does; it never writes image tokens. "auto"
                lets the model choose, "image" has it draw one image. Both take `processor`, `seed`, `max_images`,
                `drawing`, a `DrawingOptions`, and of transformers' settings, as keywords, in `generation_config` or in
                the model's, those of length, sampling and logits processors; any other is an error.

        Returns:
            ids (B, T): the prompt's and the answer's, text, delimiters and residual tokens; short answers are padded on
            the right. `processor.decode(ids, images_from=model.vision_tower)` takes an answer apart.

        Raises:
            UserError: unknown modalities or settings, or a prompt that leaves no room for an answer.
        """
        if modalities == "text":
            return super().generate(*args, **kwargs)
        if modalities not in ("auto", "image"):
            raise UserError(f"modalities: expected 'text', 'image' or 'auto', got {modalities!r}")
        return self._generate_documents(*args, image_first=modalities == "image", **kwargs)

    def _generate_documents(
        self,
        input_ids: Tensor,
        processor=None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_codes: Tensor | None = None,
        image_first: bool = False,
        max_images: int = 4,
        drawing: DrawingOptions | None = None,
        seed: int | Sequence[int] = 0,
        generation_config: GenerationConfig | None = None,
        **text: Any,
    ) -> Tensor:
        if processor is None:
            raise UserError("generate with images needs processor=, the model's own")
        settings = text_settings(self, generation_config, text)
        own = read_settings(getattr(generation_config, IMAGE_GENERATION, None) or {})
        options = AnswerOptions(
            text.get("max_new_tokens"), max_images, image_first, drawing=(drawing or DrawingOptions()).above(own)
        )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        inputs = {"input_ids": input_ids, "attention_mask": mask}
        images = {"pixel_values": pixel_values, "image_codes": image_codes}
        inputs |= {name: value for name, value in images.items() if value is not None}
        answers: dict[int, Tensor] = {}
        for event in self._answer(inputs, processor, options, settings, seed):
            if isinstance(event, Finished):
                answers[event.row] = event.ids
        pad = processor.pad_id if settings.pad_token_id is None else settings.pad_token_id
        written = processor.pad([answers[row] for row in range(len(answers))], pad, side="right")
        return torch.cat([input_ids, written.to(input_ids.device)], dim=1)
