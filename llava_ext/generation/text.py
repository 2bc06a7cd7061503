"""Text through transformers' `generate`: images stay with their rows, image tokens stay out, the context is respected.

B rows, E of them from each after expansion (sequences or beams), T tokens, I images, N positions an image.
"""

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import LogitsProcessorList

from evotok_plugin.errors import UserError
from llava_ext.generation.steps import check_room

_IMAGES = ("pixel_values", "image_codes")
_LEFT_OVER = ("tokenizer", "assistant_tokenizer")  # of `generate`, which hands them on to every model


class TextGenerationMixin:
    """Hooks of transformers' `GenerationMixin`, which stands behind this class in the order of bases."""

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_codes: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs,
    ) -> dict[str, Any]:
        """Inputs of `forward` for one step, with the images whose placeholders are among its tokens: all of them in
        every step without a cache."""
        if is_first_iteration and bool(self.vocabulary.is_residual(input_ids).any()):
            raise UserError(
                'a drawn image stands in the prompt: generate(modalities="auto", processor=processor) goes on from it'
            )
        for name in _LEFT_OVER:
            kwargs.pop(name, None)
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        images = {"pixel_values": pixel_values, "image_codes": image_codes}
        for name, given in images.items():
            if given is not None:
                inputs[name] = self._images_of_step(given, input_ids, inputs.get("input_ids"), is_first_iteration)
        return inputs

    def _images_of_step(
        self, images: Tensor, all_ids: Tensor, step_ids: Tensor | None, is_first_iteration: bool
    ) -> Tensor | None:
        """Those of the images (I, ...) that the tokens of a step (B, t), the last ones of (B, T), refer to; None for
        none. Images that do not fit are left as they are, for `forward` to reject."""
        if step_ids is None:
            return images
        if step_ids.shape[1] == 1 and not is_first_iteration:  # a generated token, which is never a placeholder
            return None
        counts, wanted = self._images_per_row(all_ids), self._images_per_row(step_ids)
        if images.shape[0] != sum(counts):
            return images
        # What a cache holds already are the first images of each row.
        of_rows = zip(images.split(counts), wanted, strict=True)
        kept = [of_row[of_row.shape[0] - count :] for of_row, count in of_rows if count]
        return torch.cat(kept) if kept else None

    def _images_per_row(self, ids: Tensor) -> list[int]:
        """Count the images that each row of ids (B, T) has placeholders for."""
        places = (ids == self.config.image_token_id).sum(dim=1)
        return (places // self.config.vision_config.num_positions).tolist()

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Rows (B, ...) to (B E, ...); each copy of a row gets all images of that row, in their order.

        Raises:
            UserError: the number of images is not that of the placeholders.
        """
        images = {name: model_kwargs.pop(name) for name in _IMAGES if model_kwargs.get(name) is not None}
        if expand_size > 1 and input_ids is not None:
            counts = self._images_per_row(input_ids)
            for name, given in images.items():
                if given.shape[0] != sum(counts):
                    raise UserError(
                        f"{sum(counts)} images have placeholders in the prompts but {name} holds {given.shape[0]}; "
                        "every <image> needs its image and every image its <image>"
                    )
                images[name] = torch.cat([of_row for of_row in given.split(counts) for _ in range(expand_size)])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | images

    def _get_logits_processor(self, generation_config: GenerationConfig, *args, **kwargs) -> LogitsProcessorList:
        """transformers' processors, with the image tokens suppressed: only drawing may write them."""
        suppressed = {*(generation_config.suppress_tokens or ()), *self.image_token_ids}
        generation_config.suppress_tokens = sorted(suppressed)
        return super()._get_logits_processor(generation_config, *args, **kwargs)

    @property
    def image_token_ids(self) -> list[int]:
        """Ids within the output layer that no text holds: placeholder, delimiters, residual tokens."""
        config, size = self.config, self.config.text_config.vocab_size
        first = self.vocabulary.offset
        residual = range(min(first, size), min(first + self.vocabulary.size, size))
        return [config.image_token_id, config.image_start_token_id, config.image_end_token_id, *residual]

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict, mode, batch_size: int, max_cache_length: int
    ) -> None:
        """transformers' cache, after the answer's length is fitted to the positions of the language model.

        Raises:
            UserError: the longest prompt leaves no room for an answer.
        """
        if generation_config.use_cache is None:  # would keep a cache and compute all tokens anew on top of it
            generation_config.use_cache = True
        mask, total = model_kwargs.get("attention_mask"), max_cache_length + 1
        if mask is None:  # dropped where it holds nothing but ones
            width = longest = getattr(generation_config, "_mask_length", total)
        else:
            width, longest = mask.shape[1], int(mask.sum(dim=1).max())
        limit = self.config.max_positions
        check_room(self.config.text_config, longest + 1)
        excess = 0 if limit is None else longest + total - width - limit
        if excess > 0:
            warnings.warn(
                f"the answer may have {limit - longest} tokens instead of the {total - width} asked for: a prompt has "
                f"{longest} and the language model sees {limit}",
                stacklevel=2,
            )
            generation_config.max_length -= excess
            max_cache_length -= excess
        super()._prepare_cache_for_generation(generation_config, model_kwargs, mode, batch_size, max_cache_length)
