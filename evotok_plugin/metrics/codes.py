"""How a tokenizer uses its codebooks, from streaming counts."""

import torch
from torch import Tensor


class CodeUsage:
    """Counts codes level by level; a few KiB however many images are seen."""

    def __init__(self, num_levels: int, codebook_size: int) -> None:
        self.counts = torch.zeros(num_levels, codebook_size, dtype=torch.long)

    def update(self, codes: Tensor) -> None:
        """Add codes (B, N, L)."""
        for level in range(self.counts.shape[0]):
            flat = codes[..., level].flatten().cpu()
            self.counts[level] += torch.bincount(flat, minlength=self.counts.shape[1])

    def usage(self) -> list[float]:
        """Share of each level's codes that occurred."""
        return (self.counts > 0).double().mean(dim=1).tolist()

    def perplexity(self) -> list[float]:
        """exp(entropy) of each level's code distribution: how many codes are used as if evenly."""
        share = self.counts.double() / self.counts.sum(dim=1, keepdim=True).clamp(min=1)
        return torch.exp(-(share * share.clamp(min=1e-30).log()).sum(dim=1)).tolist()
