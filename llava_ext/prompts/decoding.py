"""Decoding of ids to text and images."""

from itertools import groupby
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from evotok_plugin import EvoTokImageProcessor, EvoTokModel
from evotok_plugin.errors import UserError
from llava_ext.vocabulary import ResidualVocabulary


class DecodingMixin:
    """`decode` and the methods based on it, for `EvoTokLlavaProcessor`.

    Attributes:
        image_processor, tokenizer: parts of the processor.
        num_positions: positions per image.
        residual_token_offset, num_levels, codebook_size: ids of the residual tokens, see `ResidualVocabulary`.
    """

    image_processor: EvoTokImageProcessor
    tokenizer: PreTrainedTokenizerFast
    num_positions: int
    residual_token_offset: int
    num_levels: int
    codebook_size: int

    @property
    def vocabulary(self) -> ResidualVocabulary:
        """Ids of the residual tokens."""
        return ResidualVocabulary(self.residual_token_offset, self.num_levels, self.codebook_size)

    def check_tokenizer(self) -> None:
        """Check that the tokenizer and the residual tokens do not overlap; the processor implements it."""
        raise NotImplementedError

    def decode(
        self, token_ids: Any, skip_special_tokens: bool = False, images_from: EvoTokModel | None = None, **kwargs: Any
    ) -> Any:
        """Decode ids to text; residual tokens appear as `<|evo:LEVEL:CODE|>`, or not at all with `skip_special_tokens`.

        Args:
            token_ids: ids of one sequence, or of several; several return a list.
            images_from: an EvoTok tokenizer (`model.vision_tower`). The result is then a list of
                `{"type": "text", "text": str}` and `{"type": "image", "image": PIL image}` without special tokens, to
                be used as the content of a message when the conversation continues.
            kwargs: `clean_up_tokenization_spaces` of the tokenizer.

        Raises:
            UserError: with `images_from`, an incomplete image.
            ValueError: another keyword.
        """
        if unknown := [name for name in kwargs if name != "clean_up_tokenization_spaces"]:
            raise ValueError(f"decode does not accept {', '.join(unknown)}")
        self.check_tokenizer()
        if _is_batch(token_ids):
            return [self.decode(row, skip_special_tokens, images_from, **kwargs) for row in token_ids]
        ids = torch.as_tensor(token_ids).flatten()
        runs = self._runs(ids)
        if images_from is not None:
            parts = [self._image_part(run, images_from) if r else self._text_part(run, **kwargs) for r, run in runs]
            return [part for part in parts if part.get("text") != ""]
        texts = []
        for residual, run in runs:
            if not residual:
                texts.append(self._text(run, skip_special_tokens, **kwargs))
            elif not skip_special_tokens:
                texts += map(self.vocabulary.to_text, run)
        return "".join(texts)

    def _runs(self, ids: Tensor) -> list[tuple[bool, list[int]]]:
        """Split ids into runs of residual tokens (True) and of other tokens (False)."""
        residual = self.vocabulary.is_residual(ids).tolist()
        pairs = zip(residual, ids.tolist(), strict=True)
        return [(kind, [token for _, token in run]) for kind, run in groupby(pairs, key=lambda pair: pair[0])]

    def _text(self, run: list[int], skip_special_tokens: bool, **kwargs: Any) -> str:
        text = self.tokenizer.decode(run, skip_special_tokens=skip_special_tokens, **kwargs)
        assert isinstance(text, str)
        return text

    def _text_part(self, run: list[int], **kwargs: Any) -> dict:
        return {"type": "text", "text": self._text(run, True, **kwargs).strip()}

    def _image_part(self, run: list[int], tokenizer: EvoTokModel) -> dict:
        ids, expected = torch.tensor(run), torch.arange(self.num_levels).repeat(self.num_positions)
        if len(ids) != len(expected) or not torch.equal(self.vocabulary.levels(ids), expected):
            raise UserError(
                f"expected an image of {self.num_positions} positions with levels 0 to {self.num_levels - 1} each, got "
                f"{len(ids)} residual tokens; was it truncated?"
            )
        codes = self.vocabulary.codes(ids).view(1, self.num_positions, self.num_levels)
        with torch.no_grad():
            pixels = tokenizer.decode_pixels(codes.to(tokenizer.device))
        return {"type": "image", "image": self.image_processor.to_pil(pixels)[0]}

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **kwargs: Any) -> list[str]:
        """Decode several sequences."""
        return [self.decode(sequence, skip_special_tokens, **kwargs) for sequence in sequences]

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> Any:
        """Decode the output of `generate`; called by transformers' pipelines."""
        return self.decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)

    def post_process_multimodal_output(
        self,
        generated_outputs: Any,
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Decode the output of `generate` to texts, or pixels to images; called by transformers' pipelines.

        Args:
            generated_outputs: ids, or with generation_mode "image" pixels (B, 3, H, W) in [-1, 1] or PIL images.
            generation_mode: None, "text" or "image".

        Raises:
            ValueError: another mode, or ids with "image".
        """
        if generation_mode in (None, "text"):
            return self.post_process_image_text_to_text(generated_outputs, skip_special_tokens, **kwargs)
        if generation_mode != "image":
            raise ValueError(f"generation_mode: expected 'text' or 'image', got {generation_mode!r}")
        if isinstance(generated_outputs, (list, tuple)) and all(isinstance(one, Image) for one in generated_outputs):
            return list(generated_outputs)
        if getattr(generated_outputs, "ndim", None) != 4:
            raise ValueError(
                "expected pixels (B, 3, H, W) or PIL images with generation_mode='image'; decode ids with "
                "decode(ids, images_from=model.vision_tower)"
            )
        return self.image_processor.to_pil(torch.as_tensor(generated_outputs))


def _is_batch(token_ids: Any) -> bool:
    if hasattr(token_ids, "ndim"):
        return token_ids.ndim > 1
    return isinstance(token_ids, (list, tuple)) and any(
        hasattr(row, "__len__") and getattr(row, "ndim", None) != 0 for row in token_ids
    )
