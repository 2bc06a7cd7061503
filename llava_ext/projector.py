"""The bridge from image features to the LLM's embedding space (LLaVA-1.5's two-layer GELU MLP)."""

from torch import Tensor, nn


class Projector(nn.Module):
    """(..., in_features) -> (..., out_features)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_features, out_features)
        self.activation = nn.GELU()
        self.linear_2 = nn.Linear(out_features, out_features)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(self.activation(self.linear_1(features)))
