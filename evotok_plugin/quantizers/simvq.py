"""SimVQ: fixed random codebooks, of which each level learns a linear map (Zhu et al. 2024, arXiv 2411.02038)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evotok_plugin.code_search import nearest_codes
from evotok_plugin.quantizers.base import ComputedCodebooks


class SimVQuantizer(ComputedCodebooks):
    """Residual quantizer with the codebooks `bases @ maps`: the random `bases` are constant, the `maps` are learned.

    A gradient to one code moves all codes of its level, so none is left behind. The codes are the nearest ones to the
    residual, as in residual vector quantization.
    """

    bases: Tensor
    maps: Tensor

    def __init__(
        self,
        num_quantizers: int,
        codebook_size: int,
        codebook_dim: int,
        level_dropout: float = 0.0,
        gradient: str = "straight_through",
    ) -> None:
        super().__init__(num_quantizers, codebook_size, codebook_dim, level_dropout, gradient)
        shape = (num_quantizers, codebook_size, codebook_dim)
        self.register_buffer("bases", torch.empty(shape, dtype=torch.float32))
        self.maps = nn.Parameter(torch.empty(num_quantizers, codebook_dim, codebook_dim, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw normal bases, and maps that keep their standard deviation."""
        nn.init.normal_(self.bases)
        nn.init.normal_(self.maps, std=self.codebook_dim**-0.5)

    def _compute_codebooks(self) -> Tensor:
        return self.bases.double() @ self.maps.double()

    def _code_vectors(self, level: int, chosen: Tensor, residual: Tensor) -> Tensor:
        return F.embedding(chosen, self.bases[level]) @ self.maps[level]

    @torch.no_grad()
    def init_from(self, latents: Tensor) -> None:
        """Initialize the maps so that the code vectors of a level have the second moments of its residuals.

        The maps are the symmetric square roots of the moments of sample latents (M, C). With several processes, all
        must pass the same latents.
        """
        residual = latents.detach().double().reshape(-1, latents.shape[-1])
        for level in range(self.num_quantizers):
            values, vectors = torch.linalg.eigh((residual.T @ residual / residual.shape[0]).cpu())
            root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
            self.maps[level] = root.to(self.maps)
            codebook = (self.bases[level].double() @ self.maps[level].double()).float()
            residual = residual - F.embedding(nearest_codes(residual.float(), codebook), codebook)
