"""Code usage and perplexity of a tokenizer, from streaming counts."""

import torch
from torch import Tensor

from evotok_plugin.common.processes import Processes


class CodeUsage:
    """Streaming counts of the codes of each level, in 8 bytes per codebook entry however many images are seen.

    The counts are separate from the model: they are not part of its `state_dict`.
    """

    def __init__(self, num_levels: int, codebook_size: int) -> None:
        self.counts = torch.zeros(num_levels, codebook_size, dtype=torch.long)

    def update(self, codes: Tensor) -> None:
        """Add codes (..., l) of the first l levels; the counts move to the device of the codes.

        Raises:
            ValueError: more levels than are counted, or a code outside the codebook (checked on the CPU only, where
                the check does not have to wait for a GPU).
        """
        (num_levels, size), codes = self.counts.shape, codes.detach().flatten(0, -2).long()
        if codes.shape[1] > num_levels:
            raise ValueError(f"codes have {codes.shape[1]} levels, but only {num_levels} are counted")
        if not codes.is_cuda and codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < size:
            raise ValueError(f"codes must be in 0..{size - 1}, got {int(codes.min())}..{int(codes.max())}")
        self.counts = self.counts.to(codes.device)
        places = (codes + torch.arange(codes.shape[1], device=codes.device) * size).flatten()
        self.counts.view(-1).index_add_(0, places, torch.ones_like(places))

    def add_up(self, processes: Processes) -> None:
        """Sum the counts over all processes, in place."""
        processes.add_up(self.counts)

    def num_codes(self) -> int:
        """Number of codes counted on the first level."""
        return int(self.counts[0].sum())

    def usage(self) -> list[float]:
        """Share of each level's codebook entries that occurred."""
        return (self.counts > 0).double().mean(dim=1).tolist()

    def perplexity(self) -> list[float]:
        """exp(entropy) of each level's code distribution: the effective number of codes in use."""
        share = self.counts.double() / self.counts.sum(dim=1, keepdim=True).clamp(min=1)
        return torch.exp(-(share * share.clamp(min=1e-30).log()).sum(dim=1)).tolist()
