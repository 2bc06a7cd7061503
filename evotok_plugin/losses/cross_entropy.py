"""Cross-entropy after a large classifier, without holding the logits of all rows at once.

R rows, D width, V classes, N replaced classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MAX_LOGITS = 2**26  # per chunk: 256 MiB in float32


@dataclass(frozen=True)
class ReplacedRows:
    """Weights of a few classes that replace the classifier's own.

    Attributes:
        classes: indices of the classes (N,).
        rows: their weights (N, D); the logit of such a class is the product of its row with the hidden state.
    """

    classes: Tensor
    rows: Tensor

    def put_into(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """Overwrite the logits (R, V) of the replaced classes with those for hidden states (R, D); returns `logits`."""
        return logits.index_copy_(-1, self.classes, (hidden @ self.rows.to(hidden.dtype).T).to(logits.dtype))


def chunked_cross_entropy(
    classifier: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    num_classes: int,
    max_logits: int = MAX_LOGITS,
    replaced: ReplacedRows | None = None,
) -> Tensor:
    """Sum over rows of the cross-entropy of `classifier(hidden)`: a float32 scalar, 0 without rows.

    Rows are classified in chunks of about `max_logits` logits, and the gradient of a chunk is computed before the next
    chunk: neither all logits nor their gradient are ever in memory, and no product is computed twice (as in Liger
    Kernel's fused linear cross-entropy, arXiv 2410.10989). The result can be differentiated once.

    Args:
        classifier: maps rows (R, D) to logits (R, V), each row independently. Usually a linear layer; it may be frozen,
            tied to embeddings, or have adapters.
        hidden: (R, D).
        targets: the true class of every row, (R,).
        num_classes: V.
        replaced: classes with separate weights, which may be trained while the classifier is frozen.

    Raises:
        ValueError: rows and targets do not match.
    """
    if hidden.ndim != 2 or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"expected hidden (R, D) and one target per row, got {tuple(hidden.shape)} and {tuple(targets.shape)}"
        )
    rows = max(1, max_logits // num_classes)
    if any(module._forward_pre_hooks for module in classifier.modules() if module is not classifier):
        # ZeRO-3 gathers the weights of inner layers at each call, and every rank must make the same number of calls.
        rows = max(1, hidden.shape[0])

    def loss(forward: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
        trained: list[Tensor] = [weight for weight in classifier.parameters() if weight.requires_grad]
        leaves, classify = list(trained), forward
        if replaced is not None:
            own = ReplacedRows(replaced.classes, replaced.rows.detach().requires_grad_(replaced.rows.requires_grad))
            classify = lambda states: own.put_into(forward(states), states)  # noqa: E731
            if replaced.rows.requires_grad:
                trained.append(replaced.rows)
                leaves.append(own.rows)
        if torch.is_grad_enabled() and (states.requires_grad or trained):
            return _ChunkedCrossEntropy.apply(classify, leaves, rows, targets, states, *trained)
        return _sum_over_chunks(classify, rows, targets, states, None)

    return _call_with(classifier, loss, hidden)


def _call_with(
    module: nn.Module, function: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor], hidden: Tensor
) -> Tensor:
    """Call the module once with `function(forward, hidden)` in place of its `forward(hidden)`.

    The module's hooks then enclose the entire function, as ZeRO-3 and FSDP need in order to gather its weights.
    """
    forward, replaced = module.forward, "forward" in vars(module)
    module.forward = lambda hidden: function(forward, hidden)
    try:
        return module(hidden)
    finally:
        if replaced:
            module.forward = forward
        else:
            del module.forward


def _sum_over_chunks(
    forward: Callable[[Tensor], Tensor],
    rows: int,
    targets: Tensor,
    hidden: Tensor,
    learn: Callable[[Tensor, Tensor, Tensor], None] | None,
) -> Tensor:
    """Compute the sum; `learn` receives each chunk's hidden states, logits and gradient with respect to the logits."""
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for start in range(0, max(1, hidden.shape[0]), rows):
        part = slice(start, start + rows)
        states = hidden[part].detach().requires_grad_(learn is not None)
        with torch.set_grad_enabled(learn is not None):
            logits = forward(states)
        scores = F.log_softmax(logits.detach(), dim=-1, dtype=torch.float32)
        total += F.nll_loss(scores, targets[part], reduction="sum")
        if learn is not None:
            ones = scores.new_ones(()).expand(scores.shape[0], 1)
            slopes = scores.exp_().scatter_add_(1, targets[part, None], -ones)  # softmax - one-hot
            learn(states, logits, slopes.to(logits.dtype))
    return total


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes all gradients in the forward pass; the backward pass only scales them.

    `leaves` are the tensors that `classify` uses; `weights` are the same tensors in the caller's graph.
    """

    @staticmethod
    def forward(
        ctx: Any,
        classify: Callable[[Tensor], Tensor],
        leaves: list[Tensor],
        rows: int,
        targets: Tensor,
        hidden: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        of_hidden: list[Tensor] = []
        of_weights: list[Tensor] = []

        def learn(states: Tensor, logits: Tensor, slopes: Tensor) -> None:
            of_states, *more = torch.autograd.grad(logits, [states, *leaves], slopes)
            of_hidden.append(of_states)
            if not of_weights:
                of_weights.extend(more)
                return
            for gradient, part in zip(of_weights, more, strict=True):
                gradient += part

        total = _sum_over_chunks(classify, rows, targets, hidden, learn)
        ctx.save_for_backward(torch.cat(of_hidden), *of_weights)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        factor = float(scale)  # a tensor would be rounded to the gradients' dtype first
        return None, None, None, None, *(gradient.mul_(factor) for gradient in ctx.saved_tensors)
