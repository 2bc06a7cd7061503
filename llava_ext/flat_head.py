"""The flat image head: every residual token is a token of the LLM, with an input row and an output row of its own.

The LLM takes one step a residual token; the logits of a step are those of the level whose turn it is. A token's rows
follow from its codebook vector (`TiedFlatHead`) or stand in tables (`FreeFlatHead`). Either way they are rows and
nothing else, no bias and no embedding of the place in the image, so that a plain causal LM can hold them.

P written positions, R rows, L levels, C codebook_dim, K codebook_size, D LLM width. `codebooks` are the tokenizer's,
(L or more, K, C); they are frozen and the tokenizer's own, so a head is given them and keeps no copy.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evotok_plugin.losses.cross_entropy import chunked_cross_entropy


class FlatHead(nn.Module):
    """What both kinds have in common: `embed` before the LLM, `logits` and `loss` behind it."""

    def __init__(self, num_levels: int, codebook_size: int, llm_hidden_size: int) -> None:
        super().__init__()
        self.num_levels, self.codebook_size, self.llm_hidden_size = num_levels, codebook_size, llm_hidden_size

    def embed_level(self, codes: Tensor, level: int, codebooks: Tensor) -> Tensor:
        """Codes (R,) of one level to the LLM's inputs (R, D)."""
        raise NotImplementedError

    def classifier(self, level: int, codebooks: Tensor) -> nn.Module:
        """What gives the logits (R, K) of a level from what `states` gives."""
        raise NotImplementedError

    def states(self, hidden: Tensor, level: int) -> Tensor:
        """Hidden states (R, D) as the level's classifier takes them."""
        return hidden

    def embed(self, codes: Tensor, codebooks: Tensor) -> Tensor:
        """Codes (P, L) of whole positions to the LLM's inputs (P, L, D)."""
        return torch.stack([self.embed_level(codes[:, i], i, codebooks) for i in range(self.num_levels)], dim=1)

    def logits(self, hidden: Tensor, level: int, codebooks: Tensor) -> Tensor:
        """Hidden states (R, D) before a token of `level` to the logits (R, K) of its codes."""
        return self.classifier(level, codebooks)(self.states(hidden, level))

    def loss(self, hidden: Tensor, codes: Tensor, levels: Tensor, codebooks: Tensor) -> Tensor:
        """Mean cross-entropy over residual tokens, 0 without any; logits are never there for all of them at once.

        Every level is classified whatever the batch holds, so that all processes gather the same weights in one order.

        Args:
            hidden: the LLM's states before each token, (R, D).
            codes, levels: the tokens, (R,) both.
        """
        total = hidden.new_zeros((), dtype=torch.float32)
        for level in range(self.num_levels):
            here = levels == level
            states, classifier = self.states(hidden[here], level), self.classifier(level, codebooks)
            total = total + chunked_cross_entropy(classifier, states, codes[here], self.codebook_size)
        return total / max(1, codes.numel())

    def classifier_rows(self, level: int, codebooks: Tensor) -> Tensor:
        """(K, F), products with which are the logits of a level from what `states` gives: for many steps to share."""
        raise NotImplementedError

    @torch.no_grad()
    def input_rows(self, codebooks: Tensor) -> Tensor:
        """(L, K, D), what an embedding table holds for the residual tokens."""
        codes = torch.arange(self.codebook_size, device=codebooks.device)
        return torch.stack([self.embed_level(codes, level, codebooks) for level in range(self.num_levels)])

    @torch.no_grad()
    def output_rows(self, codebooks: Tensor) -> Tensor:
        """(L, K, D), what an output layer's weight holds for the residual tokens: the logits of unit vectors."""
        weight = next(self.parameters())
        units = torch.eye(self.llm_hidden_size, dtype=weight.dtype, device=weight.device)
        return torch.stack([self.logits(units, level, codebooks).T for level in range(self.num_levels)])


class TiedFlatHead(FlatHead):
    """Rows that follow from the codebooks: as many numbers to learn however large the codebooks are.

    Every level has its own two-layer projections, as residuals become smaller from level to level and mean something
    else. One layer is not enough for writing: products with the bare vectors can only say how near a code is to one
    point, and never that two codes far apart are likely and those between them are not.
    """

    def __init__(self, num_levels: int, codebook_size: int, codebook_dim: int, llm_hidden_size: int) -> None:
        super().__init__(num_levels, codebook_size, llm_hidden_size)
        sizes, levels = (codebook_dim, llm_hidden_size), range(num_levels)
        self.features = nn.ModuleList(CodeFeatures(*sizes) for _ in levels)
        self.inputs = nn.ModuleList(nn.Linear(llm_hidden_size, llm_hidden_size) for _ in levels)
        self.outputs = nn.ModuleList(nn.Linear(llm_hidden_size, llm_hidden_size, bias=False) for _ in levels)
        self.classifiers = nn.ModuleList(FeatureClassifier(*sizes) for _ in levels)

    def embed_level(self, codes: Tensor, level: int, codebooks: Tensor) -> Tensor:
        return self.inputs[level](self.features[level](F.embedding(codes, _at_unit_length(codebooks[level]))))

    def classifier(self, level: int, codebooks: Tensor) -> nn.Module:
        return self.classifiers[level].of(_at_unit_length(codebooks[level]))

    def classifier_rows(self, level: int, codebooks: Tensor) -> Tensor:
        return self.classifiers[level].features(_at_unit_length(codebooks[level]))

    def states(self, hidden: Tensor, level: int) -> Tensor:
        return self.outputs[level](hidden)


class CodeFeatures(nn.Module):
    """Codebook vectors (..., C) of about unit length to nonlinear features (..., F), again of about unit length."""

    def __init__(self, codebook_dim: int, num_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_features, codebook_dim))
        self.bias = nn.Parameter(torch.empty(num_features))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Random features: each bends along its own direction, at its own place."""
        nn.init.normal_(self.weight)
        nn.init.uniform_(self.bias, -1, 1)

    def features(self, vectors: Tensor) -> Tensor:
        """(..., C) to (..., F)."""
        bent = F.gelu(F.linear(vectors.to(self.weight.dtype), self.weight, self.bias))
        return bent * (1.5 / self.bias.shape[0] ** 0.5)

    def forward(self, vectors: Tensor) -> Tensor:
        return self.features(vectors)


class FeatureClassifier(CodeFeatures):
    """Products with the features of a codebook; its weights are all its own, so that it is gathered in one call."""

    def of(self, vectors: Tensor) -> "FeatureClassifier":
        """Itself, for these vectors (K, C)."""
        self._vectors = vectors
        return self

    def forward(self, states: Tensor) -> Tensor:
        """States (R, F) to logits (R, K)."""
        return states @ self.features(self._vectors).T


class FreeFlatHead(FlatHead):
    """Rows that are learned one by one: two tables of L x K x D numbers."""

    def __init__(self, num_levels: int, codebook_size: int, llm_hidden_size: int) -> None:
        super().__init__(num_levels, codebook_size, llm_hidden_size)
        self.inputs = nn.ModuleList(nn.Embedding(codebook_size, llm_hidden_size) for _ in range(num_levels))
        self.classifiers = nn.ModuleList(
            nn.Linear(llm_hidden_size, codebook_size, bias=False) for _ in range(num_levels)
        )

    def embed_level(self, codes: Tensor, level: int, codebooks: Tensor) -> Tensor:
        return self.inputs[level](codes)

    def classifier(self, level: int, codebooks: Tensor) -> nn.Module:
        return self.classifiers[level]

    def classifier_rows(self, level: int, codebooks: Tensor) -> Tensor:
        return self.classifiers[level].weight


def _at_unit_length(codebook: Tensor) -> Tensor:
    """A codebook (K, C) with vectors of length 1 on average (of squares); one of zeros stays as it is.

    A projection's weights are then about as large as the rows that it makes, and learn at the pace of such rows.
    """
    return codebook / codebook.square().sum(dim=1).mean().sqrt().clamp(min=1e-12)


@torch.no_grad()
def initialize_rows(head: FlatHead, codebooks: Tensor, input_size: float, output_size: float) -> None:
    """Give a new head rows of the wanted sizes (root mean squares), as large at every level.

    Free rows start as those of a tied head with random projections: codes that are alike start alike.
    """
    if isinstance(head, FreeFlatHead):
        start = TiedFlatHead(head.num_levels, head.codebook_size, codebooks.shape[-1], head.llm_hidden_size)
        start.to(codebooks.device)
        initialize_rows(start, codebooks, input_size, output_size)
        rows = (start.input_rows(codebooks), start.output_rows(codebooks))
        for layers, of_levels in zip((head.inputs, head.classifiers), rows, strict=True):
            for layer, values in zip(layers, of_levels, strict=True):
                layer.weight.copy_(values)
        return
    for layer in (*head.features, *head.classifiers):
        layer.reset()
    for layer in (*head.inputs, *head.outputs):
        nn.init.normal_(layer.weight)
    for layer in head.inputs:
        nn.init.zeros_(layer.bias)
    for layers, rows, size in (
        (head.inputs, head.input_rows(codebooks), input_size),
        (head.outputs, head.output_rows(codebooks), output_size),
    ):
        for layer, values in zip(layers, rows, strict=True):
            layer.weight.mul_(size / values.float().square().mean().sqrt().clamp(min=1e-12))
