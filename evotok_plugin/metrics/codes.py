"""How a tokenizer uses its codebooks, from streaming counts."""

import torch
import torch.distributed as dist
from torch import Tensor

from evotok_plugin.errors import UserError


class CodeUsage:
    """Counts codes level by level: 8 bytes a code of a codebook, however many images are seen.

    It stands beside a model, not in it: no count is part of a `state_dict` or changes what a tokenizer is.
    """

    def __init__(self, num_levels: int, codebook_size: int) -> None:
        self.counts = torch.zeros(num_levels, codebook_size, dtype=torch.long)

    def update(self, codes: Tensor) -> None:
        """Add codes (..., l) of the first l levels; counts stay on the device of the first codes.

        Raises:
            UserError: more levels than are counted, or (looked at on the CPU, where it costs no waiting) a code that
                no codebook has.
        """
        (num_levels, size), codes = self.counts.shape, codes.detach().flatten(0, -2).long()
        if codes.shape[1] > num_levels:
            raise UserError(f"codes have {codes.shape[1]} levels, {num_levels} are counted")
        if not codes.is_cuda and codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < size:
            raise UserError(f"codes must lie in 0..{size - 1}, got {int(codes.min())}..{int(codes.max())}")
        self.counts = self.counts.to(codes.device)
        places = (codes + torch.arange(codes.shape[1], device=codes.device) * size).flatten()
        self.counts.view(-1).index_add_(0, places, torch.ones_like(places))

    def all_reduce(self) -> None:
        """Add up what the processes have counted; a single process has nothing to add."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            counts = self.counts.to("cuda" if dist.get_backend() == "nccl" else "cpu")
            dist.all_reduce(counts)
            self.counts = counts.to(self.counts.device)

    def num_codes(self) -> int:
        """How many codes of a level have been counted."""
        return int(self.counts[0].sum())

    def usage(self) -> list[float]:
        """Share of each level's codes that occurred."""
        return (self.counts > 0).double().mean(dim=1).tolist()

    def perplexity(self) -> list[float]:
        """exp(entropy) of each level's code distribution: how many codes are used as if evenly."""
        share = self.counts.double() / self.counts.sum(dim=1, keepdim=True).clamp(min=1)
        return torch.exp(-(share * share.clamp(min=1e-30).log()).sum(dim=1)).tolist()
