"""Interface of a pretrained vision network as a teacher: the features of some of its layers at every position.

B batch, h x w positions, D channels of a layer.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from evotok_plugin.errors import UserError


class TeacherTower(nn.Module, ABC):
    """A frozen vision network.

    Attributes:
        name: name for messages.
        mean, std: of the pixels from 0 to 1 that the network expects, by channel (3,).
        takes_signed_pixels: whether that makes pixels from -1 to 1, as the tokenizer has them.
        default_layer: the layer that is used unless another one is chosen.
        layers: the layers that are computed, set by `keep_layers`; the others are freed.
    """

    name: str
    mean: Tensor
    std: Tensor
    takes_signed_pixels: bool
    default_layer: int
    layers: tuple[int, ...]

    def set_normalization(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Register mean and standard deviation of the pixels (3,)."""
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32), persistent=False)
        self.takes_signed_pixels = all(value == 0.5 for value in (*mean, *std))

    @property
    @abstractmethod
    def num_layers(self) -> int:
        """Number of layers; indices are from `-num_layers` on."""

    @abstractmethod
    def stride(self, layer: int) -> int:
        """Pixels per position of a layer, by side."""

    @abstractmethod
    def width(self, layer: int) -> int:
        """D, channels of a layer."""

    @abstractmethod
    def keep_layers(self, layers: Sequence[int]) -> None:
        """Choose the layers to compute, and free those that are not needed for them."""

    @abstractmethod
    def feature_maps(self, pixels: Tensor) -> list[Tensor]:
        """The features (B, D, h, w) of the chosen layers for normalized pixels (B, 3, H, W), without special tokens."""

    @abstractmethod
    def used_weights(self) -> dict[str, Tensor]:
        """The weights that the features depend on, by name; a folder may lack others, which are then random."""

    def learned_positions(self) -> int | None:
        """Positions per side that the network has learned; None if it is not bound to any."""
        return None

    def check_layer(self, layer: int) -> None:
        """Check that a layer exists.

        Raises:
            UserError: it does not.
        """
        if not -self.num_layers <= layer < self.num_layers:
            raise UserError(
                f"teacher_layer: {self.name} has layers 0 to {self.num_layers - 1}, counted from the end "
                f"-{self.num_layers} to -1; got {layer}"
            )
