"""The baseline of a cosine to a target: the cosine that a constant prediction, the mean of the target, would reach.

n vectors, D dimensions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from evotok_plugin.common.processes import Processes


class ConstantBaseline:
    """Mean cosine of target vectors with their mean, accumulated over batches.

    Features of many networks have a large mean in common, so that a cosine far above 0 needs no information about
    the image.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def update(self, target: Tensor) -> None:
        """Add vectors (..., D)."""
        flat = target.detach().float().flatten(0, -2)
        count = torch.full_like(flat[0], flat.shape[0], dtype=torch.float64)
        part = torch.stack([flat.double().sum(0), F.normalize(flat, dim=-1).double().sum(0), count]).cpu()
        self._sums = part if self._sums is None else self._sums + part

    def add_up(self, processes: Processes) -> None:
        """Combine with the other processes."""
        parts = [part for part in processes.gather(self._sums) if part is not None]
        self._sums = torch.stack(parts).sum(0) if parts else None

    def result(self) -> float:
        """The mean cosine, from -1 to 1.

        Raises:
            ValueError: no vectors have been added.
        """
        if self._sums is None:
            raise ValueError("no vectors have been added")
        total, units, count = self._sums
        return float((units / count) @ F.normalize(total, dim=0))
