"""Ids back to text and images."""

from itertools import groupby

import torch
from torch import Tensor

from evotok_plugin.errors import UserError


class DecodingMixin:
    """`decode` and what rests on it, for a processor with a tokenizer, an image processor and a residual vocabulary."""

    def decode(self, token_ids, skip_special_tokens: bool = False, images_from=None, **kwargs):
        """Ids to text; residual tokens appear as `<|evo:LEVEL:CODE|>`, or not at all with `skip_special_tokens`.

        Args:
            token_ids: of one sequence, or of several, which give a list.
            images_from: an EvoTok tokenizer (`model.vision_tower`). The answer is then taken apart into a list of
                `{"type": "text", "text": str}` and `{"type": "image", "image": PIL image}`, without special tokens,
                which may be a message's content: so a conversation goes on.
            kwargs: `clean_up_tokenization_spaces`, as the tokenizer takes it.

        Raises:
            UserError: another keyword; with `images_from`, an image that is not whole.
        """
        if unknown := [name for name in kwargs if name != "clean_up_tokenization_spaces"]:
            raise UserError(f"decode does not take {', '.join(unknown)}")
        self.check_tokenizer()
        if _is_batch(token_ids):
            return [self.decode(row, skip_special_tokens, images_from, **kwargs) for row in token_ids]
        ids = torch.as_tensor(token_ids).flatten()
        runs = self._runs(ids)
        if images_from is not None:
            parts = [self._image_part(run, images_from) if r else self._text_part(run, **kwargs) for r, run in runs]
            return [part for part in parts if part.get("text") != ""]
        words, to_text = {"skip_special_tokens": skip_special_tokens, **kwargs}, self.vocabulary.to_text
        return "".join(
            ("" if skip_special_tokens else "".join(map(to_text, run)))
            if residual
            else self.tokenizer.decode(run, **words)
            for residual, run in runs
        )

    def _runs(self, ids: Tensor) -> list[tuple[bool, list[int]]]:
        """Ids in runs of residual tokens and of others."""
        residual = self.vocabulary.is_residual(ids).tolist()
        pairs = zip(residual, ids.tolist(), strict=True)
        return [(kind, [token for _, token in run]) for kind, run in groupby(pairs, key=lambda pair: pair[0])]

    def _text_part(self, run: list[int], **kwargs) -> dict:
        return {"type": "text", "text": self.tokenizer.decode(run, skip_special_tokens=True, **kwargs).strip()}

    def _image_part(self, run: list[int], tokenizer) -> dict:
        ids, expected = torch.tensor(run), torch.arange(self.num_levels).repeat(self.num_positions)
        if len(ids) != len(expected) or not torch.equal(self.vocabulary.levels(ids), expected):
            raise UserError(
                f"expected an image of {self.num_positions} positions with levels 0 to {self.num_levels - 1} each, got "
                f"{len(ids)} residual tokens; was it cut?"
            )
        codes = self.vocabulary.codes(ids).view(1, self.num_positions, self.num_levels)
        with torch.no_grad():
            pixels = tokenizer.decode_pixels(codes.to(tokenizer.device))
        return {"type": "image", "image": self.image_processor.to_pil(pixels)[0]}

    def batch_decode(self, sequences, **kwargs) -> list[str]:
        return [self.decode(sequence, **kwargs) for sequence in sequences]

    def post_process_image_text_to_text(self, generated_outputs, skip_special_tokens: bool = True, **kwargs):
        """Decode what `generate` gives; transformers' pipelines call it."""
        return self.decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)


def _is_batch(token_ids) -> bool:
    if hasattr(token_ids, "ndim"):
        return token_ids.ndim > 1
    return isinstance(token_ids, (list, tuple)) and any(
        hasattr(row, "__len__") and getattr(row, "ndim", None) != 0 for row in token_ids
    )
