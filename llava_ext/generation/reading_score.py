"""Scores of images by the model's own reading: log p(prompt | image) - log p(prompt).

The prompt is the answer in a conversation in which the user shows the image and asks for its prompt. Without the image
the user only asks, so the difference measures how much the image adds to the evidence for its prompt.

R images, N positions, L drawn levels, T tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from evotok_plugin.errors import UserError
from llava_ext.generation.evaluation_view import evaluation_view
from llava_ext.generation.model_interface import ModelInterface
from llava_ext.generation.selection_options import SelectionOptions
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor
from llava_ext.sequence_layout import EncodedConversation

_MAX_TOKENS = 8192  # bounds the memory of the logits to some hundred megabytes even for large vocabularies
_IMAGES_PER_BATCH = 64  # of the tokenizer's encoder


@dataclass(frozen=True)
class ReadingScores:
    """Log-probabilities of prompts in nats, each (R,), float32 on the CPU.

    They are sums over the tokens of the prompt and the end of the turn, which are the tokens that training learns.

    Attributes:
        with_image: log p(prompt | image).
        without_image: log p(prompt).
    """

    with_image: Tensor
    without_image: Tensor

    @property
    def total(self) -> Tensor:
        """log p(prompt | image) - log p(prompt), (R,)."""
        return self.with_image - self.without_image


class PromptReader:
    """Scores codes of images for prompts by the model's own reading.

    log p(prompt) is computed once per distinct prompt and kept, so the model's weights must not change afterwards.

    Args:
        instruction: the user's text; None takes the model's (`generation_config.image_selection`).
        max_tokens: tokens per batch, padding included; a longer conversation is a batch of its own.

    Raises:
        UserError: the processor does not fit the model, or its settings are invalid.
    """

    def __init__(
        self,
        model: ModelInterface,
        processor: EvoTokLlavaProcessor,
        instruction: str | None = None,
        max_tokens: int = _MAX_TOKENS,
    ) -> None:
        model.config.check_processor(processor)
        self._model, self._processor, self._max_tokens = model, processor, max_tokens
        self._instruction = SelectionOptions(instruction=instruction).for_model(model).instruction
        self._without_image: dict[str, float] = {}

    @torch.no_grad()
    def scores(self, prompts: Sequence[str], codes: Tensor) -> ReadingScores:
        """Score R images for R prompts.

        The features of an image come from its codes through the semantic decoder; nothing is decoded to pixels and
        encoded again. A drawn image has only the levels of the pixel decoder (`pixel_depth` of `semantic_depth`): its
        deeper levels, which the semantic decoder was trained with, are missing.

        Args:
            codes: (R, N, l), of the levels that are known: the drawn ones, or all.

        Raises:
            UserError: the numbers of prompts and images differ, or a conversation is longer than the language model's
                positions.
        """
        if len(prompts) != codes.shape[0]:
            raise UserError(f"expected one prompt per image, got {len(prompts)} prompts and {codes.shape[0]} images")
        distinct = list(dict.fromkeys(prompts))
        new = [prompt for prompt in distinct if prompt not in self._without_image]
        self._without_image.update(zip(new, self._log_probabilities(new, None).tolist(), strict=True))
        without = torch.tensor([self._without_image[prompt] for prompt in prompts])
        return ReadingScores(self._log_probabilities(prompts, codes), without)

    def _log_probabilities(self, prompts: Sequence[str], codes: Tensor | None) -> Tensor:
        """Log-probabilities (R,) of prompts, with the images of `codes` (R, N, l) or without images."""
        model = evaluation_view(self._model)
        encoded = {prompt: self._encode(prompt, codes is not None) for prompt in dict.fromkeys(prompts)}
        rows = [encoded[prompt] for prompt in prompts]
        totals = torch.zeros(len(rows))
        for batch in self._batches([len(row.input_ids) for row in rows]):
            images = None if codes is None else codes[batch].to(model.device)
            totals[batch] = self._run(model, [rows[index] for index in batch], images)
        return totals

    def _encode(self, prompt: str, with_image: bool) -> EncodedConversation:
        """Encode the conversation; its labels are the tokens of the answer."""
        image: list[dict[str, Any]] = [{"type": "image"}] if with_image else []
        messages = [
            {"role": "user", "content": [*image, {"type": "text", "text": self._instruction}]},
            {"role": "assistant", "content": [{"type": "text", "text": prompt}]},
        ]
        return self._processor.encode_conversation(messages, [None] * len(image))

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Batch the indices of conversations by their lengths in tokens, shortest first."""
        batch: list[int] = []
        for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
            if batch and (len(batch) + 1) * lengths[index] > self._max_tokens:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _run(self, model: Any, rows: Sequence[EncodedConversation], codes: Tensor | None) -> Tensor:
        """Log-probabilities (B,) of the answers of B conversations, padded on the left: the answers are at the end."""
        ids = self._processor.pad([row.input_ids for row in rows], self._processor.pad_id).to(model.device)
        labels = self._processor.pad([row.labels for row in rows], -100).to(model.device)
        mask = self._processor.pad([torch.ones_like(row.input_ids) for row in rows], 0).to(model.device)
        first = int((labels != -100).any(dim=0).nonzero()[0])  # the step before it predicts it
        outputs = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            image_codes=codes,
            use_cache=False,
            logits_to_keep=ids.shape[1] - first + 1,
        )
        logits = outputs.logits[:, :-1].float().transpose(1, 2)  # (B, vocabulary, answer)
        losses = F.cross_entropy(logits, labels[:, first:], ignore_index=-100, reduction="none")
        return -losses.sum(dim=1).cpu()


class ReadingJudge:
    """A reward (`llava_ext.rewards.Reward`): the reading of images, encoded with all levels of the model's tokenizer.

    Args:
        model: its weights must not change afterwards, as for `PromptReader`.
        instruction: as for `PromptReader`.

    Raises:
        UserError: the processor does not fit the model, or its settings are invalid.
    """

    def __init__(self, model: ModelInterface, processor: EvoTokLlavaProcessor, instruction: str | None = None) -> None:
        self._tower, self._prepare = model.vision_tower, processor.image_processor
        self._reader = PromptReader(model, processor, instruction)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], images: Sequence[Image]) -> list[float]:
        """Score R images for R prompts by log p(prompt | image) - log p(prompt) in nats.

        Raises:
            UserError: as `PromptReader.scores`.
        """
        if not images and not prompts:
            return []
        parts = [images[start : start + _IMAGES_PER_BATCH] for start in range(0, len(images), _IMAGES_PER_BATCH)]
        codes = torch.cat([self._encode(part) for part in parts])
        return self._reader.scores(prompts, codes).total.tolist()

    def _encode(self, images: Sequence[Image]) -> Tensor:
        """Encode images to codes (R, N, all levels)."""
        pixels = self._prepare(list(images), return_tensors="pt").pixel_values
        codes = self._tower.encode(pixels.to(self._tower.device, self._tower.dtype)).codes
        assert codes is not None
        return codes
