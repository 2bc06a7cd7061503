"""Residual tokens in the LLM's vocabulary: all arithmetic on residual token ids."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from evotok_plugin.errors import UserError

_TEXT_FORM = re.compile(r"<\|evo:(\d+):(\d+)\|>")


@dataclass(frozen=True)
class ResidualVocabulary:
    """The bijection (level, code) <-> token id: `id = offset + level * codebook_size + code`.

    The ids form a contiguous range, which may be anywhere in the id space, not only at its end.
    """

    offset: int
    num_levels: int
    codebook_size: int

    def __post_init__(self) -> None:
        for name in ("offset", "num_levels", "codebook_size"):
            least = 0 if name == "offset" else 1
            if getattr(self, name) < least:
                raise UserError(f"residual vocabulary: {name} must be at least {least}, got {getattr(self, name)}")

    @property
    def size(self) -> int:
        """Number of residual tokens."""
        return self.num_levels * self.codebook_size

    def to_ids(self, codes: Tensor) -> Tensor:
        """Convert codes (..., l), with levels on the last axis, to token ids of the same shape.

        Raises:
            UserError: more levels than the vocabulary has, or a code outside the codebook.
        """
        levels = codes.shape[-1]
        if levels > self.num_levels:
            raise UserError(f"codes have {levels} levels but the vocabulary has residual tokens for {self.num_levels}")
        if codes.numel() and not (0 <= int(codes.min()) and int(codes.max()) < self.codebook_size):
            raise UserError(f"codes must be in 0..{self.codebook_size - 1}, got {int(codes.min())}..{int(codes.max())}")
        return codes + self.offset + torch.arange(levels, device=codes.device) * self.codebook_size

    def is_residual(self, ids: Tensor) -> Tensor:
        """Mask of the residual tokens among `ids`, of the same shape."""
        return (ids >= self.offset) & (ids < self.offset + self.size)

    def levels(self, ids: Tensor) -> Tensor:
        """Level of each residual id; undefined for other ids."""
        return (ids - self.offset) // self.codebook_size

    def codes(self, ids: Tensor) -> Tensor:
        """Code of each residual id within its level; undefined for other ids."""
        return (ids - self.offset) % self.codebook_size

    def to_text(self, token_id: int) -> str:
        """Text form of one residual id, `<|evo:LEVEL:CODE|>`.

        Raises:
            ValueError: not a residual id.
        """
        if not self.offset <= token_id < self.offset + self.size:
            raise ValueError(
                f"{token_id} is not a residual token id; expected {self.offset}..{self.offset + self.size - 1}"
            )
        level, code = divmod(token_id - self.offset, self.codebook_size)
        return f"<|evo:{level}:{code}|>"

    def from_text(self, text: str) -> list[int]:
        """Ids of all residual tokens written in `text`, in order.

        Raises:
            UserError: a level or code that does not exist.
        """
        ids = []
        for match in _TEXT_FORM.finditer(text):
            level, code = int(match[1]), int(match[2])
            if level >= self.num_levels or code >= self.codebook_size:
                raise UserError(
                    f"{match[0]}: expected a level below {self.num_levels} and a code below {self.codebook_size}"
                )
            ids.append(self.offset + level * self.codebook_size + code)
        return ids
