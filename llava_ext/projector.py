"""The bridge from image features to the LLM's embedding space."""

import torch
from torch import Tensor, nn


class Projector(nn.Module):
    """LLaVA-1.5's two-layer GELU MLP and a learned embedding of the place in the image.

    A sequence model knows how far apart two tokens are, not where in a grid they stand; the embedding tells it.
    """

    def __init__(self, in_features: int, out_features: int, num_positions: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_features, out_features)
        self.activation = nn.GELU()
        self.linear_2 = nn.Linear(out_features, out_features)
        self.position_embedding = nn.Parameter(torch.zeros(num_positions, out_features))

    def forward(self, features: Tensor, positions: Tensor) -> Tensor:
        """Features (..., in_features) at image positions (...) in 0..N-1, row-major, to (..., out_features)."""
        return self.project(features) + self.position_embedding[positions]

    def project(self, features: Tensor) -> Tensor:
        """The MLP alone: (..., in_features) to (..., out_features)."""
        return self.linear_2(self.activation(self.linear_1(features)))
