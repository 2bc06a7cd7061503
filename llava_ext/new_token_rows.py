"""Trainable rows of the image tokens while the backbone's tables are frozen.

B batch, S steps, N new tokens, D LLM width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from evotok_plugin.losses.cross_entropy import ReplacedRows


class NewTokenRows(nn.Module):
    """Trainable rows of the new tokens, used instead of those in frozen tables.

    Attributes:
        token_ids: ids of the new tokens, (N,).
        inputs: rows of the embedding table, (N, D).
        outputs: rows of the output layer, (N, D); None with tied embeddings, where `inputs` serve as both.
    """

    token_ids: Tensor

    def __init__(
        self, token_ids: Sequence[int], inputs: Tensor, outputs: Tensor | None, input_scale: float = 1.0
    ) -> None:
        """`input_scale` is the factor that the backbone's embedding layer applies to its rows."""
        super().__init__()
        self.register_buffer("token_ids", torch.tensor(list(token_ids), device=inputs.device), persistent=False)
        self.inputs = nn.Parameter(inputs)
        self.outputs = None if outputs is None else nn.Parameter(outputs)
        self._input_scale = input_scale

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return copies of the input and output rows, both (N, D).

        Copies, because ZeRO-3 releases the gathered parameters when the call returns.
        """
        inputs = self.inputs.clone()
        return inputs, inputs if self.outputs is None else self.outputs.clone()

    def put_into(self, embeddings: Tensor, ids: Tensor) -> Tensor:
        """Replace the embeddings (B, S, D) of new tokens among the ids (B, S)."""
        found = torch.eq(ids[..., None], self.token_ids)  # (B, S, N)
        where, which = found.any(dim=-1), found.long().argmax(dim=-1)
        rows = (self()[0] * self._input_scale)[which[where]]
        return embeddings.masked_scatter(where[..., None], rows.to(embeddings.dtype))

    def replaced_rows(self) -> ReplacedRows:
        """Output rows in the form that losses take, and that `ReplacedRows.put_into` applies to logits."""
        return ReplacedRows(self.token_ids, self()[1])
