"""Answers with text and images in one document: the model decides when to draw by writing `<|image_start|>`.

T tokens of prompt and answer.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from evotok_plugin.errors import UserError
from llava_ext.generation.answer_options import AnswerOptions
from llava_ext.generation.answer_settings import TextSettings, text_settings
from llava_ext.generation.answers import Answers
from llava_ext.generation.best_answers import best_answers
from llava_ext.generation.evaluation_view import evaluation_view
from llava_ext.generation.events import Event, Finished
from llava_ext.generation.model_interface import ModelInterface
from llava_ext.generation.options import IMAGE_GENERATION, DrawingOptions, read_settings, seeds_for
from llava_ext.generation.thin_view import thin_view
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor


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
        options = options.complete(self, settings, inputs["input_ids"].shape[1])
        view = thin_view(evaluation_view(self))

        def run(rows_each: int, seeds: Sequence[int]) -> Iterator[Event]:
            answers = Answers(view, processor, settings)
            rows = inputs if rows_each == 1 else self.expand_rows(inputs, rows_each)
            answers.admit(rows, [options] * len(seeds), seeds)
            return answers.run()

        yield from best_answers(run, self, processor, seeds, options.best_of, prompts)

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
            # transformers collects hidden states by hooks, which it must install on the model itself.
            view = self if self._collects_states(kwargs) else thin_view(self)
            return super(InterleavedGenerationMixin, view).generate(*args, **kwargs)  # type: ignore[misc]
        if modalities not in ("auto", "image"):
            raise UserError(f"modalities: expected 'text', 'image' or 'auto', got {modalities!r}")
        return self._generate_documents(  # type: ignore[misc]  # mypy: *args might contain image_first
            *args, image_first=modalities == "image", **kwargs
        )

    def _collects_states(self, settings: dict[str, Any]) -> bool:
        configs = [vars(one) for one in (self.generation_config, settings.get("generation_config")) if one is not None]
        names = ("output_hidden_states", "output_attentions")
        return any(source.get(name) for source in [settings, *configs] for name in names)

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
