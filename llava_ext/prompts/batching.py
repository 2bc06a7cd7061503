"""Padding, truncation and stacking of rows into a batch, with the keywords of transformers' processors.

B rows, T tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from evotok_plugin.errors import UserError

_NESTED = ("text_kwargs", "common_kwargs", "processor_kwargs")
_LARGEST_LENGTH = 10**9  # tokenizers without a limit report a larger one
PADDING = {True: "longest", "longest": "longest", False: None, "do_not_pad": None, "max_length": "max_length"}
TENSORS = ("pt", "np", None)


@dataclass(frozen=True)
class BatchOptions:
    """Options for batching rows, named as in transformers.

    Attributes:
        padding: True or "longest", False or "do_not_pad", or "max_length".
        padding_side: "left", as generation needs it, or "right".
        max_length: number of tokens for `truncation` and `padding="max_length"`.
        truncation: truncate rows to `max_length` on the tokenizer's truncation side; images must not be cut.
        pad_to_multiple_of: pad to a multiple of this length.
        return_tensors: "pt", "np", or None for lists.
        return_attention_mask: False omits `attention_mask`.
        add_special_tokens: False or None; the chat template writes them.

    Raises:
        ValueError: an unsupported value, or a `max_length` without effect.
    """

    padding: bool | str = True
    padding_side: str = "left"
    max_length: int | None = None
    truncation: bool | str | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str | None = "pt"
    return_attention_mask: bool | None = True
    add_special_tokens: bool | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("padding", tuple(PADDING)),
            ("padding_side", ("left", "right")),
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
            raise ValueError(
                f'max_length={self.max_length} has no effect without truncation=True or padding="max_length"'
            )

    @property
    def truncates(self) -> bool:
        """Whether rows longer than `max_length` are truncated."""
        return self.truncation not in (None, False, "do_not_truncate")

    @classmethod
    def of(cls, keywords: Mapping) -> "BatchOptions":
        """Collect options from keywords, including those nested in `text_kwargs`, `common_kwargs`, `processor_kwargs`.

        Raises:
            ValueError: an unknown keyword, or one that is given twice with different values.
        """
        found: dict = {}
        known = {field.name for field in fields(cls)}
        for name, value in _flat(keywords):
            if name not in known:
                raise ValueError(
                    f"the processor does not accept {name!r}; it accepts {', '.join(sorted(known))}. Images are always "
                    "prepared at the model's own size"
                )
            value = getattr(value, "value", value)  # transformers' enumerations
            if name in found and found[name] != value:
                raise ValueError(f"{name} is given twice: {found[name]!r} and {value!r}")
            found[name] = value
        return cls(**found)

    @classmethod
    def names(cls) -> set[str]:
        """Return all keywords that `of` accepts."""
        return {field.name for field in fields(cls)} | {*_NESTED, "images_kwargs"}

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
            ValueError: rows of different lengths without padding, or a missing `max_length`.
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
            padded = [self._pad(row[name], width, fill) for row in rows]
            if self.return_tensors is None:
                batch[name] = [row.tolist() for row in padded]
            else:
                batch[name] = torch.stack(padded) if self.return_tensors == "pt" else np.stack(padded)
        return batch

    def _limit(self, tokenizer: PreTrainedTokenizerBase, what: str) -> int:
        limit = tokenizer.model_max_length if self.max_length is None else self.max_length
        if limit > _LARGEST_LENGTH:
            raise ValueError(f"{what} needs max_length; the tokenizer has no limit")
        return limit

    def _truncated(
        self, row: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, image_ids: Sequence[int]
    ) -> dict[str, Tensor]:
        ids = row["input_ids"]
        limit = self._limit(tokenizer, "truncation=True") if self.truncates else len(ids)
        if len(ids) <= limit:
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
            width = max(width, self._limit(tokenizer, 'padding="max_length"'))
        multiple = self.pad_to_multiple_of or 1
        return -(-width // multiple) * multiple

    def _pad(self, values: Tensor, width: int | None, fill: int) -> Tensor:
        missing = 0 if width is None else width - len(values)
        padding = (missing, 0) if self.padding_side == "left" else (0, missing)
        return torch.nn.functional.pad(values, padding, value=fill)


def _flat(keywords: Mapping) -> Iterator[tuple[str, Any]]:
    """Yield keywords with their values, including nested ones; None means "not given", except for `return_tensors`."""
    for name, value in keywords.items():
        if name in (*_NESTED, "images_kwargs") and isinstance(value, Mapping):
            yield from _flat(value)
        elif name in (*_NESTED, "images_kwargs") and value is None:
            continue
        elif value is not None or name == "return_tensors":
            yield name, value
