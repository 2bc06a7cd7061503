"""How each kind of attention is told which steps of a packed row belong together.

* flash-attention takes all samples one after another in one row, and their bounds.
* SDPA runs on every sample alone: with a block-diagonal mask it would cost as much as if all of a row's samples saw
  each other. It is registered with transformers under a name of its own, and is SDPA in every other respect.
* Any other implementation (eager, flex) gets the block-diagonal mask, which transformers makes where positions restart
  and there is no other mask.

B rows, H heads, S steps.
"""

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llava_ext.folding import FoldedSequence

SDPA_BY_SEGMENT = "sdpa_by_segment"

Segment = tuple[int, int, int]  # row, first step, end


def separate_samples(backbone: PreTrainedModel, folded: FoldedSequence) -> tuple[FoldedSequence, dict]:
    """The sequence as the backbone's attention wants it, and what to give the backbone beside the embeddings.

    SDPA is replaced by `SDPA_BY_SEGMENT` at the first packed batch, and stays so.
    """
    implementation = backbone.config._attn_implementation
    if "flash" in implementation:
        folded = folded.as_one_row()
        bounds = folded.starts[0].nonzero().flatten()
        bounds = torch.cat([bounds, bounds.new_tensor([folded.starts.shape[1]])]).to(torch.int32)
        both = {"cu_seq_lens": bounds, "max_length": int(bounds.diff().max())}
        apart = {f"{name}_{side}": value for name, value in both.items() for side in ("q", "k")}
    elif implementation in ("sdpa", SDPA_BY_SEGMENT) and _is_causal_throughout(backbone.config):
        if implementation != SDPA_BY_SEGMENT:
            backbone.set_attn_implementation(SDPA_BY_SEGMENT)
        apart = {"segments": find_segments(folded.starts)}
    else:
        apart = {}
    return folded, {"position_ids": folded.position_ids, **apart}


def _is_causal_throughout(config: PreTrainedConfig) -> bool:
    """Whether each step of every layer sees all before it, or all within a window."""
    kinds = getattr(config, "layer_types", None) or ()
    return {"full_attention", "sliding_attention"}.issuperset(kinds)


def find_segments(starts: Tensor) -> list[Segment]:
    """All samples (and runs of padding) of a batch, row by row, from marks (B, S) at their first steps."""
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
    **kwargs,
) -> tuple[Tensor, None]:
    """Causal attention (B, H, S, ...) -> (B, S, H, ...) within each segment; without `segments`, by the mask."""
    if segments is None or (sliding_window and sliding_window < max(end - first for _, first, end in segments)):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    outputs = []
    for row, first, end in segments:
        one = (states[row : row + 1, :, first:end] for states in (query, key, value))
        outputs.append(sdpa_attention_forward(module, *one, None, **kwargs)[0])
    joined = torch.cat(outputs, dim=1)  # (1, B x S, H, ...)
    return joined.view(query.shape[0], query.shape[2], *joined.shape[2:]), None


AttentionInterface.register(SDPA_BY_SEGMENT, sdpa_by_segment)
AttentionMaskInterface.register(SDPA_BY_SEGMENT, sdpa_mask)
