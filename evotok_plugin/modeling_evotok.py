"""EvoTok: residual codes per position; the first levels reconstruct pixels, all levels give semantic features.

B batch, N positions, L levels, l levels given, C codebook_dim, D semantic_dim.

Image height and width may be any multiples of the patch size: the position embeddings of encoder and semantic decoder,
which are learned at the configuration's `image_size`, are interpolated.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.utils import ModelOutput

from evotok_plugin.backbone_encoder import build_encoder
from evotok_plugin.common.files import apply_umask_to_weights
from evotok_plugin.configuration_evotok import EvoTokConfig
from evotok_plugin.encoder import PatchEmbeddings
from evotok_plugin.errors import UserError
from evotok_plugin.pixel_decoder import PixelDecoder
from evotok_plugin.quantizers.base import Quantizer
from evotok_plugin.quantizers.choice import build_quantizer
from evotok_plugin.semantic_decoder import SemanticDecoder


@dataclass
class EvoTokOutput(ModelOutput):
    """Reconstruction of a batch: `pixels` (B, 3, H, W), `features` (B, N, D), `codes` (B, N, L), the scalar
    `commitment_loss`, `latents`, the sums of levels (B, N, C) at the depths that were asked for, and the scalar
    `codebook_loss` if the quantizer learns by gradients."""

    pixels: Tensor | None = None
    features: Tensor | None = None
    codes: Tensor | None = None
    commitment_loss: Tensor | None = None
    latents: tuple[Tensor, ...] | None = None
    codebook_loss: Tensor | None = None


@dataclass
class EvoTokEncoderOutput(ModelOutput):
    """`latents` (B, N, C), the input of the quantizer, and `codes` (B, N, l)."""

    latents: Tensor | None = None
    codes: Tensor | None = None


class EvoTokPreTrainedModel(PreTrainedModel):
    """Base of the tokenizer and of its vision tower: flags for transformers, weight initialization, input check."""

    config_class = EvoTokConfig
    config: EvoTokConfig
    base_model_prefix = "evotok"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    _supports_sdpa = True
    # Covers encoder layers and decoder blocks, but not the quantizer, whose codebook update must run once per step.
    supports_gradient_checkpointing = True
    _no_split_modules = ["EncoderLayer", "SemanticBlock"]
    _keep_in_fp32_modules_strict = ["quantizer"]  # rounded codebooks would give other codes

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init = nn.init
        if isinstance(module, PatchEmbeddings):
            init.normal_(module.position_embedding.weight, std=module.position_embedding.embedding_dim**-0.5)
            if module.special_tokens is not None:
                init.normal_(module.special_tokens, std=self.config.initializer_range)
        elif isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, SemanticDecoder):
            init.normal_(module.class_token, std=self.config.initializer_range)
            init.normal_(module.position_embedding, std=self.config.initializer_range)
        elif isinstance(module, Quantizer):
            module.reset_parameters()

    def grid_of(self, pixel_values: Tensor) -> tuple[int, int]:
        """Rows and columns of positions of images (B, 3, H, W).

        Raises:
            ValueError: the shape is another one, empty, or has a height or width that is not a multiple of the patch
                size.
        """
        return self.config.grid_of(pixel_values.shape)


class EvoTokModel(EvoTokPreTrainedModel):
    """Encoder, residual quantizer, pixel decoder and semantic decoder."""

    def __init__(self, config: EvoTokConfig) -> None:
        super().__init__(config)
        self.encoder = build_encoder(config)
        self.quantizer = build_quantizer(config)
        self.pixel_decoder = PixelDecoder(config)
        self.semantic_decoder = SemanticDecoder(config)
        self.post_init()

    def forward(self, pixel_values: Tensor, depths: Sequence[int] = ()) -> EvoTokOutput:
        """Reconstruct pixels and semantic features from one residual code sequence.

        Args:
            pixel_values: (B, 3, H, W) in [-1, 1].
            depths: also return the latents at these depths, with the quantizer's gradients to the encoder.

        Raises:
            ValueError: height or width is not a multiple of the patch size.
        """
        grid = self.grid_of(pixel_values)
        quantized = self.quantizer(self.encoder(pixel_values))
        return EvoTokOutput(
            pixels=self._to_pixels(quantized.latents_at(self.config.pixel_depth), grid),
            features=self._to_features(quantized.latents_at(self.config.semantic_depth), grid),
            codes=quantized.codes,
            commitment_loss=quantized.commitment_loss,
            latents=tuple(quantized.latents_at(depth) for depth in depths) or None,
            codebook_loss=quantized.codebook_loss,
        )

    def _to_pixels(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.pixel_decoder(latents.to(self.dtype).transpose(1, 2).unflatten(2, grid))

    def _to_features(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.semantic_decoder(latents.to(self.dtype), grid)

    def _grid_of_codes(self, num_positions: int, grid: tuple[int, int] | None) -> tuple[int, int]:
        if grid is None:
            side = 1
            while side * side < num_positions:  # torch.compile cannot trace math.isqrt when sizes vary
                side += 1
            grid = (side, side)
        if grid[0] * grid[1] != num_positions or not num_positions:
            raise ValueError(
                f"{num_positions} positions do not fill {grid[0]} rows x {grid[1]} columns; "
                "pass grid=(rows, columns) for images that are not square"
            )
        return grid

    def encode(self, pixel_values: Tensor, depth: int | None = None) -> EvoTokEncoderOutput:
        """Encode pixels (B, 3, H, W) in [-1, 1] to codes (B, N, l), positions in row-major order.

        Args:
            depth: search only the first `depth` levels; by default all.

        Raises:
            UserError: `depth` is not in 1..num_quantizers.
            ValueError: height or width is not a multiple of the patch size.
        """
        self.grid_of(pixel_values)
        latents = self.encoder(pixel_values)
        return EvoTokEncoderOutput(latents=latents, codes=self.quantizer(latents, depth).codes)

    def _check_codes(self, codes: Tensor) -> None:
        if codes.ndim != 3 or not 1 <= codes.shape[-1] <= self.config.num_quantizers:
            raise ValueError(
                f"expected codes (B, N, l) with 1 <= l <= {self.config.num_quantizers}, got {tuple(codes.shape)}"
            )

    def _check_range(self, codes: Tensor) -> None:
        """Check codes that come from a caller: on a GPU an index out of range would abort the process."""
        if torch.compiler.is_compiling() or not codes.numel():
            return
        least, most = torch.stack(torch.aminmax(codes)).tolist()
        if least < 0 or most >= self.config.codebook_size:
            raise UserError(
                f"expected codes from 0 to {self.config.codebook_size - 1}, got {least} to {most}; do they belong to "
                "another tokenizer's codebooks, or are they token ids of the language model?"
            )

    def codes_to_latents(self, codes: Tensor) -> Tensor:
        """Sum of the code vectors of the given levels: (B, N, l) -> (B, N, C)."""
        self._check_codes(codes)
        return self.quantizer.codes_to_latents(codes)

    def level_latents(self, codes: Tensor) -> Tensor:
        """Code vector of every level: (B, N, l) -> (B, N, l, C)."""
        self._check_codes(codes)
        return self.quantizer.level_latents(codes)

    def decode_pixels(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Decode codes (B, N, l) to pixels (B, 3, H, W), roughly in [-1, 1]; the decoder is trained at l = pixel_depth.

        Args:
            grid: rows and columns of positions, as from `grid_of`; by default the image is square.

        Raises:
            UserError: codes outside the codebooks.
            ValueError: another number of dimensions or levels, or N positions do not fill the grid.
        """
        self._check_codes(codes)
        self._check_range(codes)
        latents = self.codes_to_latents(codes)
        return self._to_pixels(latents, self._grid_of_codes(codes.shape[1], grid))

    def decode_semantics(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Decode codes (B, N, l) to semantic features (B, N, D); the decoder is trained at l = semantic_depth.

        Args:
            grid: rows and columns of positions, as from `grid_of`; by default the image is square.

        Raises:
            UserError: codes outside the codebooks, or a semantic decoder that was not trained.
            ValueError: another number of dimensions or levels, or N positions do not fill the grid.
        """
        self.config.require_semantics()
        self._check_codes(codes)
        self._check_range(codes)
        latents = self.codes_to_latents(codes)
        return self._to_features(latents, self._grid_of_codes(codes.shape[1], grid))

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, with weight files in the mode that the umask asks for."""
        super().save_pretrained(save_directory, *args, **kwargs)
        apply_umask_to_weights(Path(save_directory))

    def fingerprint(self) -> str:
        """sha256 over names, shapes and values of encoder and quantizer, which identifies the tokenizer's codes."""
        digest = hashlib.sha256()
        for prefix, part in (("encoder", self.encoder), ("quantizer", self.quantizer)):
            for name, tensor in sorted(part.state_dict().items()):
                digest.update(f"{prefix}.{name}{tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()


AutoModel.register(EvoTokConfig, EvoTokModel, exist_ok=True)
