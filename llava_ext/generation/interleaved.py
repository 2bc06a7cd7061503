"""Answers with text and images in one document: the model decides when to draw by writing `<|image_start|>`.

Every step of the language model advances all rows of a batch, whether a row writes text or draws. While any row draws
with guidance, each row has an unconditional partner row that has seen only the negative prompt.

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
from llava_ext.generation.best_answers import best_answers
from llava_ext.generation.evaluation_view import evaluation_view
from llava_ext.generation.events import Event, Finished, ImageDrawn, ImagePreview, ImageStarted, TextDelta
from llava_ext.generation.head_steps import stepper_for
from llava_ext.generation.model_interface import ModelInterface
from llava_ext.generation.options import IMAGE_GENERATION, DrawingOptions, read_settings, seeds_for
from llava_ext.generation.previews import preview
from llava_ext.generation.selection_options import SelectionOptions
from llava_ext.generation.steps import Steps, check_room
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor

_INCOMPLETE_CHARACTER = "\ufffd"


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


@dataclass
class _AnswerState:
    """State of one answer: it writes text, draws an image, or is done."""

    number: int
    seed: int
    noise: torch.Generator
    prompt: Tensor  # ids (T,)
    prompt_length: int  # in steps
    processors: LogitsProcessorList
    ids: list[int] = field(default_factory=list)
    num_text_tokens: int = 0
    words: list[int] = field(default_factory=list)  # text ids since the last image
    shown: str = ""  # the part of their text that was emitted
    num_images: int = 0
    image_noise: Tensor | None = None  # (steps, codes per step) of the image being drawn
    drawn: list[Tensor] = field(default_factory=list)  # codes (1, l) of its steps
    must_close: bool = False  # the image is complete, <|image_end|> comes next
    done: bool = False

    @property
    def in_image(self) -> bool:
        return self.image_noise is not None and not self.done


class Answers:
    """Answers to a batch of conversations; `run` generates them."""

    def __init__(
        self,
        model: ModelInterface,
        processor: EvoTokLlavaProcessor,
        inputs: dict[str, Tensor],
        options: AnswerOptions,
        settings: TextSettings,
        seeds: Sequence[int],
    ) -> None:
        """Run the conversations (B rows) through the model.

        Args:
            model: in evaluation mode.
            options: complete, as `InterleavedGenerationMixin._answer` makes them.
        """
        assert options.max_new_tokens is not None and options.text is not None
        self._max_new_tokens, self._text_sampling = options.max_new_tokens, options.text
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
        self._unconditional = self._run_negative_prompt() if options.drawing.guided and options.max_images else None
        missing = 0 if self._unconditional is None else max(0, self._unconditional.taken - mask.shape[1])
        if missing:  # the prompt of a partner row must fit into the steps before the answer
            embeddings = torch.cat([embeddings.new_zeros(len(seeds), missing, embeddings.shape[2]), embeddings], dim=1)
            mask = torch.cat([mask.new_zeros(len(seeds), missing), mask], dim=1)
        self._width = mask.shape[1]
        self._steps = Steps(model.language_model, embeddings, mask, self._width + self._longest_answer(min(lengths)))
        self._ends = settings.ends
        self._filler = self._embed(processor.image_end_id)  # input of rows that are done

    @property
    def _image_steps(self) -> int:
        """Steps of an image with its delimiters."""
        return self._stepper.steps_per_image + 2

    def _check_room(self, longest: int) -> None:
        check_room(self._model.config.text_config, longest + (self._image_steps if self._options.image_first else 1))

    def _longest_answer(self, shortest_prompt: int) -> int:
        wanted = self._max_new_tokens + self._options.max_images * self._image_steps
        return wanted if self._limit is None else min(wanted, self._limit - shortest_prompt)

    def _room(self, row: _AnswerState) -> int:
        """Count the steps that a row can still take, by free slots and by positions of the language model."""
        taken = self._steps.taken - self._width
        positions = self._steps.num_free if self._limit is None else self._limit - row.prompt_length - taken
        return min(self._steps.num_free, positions)

    def _run_negative_prompt(self) -> Steps:
        """Run a single row through the negative prompt, up to where an image would start."""
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
        """Generate the answers and yield events as they occur."""
        while True:
            # The next input of each row, (1, D); None for rows that are done.
            next_inputs: list[Tensor | None] = [None] * len(self._rows)
            yield from self._write_text(next_inputs)
            yield from self._draw(next_inputs)
            if all(row.done for row in self._rows):
                return
            self._update_partners()
            embeddings = torch.cat([self._filler if one is None else one for one in next_inputs])
            self._steps.step(torch.cat([embeddings, embeddings]) if self._has_partners else embeddings)

    @property
    def _has_partners(self) -> bool:
        return self._steps.num_rows > len(self._rows)

    def _update_partners(self) -> None:
        """Keep a partner for every row while any row draws with guidance, and restart it where an image starts."""
        count, drawing = len(self._rows), [row for row in self._rows if row.in_image]
        if self._unconditional is None:
            return
        if not drawing:
            self._steps.select(list(range(count)))
        elif not self._has_partners:
            self._steps.add_rows(self._unconditional, count)
        else:
            for row in drawing:
                if not row.drawn:
                    self._steps.restart_row(count + row.number, self._unconditional)

    # Text ----------------------------------------------------------------------------------------------------

    def _write_text(self, next_inputs: list[Tensor | None]) -> Iterator[Event]:
        """Choose the next token of every row that writes text."""
        rows = [row for row in self._rows if not row.done and not row.in_image]
        if not rows:
            return
        tokens = self._choose(rows)
        for row, token in zip(rows, tokens, strict=True):
            row.ids.append(token)
            next_inputs[row.number] = self._embed(token)
            if row.must_close:
                row.must_close = False
                if self._options.image_first or self._room(row) <= 0:
                    yield from self._finish(row)
            elif token == self._processor.image_start_id:
                yield from self._emit_text(row, last=True)
                yield ImageStarted(row.number, row.num_images)
                self._start_image(row)
            else:
                yield from self._append_token(row, token)

    def _append_token(self, row: _AnswerState, token: int) -> Iterator[Event]:
        row.num_text_tokens += 1
        ended = token in self._ends
        if not ended:
            row.words.append(token)
        no_room = row.num_text_tokens >= self._max_new_tokens or self._room(row) <= 0
        yield from self._emit_text(row, last=ended or no_room)
        if ended or no_room:
            yield from self._finish(row)

    def _choose(self, rows: list[_AnswerState]) -> list[int]:
        """Choose the next token of each row."""
        hidden = self._steps.hidden[[row.number for row in rows]]
        logits = self._model.lm_head(hidden).float()
        for index, row in enumerate(rows):
            if len(row.processors):
                ids = torch.cat([row.prompt, row.prompt.new_tensor(row.ids)])
                logits[index] = process_logits(row.processors, ids, logits[index : index + 1])[0]
        start = self._processor.image_start_id
        logits[:, [token for token in self._model.image_token_ids if token != start]] = -torch.inf
        forced: dict[int, int] = {}
        for index, row in enumerate(rows):
            if row.must_close:
                forced[index] = self._processor.image_end_id
            elif self._options.image_first and not row.ids:
                forced[index] = self._processor.image_start_id
            elif row.num_images >= self._options.max_images or self._room(row) < self._image_steps:
                logits[index, self._processor.image_start_id] = -torch.inf
        noise = torch.cat([torch.rand(1, generator=row.noise) for row in rows])
        chosen = sample(logits, self._text_sampling, noise).tolist()
        return [forced.get(index, token) for index, token in enumerate(chosen)]

    def _emit_text(self, row: _AnswerState, last: bool) -> Iterator[Event]:
        """Emit the new text; an incomplete character waits for its remaining bytes unless this is the `last` call."""
        text = self._processor.tokenizer.decode(row.words, skip_special_tokens=True)
        assert isinstance(text, str)  # of one sequence
        if not last and text.endswith(_INCOMPLETE_CHARACTER):
            return
        if len(text) > len(row.shown):
            yield TextDelta(row.number, text[len(row.shown) :])
            row.shown = text

    def _finish(self, row: _AnswerState) -> Iterator[Event]:
        row.done = True
        yield Finished(row.number, torch.tensor(row.ids))

    # Images --------------------------------------------------------------------------------------------------

    def _start_image(self, row: _AnswerState) -> None:
        seed, stepper = row.seed + row.num_images, self._stepper
        row.image_noise = uniform_noise(seed, stepper.steps_per_image, stepper.codes_per_step).to(self._model.device)
        row.drawn, row.words, row.shown = [], [], ""

    def _draw(self, next_inputs: list[Tensor | None]) -> Iterator[Event]:
        """Run one step of every image; rows at the same step of their images are computed together."""
        # An image that has just started waits: the language model has not read its <|image_start|> yet.
        rows = [row for row in self._rows if row.in_image and next_inputs[row.number] is None]
        steps = {row.number: len(row.drawn) for row in rows}  # before this call: each row draws once in it
        for step in sorted(set(steps.values())):
            together = [row for row in rows if steps[row.number] == step]
            numbers = [row.number for row in together]
            partners = [len(self._rows) + n for n in numbers] if self._has_partners else []
            noise = torch.stack([row.image_noise[step] for row in together if row.image_noise is not None])
            scales = self._stepper.scales_at(step, self._options.drawing)
            hidden = self._steps.hidden[numbers + partners]
            codes = self._stepper.draw(hidden, step, noise, self._options.drawing, scales)
            embeddings = self._stepper.embed(codes, step, step // self._stepper.steps_per_position)
            for index, row in enumerate(together):
                row.drawn.append(codes[index : index + 1])
                next_inputs[row.number] = embeddings[index : index + 1]
                yield from self._after_step(row)

    def _after_step(self, row: _AnswerState) -> Iterator[Event]:
        """Emit a preview if one is due, and the image when it is complete."""
        vision, tower, every = self._model.config.vision_config, self._model.vision_tower, self._options.preview_every
        drawn, partial_position = divmod(len(row.drawn), self._stepper.steps_per_position)
        complete = drawn == vision.num_positions
        if partial_position or not (complete or every and drawn % every == 0):
            return
        codes = torch.cat(row.drawn, dim=1).unflatten(1, (-1, vision.pixel_depth))  # (1, p, L)
        if not complete:
            image = preview(tower, self._processor, codes)[0]
            yield ImagePreview(row.number, row.num_images, image, drawn, vision.num_positions)
            return
        image = self._processor.image_processor.to_pil(tower.decode_pixels(codes))[0]
        row.ids += self._processor.vocabulary.to_ids(codes[0]).flatten().tolist()
        row.image_noise, row.must_close = None, True
        yield ImageDrawn(row.number, row.num_images, image, codes[0])
        row.num_images += 1


class InterleavedGenerationMixin(ModelInterface):
    """`stream` and `generate(modalities=...)` of the model class."""

    @torch.no_grad()
    def stream(
        self,
        inputs: dict[str, Tensor],
        processor: EvoTokLlavaProcessor,
        options: AnswerOptions | None = None,
        seed: int | Sequence[int] = 0,
        prompts: Sequence[str] | None = None,
    ) -> Iterator[Event]:
        """Answer conversations with text and images; yields events as they occur.

        Args:
            inputs: result of `processor.apply_chat_template(..., add_generation_prompt=True, tokenize=True)`, B rows.
            options: options that differ from the model's `generation_config` and the default of four images.
            seed: one per row, or an int: row b gets seed + b. Image i of a row is drawn with the row's seed + i.
            prompts: for `best_of` above 1, one per row: what its image should show.

        Raises:
            UserError: as `generate`.
        """
        yield from self._answer(inputs, processor, options or AnswerOptions(), text_settings(self), seed, prompts)

    @torch.no_grad()
    def _answer(
        self,
        inputs: dict[str, Tensor],
        processor: EvoTokLlavaProcessor,
        options: AnswerOptions,
        settings: TextSettings,
        seed: int | Sequence[int],
        prompts: Sequence[str] | None,
    ) -> Iterator[Event]:
        """Complete the options from the settings and from the model, then yield the events of the answers."""
        self.config.check_processor(processor)
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        seeds = seeds_for(seed, inputs["input_ids"].shape[0], "one per conversation")
        max_new_tokens = options.max_new_tokens
        if max_new_tokens is None:
            max_new_tokens = MAX_NEW_TOKENS if settings.max_new_tokens is None else settings.max_new_tokens
            if settings.max_new_tokens is None and settings.max_length is not None:
                max_new_tokens = max(1, settings.max_length - inputs["input_ids"].shape[1])
        text = settings.sampling if options.text is None else options.text
        drawing = options.drawing.for_model(self)
        options = replace(options, max_new_tokens=max_new_tokens, text=text, drawing=drawing)
        view = evaluation_view(self)

        def run(inputs: dict[str, Tensor], seeds: Sequence[int]) -> Iterator[Event]:
            return Answers(view, processor, inputs, options, settings, seeds).run()

        yield from best_answers(run, self, processor, inputs, seeds, options.best_of, prompts)

    def generate(self, *args: Any, modalities: str | None = None, **kwargs: Any) -> Any:
        """Generate text with transformers' `generate`, or with `modalities` also images.

        Args:
            modalities: "text", the default, is transformers' own method with all its options; it never writes image
                tokens. With "auto" the model chooses, with "image" it draws one image. Both take `processor` (by
                default that of the model's folder), `seed`, `max_images`, `drawing` (`DrawingOptions`), and
                transformers' settings of length, sampling and logits processors, as keywords, in `generation_config` or
                in the model's; any other setting is an error. "image" also takes `best_of` (`AnswerOptions`) and
                `prompts` (`stream`).
            generation_mode: the name of `modalities` in transformers' pipelines.

        Returns:
            Ids (B, T) of prompt and answer: text, delimiters and residual tokens; short answers are padded on the
            right. `processor.decode(ids, images_from=model.vision_tower)` splits an answer into text and images.

        Raises:
            UserError: modalities or settings are unknown, or a prompt leaves no room for an answer.
        """
        if (mode := kwargs.pop("generation_mode", None)) is not None:
            if modalities not in (None, mode):
                raise UserError(f"generation_mode={mode!r} and modalities={modalities!r} differ; give one of them")
            modalities = mode
        if modalities in (None, "text"):
            return super().generate(*args, **kwargs)  # type: ignore[misc]  # annotates `self` as PreTrainedModel
        if modalities not in ("auto", "image"):
            raise UserError(f"modalities: expected 'text', 'image' or 'auto', got {modalities!r}")
        return self._generate_documents(  # type: ignore[misc]  # mypy: *args might contain image_first
            *args, image_first=modalities == "image", **kwargs
        )

    def _generate_documents(
        self,
        input_ids: Tensor,
        processor: EvoTokLlavaProcessor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_codes: Tensor | None = None,
        image_first: bool = False,
        max_images: int = 4,
        drawing: DrawingOptions | None = None,
        seed: int | Sequence[int] = 0,
        best_of: int = 1,
        prompts: Sequence[str] | None = None,
        generation_config: GenerationConfig | None = None,
        **text: Any,
    ) -> Tensor:
        if processor is None:
            if not self.config._name_or_path:
                raise UserError("generate with images needs the model's processor; pass processor=...")
            processor = EvoTokLlavaProcessor.from_pretrained(self.config._name_or_path)
        settings = text_settings(self, generation_config, text)
        own = read_settings(getattr(generation_config, IMAGE_GENERATION, None) or {})
        drawing = (drawing or DrawingOptions()).above(own)
        options = AnswerOptions(text.get("max_new_tokens"), max_images, image_first, drawing=drawing, best_of=best_of)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        inputs = {"input_ids": input_ids, "attention_mask": mask}
        images = {"pixel_values": pixel_values, "image_codes": image_codes}
        inputs |= {name: value for name, value in images.items() if value is not None}
        answers: dict[int, Tensor] = {}
        for event in self._answer(inputs, processor, options, settings, seed, prompts):
            if isinstance(event, Finished):
                answers[event.row] = event.ids
        pad = processor.pad_id if settings.pad_token_id is None else settings.pad_token_id
        written = processor.pad([answers[row] for row in range(len(answers))], pad, side="right")
        return torch.cat([input_ids, written.to(input_ids.device)], dim=1)
