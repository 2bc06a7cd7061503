"""The flat image head: every residual token is a token of the LLM with its own input row and output row.

The LLM takes one step per residual token; the logits of a step cover the codes of one level, the levels taking turns.
A token's rows are computed from its codebook vector (`TiedFlatHead`) or stored in tables (`FreeFlatHead`). In both
cases there is neither a bias nor an embedding of the position in the image, so a plain causal LM can store the rows.

P written positions, R rows, L levels, C codebook_dim, K codebook_size, D LLM width, F number of features (F = D).
`codebooks` are the frozen codebooks of the tokenizer, (L or more, K, C); heads receive them as arguments and do not
keep a copy.
"""

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evotok_plugin.losses.cross_entropy import chunked_cross_entropy


class FlatHead(nn.Module):
    """Base class of flat heads: `embed` makes the LLM's inputs, `logits` and `loss` read its hidden states.

    Attributes:
        inputs: one layer per level that makes the LLM's inputs.
        classifiers: one layer per level that makes the logits.
    """

    inputs: nn.ModuleList
    classifiers: nn.ModuleList

    def __init__(self, num_levels: int, codebook_size: int, llm_hidden_size: int) -> None:
        super().__init__()
        self.num_levels, self.codebook_size, self.llm_hidden_size = num_levels, codebook_size, llm_hidden_size

    def embed_level(self, codes: Tensor, level: int, codebooks: Tensor) -> Tensor:
        """Convert codes (R,) of one level to the LLM's inputs (R, D)."""
        raise NotImplementedError

    def classifier(self, level: int, codebooks: Tensor) -> nn.Module:
        """Module that maps the output of `states` to the logits (R, K) of a level."""
        raise NotImplementedError

    def states(self, hidden: Tensor, level: int) -> Tensor:
        """Convert hidden states (R, D) to inputs (R, F) of the level's classifier."""
        return hidden

    def embed(self, codes: Tensor, codebooks: Tensor) -> Tensor:
        """Convert the codes (P, L) of positions to the LLM's inputs (P, L, D)."""
        return torch.stack([self.embed_level(codes[:, i], i, codebooks) for i in range(self.num_levels)], dim=1)

    def logits(self, hidden: Tensor, level: int, codebooks: Tensor) -> Tensor:
        """Logits (R, K) of the codes of `level`, from the hidden states (R, D) before a token of that level."""
        return self.classifier(level, codebooks)(self.states(hidden, level))

    def loss(self, hidden: Tensor, codes: Tensor, levels: Tensor, codebooks: Tensor) -> Tensor:
        """Mean cross-entropy over residual tokens, 0 without any; never materializes all logits at once.

        Every level is classified whatever the batch contains, so that all processes gather the same weights in the
        same order.

        Args:
            hidden: the LLM's hidden states before each token, (R, D).
            codes, levels: code and level of each token, both (R,).
        """
        total = hidden.new_zeros((), dtype=torch.float32)
        for level in range(self.num_levels):
            here = levels == level
            states, classifier = self.states(hidden[here], level), self.classifier(level, codebooks)
            total = total + chunked_cross_entropy(classifier, states, codes[here], self.codebook_size)
        return total / max(1, codes.numel())

    def classifier_rows(self, level: int, codebooks: Tensor) -> Tensor:
        """Matrix (K, F) whose products with the output of `states` are the logits of a level; reusable across steps."""
        raise NotImplementedError

    @torch.no_grad()
    def input_rows(self, codebooks: Tensor) -> Tensor:
        """Rows (L, K, D) of the residual tokens for an embedding table."""
        codes = torch.arange(self.codebook_size, device=codebooks.device)
        return torch.stack([self.embed_level(codes, level, codebooks) for level in range(self.num_levels)])

    @torch.no_grad()
    def output_rows(self, codebooks: Tensor) -> Tensor:
        """Rows (L, K, D) of the residual tokens for an output layer's weight: the logits of unit vectors."""
        weight = next(self.parameters())
        units = torch.eye(self.llm_hidden_size, dtype=weight.dtype, device=weight.device)
        return torch.stack([self.logits(units, level, codebooks).T for level in range(self.num_levels)])


class TiedFlatHead(FlatHead):
    """Rows computed from the codebooks: the number of parameters does not depend on the codebook size.

    Every level has its own two-layer projections, because residuals shrink from level to level and change their
    meaning. One layer is not enough for the output: products with the raw vectors only measure how close a code is to
    one point; they cannot make two distant codes likely and those between them unlikely.
    """

    features: nn.ModuleList
    outputs: nn.ModuleList

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
        return self._classifier(level).of(_at_unit_length(codebooks[level]))

    def classifier_rows(self, level: int, codebooks: Tensor) -> Tensor:
        return self._classifier(level).features(_at_unit_length(codebooks[level]))

    def _classifier(self, level: int) -> "FeatureClassifier":
        return cast(FeatureClassifier, self.classifiers[level])

    def states(self, hidden: Tensor, level: int) -> Tensor:
        return self.outputs[level](hidden)


class CodeFeatures(nn.Module):
    """Nonlinear features (..., F) of codebook vectors (..., C); both have about unit length."""

    def __init__(self, codebook_dim: int, num_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_features, codebook_dim))
        self.bias = nn.Parameter(torch.empty(num_features))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Draw random features: each has its own direction and its own offset."""
        nn.init.normal_(self.weight)
        nn.init.uniform_(self.bias, -1, 1)

    def features(self, vectors: Tensor) -> Tensor:
        """Map vectors (..., C) to features (..., F)."""
        activated = F.gelu(F.linear(vectors.to(self.weight.dtype), self.weight, self.bias))
        return activated * (1.5 / self.bias.shape[0] ** 0.5)

    def forward(self, vectors: Tensor) -> Tensor:
        return self.features(vectors)


class FeatureClassifier(CodeFeatures):
    """Classifier by products with the features of a codebook; it owns all its weights, so ZeRO-3 gathers them in one
    call."""

    def of(self, vectors: Tensor) -> "FeatureClassifier":
        """Set the codebook vectors (K, C) that the next call uses, and return this module."""
        self._vectors = vectors
        return self

    def forward(self, states: Tensor) -> Tensor:
        """Map states (R, F) to logits (R, K)."""
        return states @ self.features(self._vectors).T


class FreeFlatHead(FlatHead):
    """Rows that are learned independently: two tables of L x K x D parameters."""

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
        return cast(nn.Linear, self.classifiers[level]).weight


def _at_unit_length(codebook: Tensor) -> Tensor:
    """Scale a codebook (K, C) so that its vectors have length 1 (root mean square); a codebook of zeros is unchanged.

    The weights of a projection are then about as large as the rows that it makes, and learn as fast as such rows.
    """
    return codebook / codebook.square().sum(dim=1).mean().sqrt().clamp(min=1e-12)


@torch.no_grad()
def initialize_rows(head: FlatHead, codebooks: Tensor, input_size: float | Tensor, output_size: float | Tensor) -> None:
    """Initialize a head so that its input and output rows have the given root mean squares at every level.

    Free rows start as the rows of a tied head with random projections: similar codes get similar rows.
    """
    if isinstance(head, FreeFlatHead):
        tied = TiedFlatHead(head.num_levels, head.codebook_size, codebooks.shape[-1], head.llm_hidden_size)
        tied.to(codebooks.device)
        initialize_rows(tied, codebooks, input_size, output_size)
        for layer, rows in zip(_linear(head.inputs), tied.input_rows(codebooks), strict=True):
            layer.weight.copy_(rows)
        for layer, rows in zip(_linear(head.classifiers), tied.output_rows(codebooks), strict=True):
            layer.weight.copy_(rows)
        return
    assert isinstance(head, TiedFlatHead)
    for features in (*head.features, *head.classifiers):
        cast(CodeFeatures, features).reset()
    for layer in (*_linear(head.inputs), *_linear(head.outputs)):
        nn.init.normal_(layer.weight)
    for layer in _linear(head.inputs):
        nn.init.zeros_(layer.bias)
    for layer, rows in zip(_linear(head.inputs), head.input_rows(codebooks), strict=True):
        layer.weight.mul_(input_size / _root_mean_square(rows))
    for layer, rows in zip(_linear(head.outputs), head.output_rows(codebooks), strict=True):
        layer.weight.mul_(output_size / _root_mean_square(rows))


def _linear(layers: nn.ModuleList) -> Iterable[nn.Linear]:
    """The layers (linear ones or tables) of the levels."""
    return cast(Iterable[nn.Linear], layers)


def _root_mean_square(values: Tensor) -> Tensor:
    return values.float().square().mean().sqrt().clamp(min=1e-12)
