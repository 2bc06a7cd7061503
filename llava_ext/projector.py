"""Projection of image features into the LLM's embedding space."""

import torch
from torch import Tensor, nn


class Projector(nn.Module):
    """LLaVA-1.5's two-layer GELU MLP plus a learned embedding of the position in the image.

    The LLM only sees distances between tokens in the sequence; the embedding adds their position in the grid.
    """

    def __init__(self, in_features: int, out_features: int, num_positions: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_features, out_features)
        self.activation = nn.GELU()
        self.linear_2 = nn.Linear(out_features, out_features)
        self.position_embedding = nn.Parameter(torch.zeros(num_positions, out_features))

    def forward(self, features: Tensor, positions: Tensor) -> Tensor:
        """Project features (..., in_features) at image positions (...), 0..N-1 row-major, to (..., out_features)."""
        return self.project(features) + self.position_embedding[positions]

    def project(self, features: Tensor) -> Tensor:
        """Apply the MLP alone: (..., in_features) to (..., out_features)."""
        return self.linear_2(self.activation(self.linear_1(features)))
