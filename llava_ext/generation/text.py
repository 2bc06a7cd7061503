"""Text generation through transformers' `generate`: it handles the images of each row, suppresses image tokens and
respects the context length.

B rows, E of them from each after expansion (sequences or beams), T tokens, I images, N positions per image.
"""

import functools
import inspect
import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache
from transformers.generation import (
    BaseStreamer,
    LogitsProcessorList,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
)

from evotok_plugin.errors import UserError
from llava_ext.generation.model_interface import ModelInterface
from llava_ext.generation.steps import check_room
from llava_ext.generation.text_steps import SuppressTokens, can_write_text, write_text

_IMAGES = ("pixel_values", "image_codes")
_LEFT_OVER = ("tokenizer", "assistant_tokenizer")  # arguments of `generate` that it passes on to every model


class _Processors(LogitsProcessorList):
    """transformers' list, which inspects the signature of each processor in every step, with signatures kept."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        if all(_takes_two(cast(Hashable, type(processor))) for processor in self):
            for processor in self:
                scores = processor(input_ids, scores)
            return scores
        return super().__call__(input_ids, scores, **kwargs)  # type: ignore[arg-type]


@functools.cache
def _takes_two(processor: type) -> bool:
    """Whether the processors of a class take ids and scores only."""
    return len(inspect.signature(processor.__call__).parameters) == 3  # with `self`


class TextGenerationMixin(ModelInterface):
    """Overrides of the hooks of transformers' `GenerationMixin`."""

    # Ignored type errors of calls: `GenerationMixin` annotates `self` as PreTrainedModel and ids as LongTensor.

    def prepare_inputs_for_generation(  # type: ignore[override]  # transformers calls it by keywords
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_codes: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Prepare the inputs of `forward` for one step.

        They include the images whose placeholders are among the tokens of the step: without a cache, all images in
        every step.
        """
        if is_first_iteration and bool(self.vocabulary.is_residual(input_ids).any()):
            raise UserError(
                'the prompt contains a drawn image; continue it with generate(modalities="auto", processor=processor)'
            )
        for name in _LEFT_OVER:
            kwargs.pop(name, None)
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,  # type: ignore[arg-type]
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        images = {"pixel_values": pixel_values, "image_codes": image_codes}
        for name, given in images.items():
            if given is not None:
                inputs[name] = self._images_of_step(given, input_ids, inputs.get("input_ids"), is_first_iteration)
        return inputs

    def _images_of_step(
        self, images: Tensor, all_ids: Tensor, step_ids: Tensor | None, is_first_iteration: bool
    ) -> Tensor | None:
        """Select the images that the tokens of a step refer to.

        Args:
            images: all images (I, ...).
            all_ids: all tokens (B, T).
            step_ids: the tokens of the step (B, t), the last ones of `all_ids`.

        Returns:
            The images of the step, None if it has none. If the number of images does not match the placeholders, all
            images, so that `forward` reports the error.
        """
        if step_ids is None:
            return images
        if step_ids.shape[1] == 1 and not is_first_iteration:  # a generated token, which is never a placeholder
            return None
        counts, wanted = self._images_per_row(all_ids), self._images_per_row(step_ids)
        if images.shape[0] != sum(counts):
            return images
        # The first images of each row are in the cache already.
        of_rows = zip(images.split(counts), wanted, strict=True)
        selected = [of_row[of_row.shape[0] - count :] for of_row, count in of_rows if count]
        return torch.cat(selected) if selected else None

    def _images_per_row(self, ids: Tensor, embeddings: Tensor | None = None) -> list[int]:
        """Count the images that each row of ids (B, T), or of embeddings (B, S, D), has placeholders for."""
        where = ids == self.config.image_token_id if embeddings is None else self.placeholders_in(embeddings)
        num_placeholders = where.sum(dim=1)
        return (num_placeholders // self.config.vision_config.num_positions).tolist()

    def _expand_inputs_for_generation(  # type: ignore[override]  # ids are annotated as LongTensor
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Expand rows (B, ...) to (B E, ...); each copy of a row gets all images of that row, in order.

        Raises:
            UserError: the number of images does not match the placeholders.
        """
        images = {name: model_kwargs.pop(name) for name in _IMAGES if model_kwargs.get(name) is not None}
        if expand_size > 1 and input_ids is not None:
            inputs = {"input_ids": input_ids, "inputs_embeds": model_kwargs.get("inputs_embeds"), **images}
            for name, of_rows in self.images_of_rows(inputs).items():
                images[name] = torch.cat([of_row for of_row in of_rows for _ in range(expand_size)])
        ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,  # type: ignore[arg-type]
            **model_kwargs,
        )
        return ids, model_kwargs | images

    def expand_rows(self, inputs: dict[str, Tensor], expand_size: int) -> dict[str, Tensor]:
        """Repeat each of B rows of inputs, with its images, `expand_size` times: (B E, ...).

        Raises:
            UserError: the number of images does not match the placeholders.
        """
        others: dict[str, Any] = {name: value for name, value in inputs.items() if name != "input_ids"}
        ids, others = self._expand_inputs_for_generation(expand_size, input_ids=inputs["input_ids"], **others)
        return {"input_ids": ids, **others}

    def select_rows(self, inputs: dict[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
        """Keep some of B rows of inputs, in this order, with their images.

        Raises:
            UserError: the number of images does not match the placeholders.
        """
        index = torch.tensor(rows, device=inputs["input_ids"].device)
        images = self.images_of_rows(inputs)
        selected = {name: value[index] for name, value in inputs.items() if name not in _IMAGES}
        for name, of_rows in images.items():
            if kept := [of_rows[row] for row in rows if len(of_rows[row])]:
                selected[name] = torch.cat(kept)
        return selected

    def images_of_rows(self, inputs: Mapping[str, Tensor | None]) -> dict[str, Sequence[Tensor]]:
        """Split the images in inputs of B rows: B tensors (I, ...) for each kind of image.

        Raises:
            UserError: the number of images does not match the placeholders.
        """
        ids = inputs["input_ids"]
        assert ids is not None
        counts = self._images_per_row(ids, inputs.get("inputs_embeds"))
        images = {name: given for name in _IMAGES if (given := inputs.get(name)) is not None}
        for name, given in images.items():
            if given.shape[0] != sum(counts):
                raise UserError(
                    f"{sum(counts)} images have placeholders in the prompts but {name} holds {given.shape[0]}; every "
                    "<image> needs its image and every image its <image>"
                )
        return {name: given.split(counts) for name, given in images.items()}

    def _get_logits_processor(
        self, generation_config: GenerationConfig, *args: Any, **kwargs: Any
    ) -> LogitsProcessorList:
        """Add the image tokens to the suppressed ones: only drawing may write them."""
        suppressed = {*(generation_config.suppress_tokens or ()), *self.image_token_ids}
        generation_config.suppress_tokens = sorted(suppressed)
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)  # type: ignore[misc]
        in_place = not generation_config.return_dict_in_generate  # which may include the scores before
        return _Processors(
            SuppressTokens(one.suppress_tokens, in_place) if type(one) is SuppressTokensLogitsProcessor else one
            for one in processors
        )

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """Greedy and sampled text: a loop of our own (`write_text`) where it applies, else transformers'."""
        if can_write_text(self, generation_config, synced_gpus, model_kwargs):
            run = (self, input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs)
            return write_text(*run)
        return super()._sample(  # type: ignore[misc]
            input_ids,  # type: ignore[arg-type]
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )

    @property
    def image_token_ids(self) -> list[int]:
        """Ids in the output layer that never occur in text: placeholder, delimiters, residual tokens."""
        config, size = self.config, self.config.text_config.vocab_size
        first = self.vocabulary.offset
        residual = range(min(first, size), min(first + self.vocabulary.size, size))
        return [config.image_token_id, config.image_start_token_id, config.image_end_token_id, *residual]

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> bool:
        """Limit the answer's length to the positions of the language model, then prepare transformers' cache.

        Raises:
            UserError: the longest prompt leaves no room for an answer.
        """
        if generation_config.use_cache is None:  # transformers would fill a cache but not use it
            generation_config.use_cache = True
        mask, total = model_kwargs.get("attention_mask"), max_cache_length + 1
        if mask is None:  # transformers drops a mask of ones
            width = longest = getattr(generation_config, "_mask_length", total)
        else:
            width, longest = mask.shape[1], int(mask.sum(dim=1).max())
        limit = self.config.max_positions
        check_room(self.config.text_config, longest + 1)
        excess = 0 if limit is None else longest + total - width - limit
        if limit is not None and excess > 0:
            warnings.warn(
                f"the answer is limited to {limit - longest} tokens instead of {total - width}: a prompt has {longest} "
                f"tokens and the language model {limit} positions",
                stacklevel=2,
            )
            generation_config.max_length -= excess
            max_cache_length -= excess
        if isinstance(given := model_kwargs.get("past_key_values"), Cache):
            cast(Any, given)._is_user_defined = True  # as transformers does since 5.23
        return super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
