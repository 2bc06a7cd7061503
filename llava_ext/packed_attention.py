"""Attention within each sample of a packed row, for every attention implementation.

* flash-attention receives all samples concatenated in one row, and their boundaries.
* SDPA runs on each sample separately: with a block-diagonal mask it would cost as much as attention over the full row.
  It is registered with transformers under its own name, and otherwise behaves like SDPA.
* Other implementations (eager, flex) use the block-diagonal mask that transformers makes when positions restart and no
  other mask is given.

B rows, H heads, S steps.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llava_ext.folding import FoldedSequence

SDPA_BY_SEGMENT = "sdpa_by_segment"
SDPA = ("sdpa", SDPA_BY_SEGMENT)  # without segments, the second computes the same as the first

Segment = tuple[int, int, int]  # row, first step, end


def separate_samples(backbone: PreTrainedModel, folded: FoldedSequence) -> tuple[FoldedSequence, dict]:
    """Arrange a packed batch for the backbone's attention.

    The first packed batch permanently replaces SDPA by `SDPA_BY_SEGMENT`.

    Returns:
        the sequence in the layout that the attention needs, and keywords for the backbone besides the embeddings.
    """
    implementation = backbone.config._attn_implementation or ""
    keywords: dict[str, Any] = {}
    if "flash" in implementation:
        folded = folded.as_one_row()
        bounds = folded.starts[0].nonzero().flatten()
        bounds = torch.cat([bounds, bounds.new_tensor([folded.starts.shape[1]])]).to(torch.int32)
        both = {"cu_seq_lens": bounds, "max_length": int(bounds.diff().max())}
        keywords = {f"{name}_{side}": value for name, value in both.items() for side in ("q", "k")}
    elif implementation in SDPA and _is_causal_throughout(backbone.config):
        if implementation != SDPA_BY_SEGMENT:
            backbone.set_attn_implementation(SDPA_BY_SEGMENT)
        keywords = {"segments": find_segments(folded.starts)}
    return folded, {"position_ids": folded.position_ids, **keywords}


def _is_causal_throughout(config: PreTrainedConfig) -> bool:
    """Whether every layer uses full or sliding-window causal attention."""
    kinds = getattr(config, "layer_types", None) or ()
    return {"full_attention", "sliding_attention"}.issuperset(kinds)


def find_segments(starts: Tensor) -> list[Segment]:
    """List all samples (and runs of padding) of a batch row by row, from a mask (B, S) of their first steps."""
    rows, firsts = (indices.tolist() for indices in starts.nonzero(as_tuple=True))
    ends = [*firsts[1:], 0]
    return [(row, first, end or starts.shape[1]) for row, first, end in zip(rows, firsts, ends, strict=True)]


def sdpa_by_segment(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: list[Segment] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention (B, H, S, ...) -> (B, S, H, ...) within each segment; without `segments`, by the
    mask."""
    if segments is None or (sliding_window and sliding_window < max(end - first for _, first, end in segments)):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    # Slices would do the same, but each of their gradients fills a tensor of the whole batch with zeros.
    lengths = [[end - first for r, first, end in segments if r == row] for row in range(query.shape[0])]
    parts = [
        [part for states, of_row in zip(tensor.split(1), lengths, strict=True) for part in states.split(of_row, dim=2)]
        for tensor in (query, key, value)
    ]
    outputs = [sdpa_attention_forward(module, q, k, v, None, **kwargs)[0] for q, k, v in zip(*parts, strict=True)]
    joined = torch.cat(outputs, dim=1)  # (1, B x S, H, ...)
    return joined.view(query.shape[0], query.shape[2], *joined.shape[2:]), None


AttentionInterface.register(SDPA_BY_SEGMENT, sdpa_by_segment)
AttentionMaskInterface.register(SDPA_BY_SEGMENT, sdpa_mask)
