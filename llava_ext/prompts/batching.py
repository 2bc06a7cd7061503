"""Padding, truncation and stacking of rows into a batch, with the keywords of transformers' processors.

B rows, T tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from evotok_plugin.errors import UserError

_LARGEST_LENGTH = 10**9  # tokenizers without a limit report a larger one
PADDING = {True: "longest", "longest": "longest", False: None, "do_not_pad": None, "max_length": "max_length"}
TENSORS = ("pt", "np", None)


@dataclass(frozen=True)
class BatchOptions:
    """Options for batching rows, named as in transformers.

    Attributes:
        padding: True or "longest", False or "do_not_pad", or "max_length".
        padding_side: "left", as generation needs it, or "right"; by default the tokenizer's `padding_side`.
        max_length: number of tokens for `truncation` and `padding="max_length"`.
        truncation: truncate rows to `max_length`, or else to the tokenizer's `model_max_length`, on the tokenizer's
            truncation side; images must not be cut. By default rows are truncated if `max_length` is given, except with
            `padding="max_length"`.
        pad_to_multiple_of: pad to a multiple of this length.
        return_tensors: "pt", "np", or None for lists.
        return_attention_mask: False omits `attention_mask`.
        add_special_tokens: False or None; the chat template writes them.

    Raises:
        ValueError: an unsupported value, or a `max_length` without effect.
    """

    padding: bool | str = True
    padding_side: str | None = None
    max_length: int | None = None
    truncation: bool | str | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str | None = "pt"
    return_attention_mask: bool | None = True
    add_special_tokens: bool | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("padding", tuple(PADDING)),
            ("padding_side", ("left", "right", None)),
            ("truncation", (True, False, None, "longest_first", "only_first", "do_not_truncate")),
            ("return_tensors", TENSORS),
            ("return_attention_mask", (True, False, None)),
            ("add_special_tokens", (False, None)),
        ):
            if getattr(self, name) not in allowed:
                hint = "; the chat template writes special tokens" if name == "add_special_tokens" else ""
                options = ", ".join(map(repr, allowed))
                raise ValueError(f"{name}: expected one of {options}, got {getattr(self, name)!r}{hint}")
        for name in ("max_length", "pad_to_multiple_of"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name}: expected a positive number, got {value!r}")
        if self.max_length is not None and not self.truncates and PADDING[self.padding] != "max_length":
            raise ValueError(f"max_length={self.max_length} has no effect with truncation={self.truncation!r}")
        if self.pad_to_multiple_of is not None and PADDING[self.padding] is None:
            raise ValueError(f"pad_to_multiple_of={self.pad_to_multiple_of} has no effect without padding")

    @property
    def truncates(self) -> bool:
        """Whether longer rows are truncated."""
        if self.truncation is None:
            return self.max_length is not None and PADDING[self.padding] != "max_length"
        return self.truncation not in (False, "do_not_truncate")

    # Batches -------------------------------------------------------------------------------------------------

    def batch(
        self,
        rows: Sequence[dict[str, Tensor]],
        fills: Mapping[str, int],
        tokenizer: PreTrainedTokenizerBase,
        image_ids: Sequence[int],
    ) -> dict[str, Any]:
        """Truncate, pad and stack rows.

        Args:
            rows: for each row its sequences (T_i,) by name, including `input_ids`.
            fills: padding value for each name.
            image_ids: ids of image tokens, which must not be cut.

        Returns:
            (B, T) for each name and `attention_mask`; lists if `return_tensors` is None.

        Raises:
            UserError: truncation would cut an image.
            ValueError: rows of different lengths without padding, or `padding="max_length"` without a length.
        """
        rows = [self._truncated(row, tokenizer, image_ids) for row in rows]
        rows = [row | {"attention_mask": torch.ones_like(row["input_ids"])} for row in rows]
        lengths = [len(row["input_ids"]) for row in rows]
        width = self._width(lengths, tokenizer)
        if width is None and self.return_tensors is not None and len(set(lengths)) > 1:
            raise ValueError(
                f"rows of {min(lengths)} to {max(lengths)} tokens cannot be stacked to a tensor; pass padding=True"
            )
        batch: dict[str, Any] = {}
        for name, fill in {**fills, "attention_mask": 0}.items():
            if name == "attention_mask" and self.return_attention_mask is False:
                continue
            padded = [self._pad(row[name], width, fill, self.padding_side or tokenizer.padding_side) for row in rows]
            if self.return_tensors is None:
                batch[name] = [row.tolist() for row in padded]
            else:
                batch[name] = torch.stack(padded) if self.return_tensors == "pt" else np.stack(padded)
        return batch

    def _limit(self, tokenizer: PreTrainedTokenizerBase) -> int | None:
        limit = tokenizer.model_max_length if self.max_length is None else self.max_length
        return None if limit > _LARGEST_LENGTH else limit

    def _truncated(
        self, row: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, image_ids: Sequence[int]
    ) -> dict[str, Tensor]:
        ids = row["input_ids"]
        limit = self._limit(tokenizer) if self.truncates else None
        if limit is None or len(ids) <= limit:
            return row
        left = tokenizer.truncation_side == "left"
        dropped = ids[: len(ids) - limit] if left else ids[limit:]
        if bool(torch.isin(dropped, torch.tensor(image_ids)).any()):
            raise UserError(
                f"truncation to {limit} of {len(ids)} tokens would cut an image; raise max_length or shorten the text"
            )
        return {name: values[-limit:] if left else values[:limit] for name, values in row.items()}

    def _width(self, lengths: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int | None:
        """Length of padded rows; None without padding."""
        how = PADDING[self.padding]
        if how is None:
            return None
        width = max(lengths)
        if how == "max_length":
            if (limit := self._limit(tokenizer)) is None:
                raise ValueError('padding="max_length" needs max_length; the tokenizer has no limit')
            width = max(width, limit)
        multiple = self.pad_to_multiple_of or 1
        return -(-width // multiple) * multiple

    @staticmethod
    def _pad(values: Tensor, width: int | None, fill: int, side: str) -> Tensor:
        missing = 0 if width is None else width - len(values)
        padding = (missing, 0) if side == "left" else (0, missing)
        return torch.nn.functional.pad(values, padding, value=fill)
