"""Settings of the EvoTok tokenizer as a plain dataclass: fields, defaults, checks and derived sizes.

Independent of transformers, so that the vision tower also runs in environments with another version of it.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evotok_plugin.errors import UserError
from evotok_plugin.quantizers.fsq_grid import fsq_grid

_RECIPE = "recipe.yaml"  # the settings of the training run
_LARGEST = 2**20  # beyond every useful size; larger ones are typing errors that would exhaust the memory
ACTIVATIONS = ("gelu_tanh", "gelu", "quick_gelu")
QUANTIZERS = ("rvq", "simvq", "fsq")
QUANTIZER_GRADIENTS = ("straight_through", "rotation")
_NUMBERS = {int: "a whole number", float: "a number", bool: "true or false"}


def check_types(config: Any, fields: Mapping[str, Any]) -> None:
    """Check the types of the fields that are annotated as int, float or bool.

    Raises:
        UserError: a field holds a value of another type.
    """
    for name, kind in fields.items():
        value = getattr(config, name)
        fits = isinstance(value, (int, float) if kind is float else kind) if kind in _NUMBERS else True
        if not fits or (kind in (int, float) and isinstance(value, bool)):
            raise UserError(f"{name}: expected {_NUMBERS[kind]}, got {value!r}")


def recorded_semantics(folder: "str | os.PathLike[str]", values: Mapping[str, Any]) -> "bool | None":
    """Whether the semantic decoder in a tokenizer folder was trained, by its records.

    Args:
        values: the content of its config.json. Without the field `semantic_decoder_trained`, which early versions did
            not write, the settings of the training run decide (`recipe.yaml`).

    Returns:
        None if neither is recorded.
    """
    if "semantic_decoder_trained" in values:
        return bool(values["semantic_decoder_trained"])
    try:
        recipe = (Path(folder) / _RECIPE).read_text()
    except (OSError, UnicodeDecodeError):
        return None
    weight = re.search(r"^semantic_weight:\s*([0-9.eE+-]+)\s*(?:#.*)?$", recipe, re.MULTILINE)
    try:
        return float(weight[1]) > 0 if weight else None
    except ValueError:
        return None


@dataclass(repr=False, eq=False)
class TokenizerSettings:
    """Sizes of encoder, quantizer and both decoders; the defaults are the paper's (arXiv 2603.12108).

    The preset `paper_384` has image_size 378, although its teacher has 384. 27 patches of 14 pixels cover 378 pixels:
    SigLIP resizes an image to 384 and ignores the last 6 rows and columns, which no decoder could then reconstruct.
    This preset resizes images to 378, so that every pixel is encoded, reconstructed and scored; teacher and tokenizer
    see the same 378 pixels at the same 27x27 positions.

    Attributes:
        image_size, patch_size: in pixels; `grid_size` = image_size / patch_size positions per side.
        encoder_num_layers: number of layers that are run. The features are the output of the teacher's second-to-last
            layer, so this is one less than the teacher has.
        encoder_activation: "gelu_tanh" (SigLIP), "gelu" (ViT, DINOv2) or "quick_gelu" (CLIP).
        encoder_norm_eps: epsilon of the layer norms.
        encoder_num_special_tokens: learned tokens before the positions, the class and register tokens of other towers.
        encoder_pre_norm: whether there is a layer norm before the first layer, as in CLIP.
        encoder_backbone: name of a CNN of timm that takes the place of the ViT, beside a linear map of the pixels.
        encoder_backbone_stage: its stage whose features are used.
        num_quantizers, codebook_size, codebook_dim: levels L, codes per level K, dimensions of a code C.
        quantizer: "rvq" (codebooks that follow moving averages), "simvq" (a learned map of random codebooks) or "fsq"
            (rounded numbers).
        quantizer_gradient: gradient of the quantized latents to the encoder, "straight_through" or "rotation" (not with
            "fsq").
        fsq_levels: with "fsq", number of values in each dimension of a level's grid; their product is `codebook_size`.
            Empty: as few dimensions as possible, of 3 to 8 values each.
        pixel_depth, semantic_depth: number of levels summed for the pixel and for the semantic decoder.
        decoder_channel_multipliers: one per resolution, finest first. Each resolution is twice as fine as the next;
            the finest ends at `patch_size`: with 14 pixels per position, 1 -> 2 -> 4 -> 8 -> 14, five resolutions.
        semantic_dim: D, width of the semantic features; the teacher's width.
        ema_decay, restart_threshold, restart_by_error, codebook_warmup_steps: see `ResidualVectorQuantizer`; other
            quantizers do not use them.
        level_dropout: share of a training batch that the decoders see at a random depth.
        semantic_decoder_trained: False if the tokenizer was trained without a teacher, which leaves its semantic
            decoder at random weights. Images can then be encoded and reconstructed, but not understood. In folders
            without this field it follows from the training settings in the folder; without those it is True.
    """

    image_size: int = 256
    patch_size: int = 16
    num_channels: int = 3
    encoder_hidden_size: int = 1024
    encoder_num_layers: int = 23
    encoder_num_heads: int = 16
    encoder_intermediate_size: int = 4096
    encoder_activation: str = "gelu_tanh"
    encoder_norm_eps: float = 1e-6
    encoder_num_special_tokens: int = 0
    encoder_pre_norm: bool = False
    encoder_backbone: str = ""
    encoder_backbone_stage: int = -1
    codebook_dim: int = 32
    codebook_size: int = 32768
    num_quantizers: int = 16
    quantizer: str = "rvq"
    quantizer_gradient: str = "straight_through"
    fsq_levels: Sequence[int] = ()
    pixel_depth: int = 4
    semantic_depth: int = 16
    pixel_latent_channels: int = 256
    decoder_channels: int = 128
    decoder_channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4)
    decoder_num_res_blocks: int = 2
    decoder_norm_groups: int = 32
    semantic_hidden_size: int = 1024
    semantic_num_layers: int = 3
    semantic_num_heads: int = 12
    semantic_head_dim: int = 85
    semantic_dim: int = 1024
    ema_decay: float = 0.99
    restart_threshold: float = 1.0
    codebook_warmup_steps: int = 2000
    restart_by_error: bool = False
    level_dropout: float = 0.0
    semantic_decoder_trained: bool = True
    initializer_range: float = 0.02

    def check(self) -> None:
        """Check all fields.

        Raises:
            UserError: a field has a value of another type, or out of its range, or two fields do not fit together.
        """
        check_types(self, TokenizerSettings.__annotations__)
        multipliers = self.decoder_channel_multipliers
        if not isinstance(multipliers, (list, tuple)) or not all(type(one) is int and one > 0 for one in multipliers):
            raise UserError(
                f"decoder_channel_multipliers: expected a list of whole numbers above 0, got {multipliers!r}"
            )
        self.decoder_channel_multipliers = list(multipliers)
        self._check_sizes()
        self._check_quantizer()

    def _check_quantizer(self) -> None:
        for name, known in (("quantizer", QUANTIZERS), ("quantizer_gradient", QUANTIZER_GRADIENTS)):
            if getattr(self, name) not in known:
                raise UserError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        levels = self.fsq_levels
        if not isinstance(levels, (list, tuple)) or not all(type(one) is int for one in levels):
            raise UserError(f"fsq_levels: expected a list of whole numbers, got {levels!r}")
        self.fsq_levels = list(levels)
        if self.quantizer != "fsq":
            if levels:
                raise UserError(f"fsq_levels {list(levels)} has no effect on quantizer {self.quantizer}; leave it out")
            return
        if self.quantizer_gradient != "straight_through":
            raise UserError(
                f"quantizer_gradient {self.quantizer_gradient} is defined for a nearest code, not for the rounding of "
                "quantizer fsq; leave it out, or choose quantizer rvq or simvq"
            )
        grid = fsq_grid(self.codebook_size, levels)
        if len(grid) > self.codebook_dim:
            raise UserError(
                f"codebook_size {self.codebook_size} as a grid of {' x '.join(map(str, grid))} values has {len(grid)} "
                f"dimensions, more than codebook_dim {self.codebook_dim}; give fsq_levels with fewer and larger numbers"
            )

    def _check_sizes(self) -> None:
        if self.patch_size < 1:
            raise UserError(f"patch_size must be at least 1 pixel, got {self.patch_size}")
        if self.image_size < self.patch_size or self.image_size % self.patch_size:
            raise UserError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}; "
                f"{max(1, self.image_size // self.patch_size) * self.patch_size} is"
            )
        resolutions, fitting = len(self.decoder_channel_multipliers), (self.patch_size - 1).bit_length() + 1
        if resolutions != fitting:
            raise UserError(
                f"{resolutions} decoder_channel_multipliers do not fit patch_size {self.patch_size}: there is one per "
                f"resolution, and each resolution is twice as fine as the previous one, the last at most twice; give "
                f"{fitting} of them, log2(patch_size) rounded up + 1"
            )
        for name in ("pixel_depth", "semantic_depth"):
            if not 1 <= getattr(self, name) <= self.num_quantizers:
                raise UserError(
                    f"{name} must be in 1..{self.num_quantizers} (num_quantizers), got {getattr(self, name)}"
                )
        if self.codebook_size > 65536:
            raise UserError(
                f"codebook_size must be at most 65536 (codes are stored in 16 bits), got {self.codebook_size}"
            )
        if self.encoder_activation not in ACTIVATIONS:
            raise UserError(
                f"encoder_activation must be one of {', '.join(ACTIVATIONS)}, got {self.encoder_activation!r}"
            )
        if not 0 < self.encoder_norm_eps < 1:
            raise UserError(f"encoder_norm_eps must be above 0 and below 1, got {self.encoder_norm_eps}")
        for name in ("level_dropout", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        for name in ("restart_threshold", "codebook_warmup_steps", "initializer_range"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in (
            "num_channels", "encoder_hidden_size", "encoder_num_layers", "encoder_num_heads",
            "encoder_intermediate_size", "codebook_dim", "codebook_size", "pixel_latent_channels", "decoder_channels",
            "decoder_num_res_blocks", "decoder_norm_groups", "semantic_hidden_size", "semantic_num_layers",
            "semantic_num_heads", "semantic_head_dim", "semantic_dim", "encoder_num_special_tokens",
        ):  # fmt: skip
            least = 0 if name.endswith(("layers", "blocks", "tokens")) else 1
            if not least <= getattr(self, name) < _LARGEST:
                raise UserError(f"{name} must be from {least} to {_LARGEST - 1}, got {getattr(self, name)}")
        for multiplier in self.decoder_channel_multipliers:
            if (width := self.decoder_channels * multiplier) % self.decoder_norm_groups:
                raise UserError(
                    f"{width} channels of the pixel decoder (decoder_channels {self.decoder_channels} x {multiplier}) "
                    f"cannot be split into {self.decoder_norm_groups} groups (decoder_norm_groups); give a divisor"
                )
        if self.encoder_hidden_size % self.encoder_num_heads:
            raise UserError(
                f"encoder_hidden_size {self.encoder_hidden_size} is not a multiple of {self.encoder_num_heads} heads"
            )

    def require_semantics(self, what: str = "this tokenizer") -> None:
        """Reject a tokenizer whose semantic decoder was not trained.

        Args:
            what: name of the tokenizer, for the error message.

        Raises:
            UserError: the tokenizer was trained without a teacher.
        """
        if not self.semantic_decoder_trained:
            raise UserError(
                f"the semantic decoder of {what} was not trained (only pixels were, without a teacher), so it cannot "
                "give semantic features; train a tokenizer with --teacher FOLDER --semantic_weight 1"
            )

    def grid_of(self, shape: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of positions of images with the shape (B, 3, H, W).

        Raises:
            ValueError: the shape is another one, empty, or has a height or width that is not a multiple of the patch
                size.
        """
        channels, patch, shape = self.num_channels, self.patch_size, tuple(shape)
        if len(shape) != 4 or shape[1] != channels or 0 in shape or any(side % patch for side in shape[2:]):
            raise ValueError(
                f"expected pixel_values (B, {channels}, H, W), not empty, H and W multiples of the patch size {patch}, "
                f"got {shape}; EvoTokImageProcessor.from_pretrained(folder) prepares images for this model"
            )
        return shape[2] // patch, shape[3] // patch

    @property
    def grid_size(self) -> int:
        """Positions per side."""
        return self.image_size // self.patch_size

    @property
    def num_positions(self) -> int:
        """N, positions per image."""
        return self.grid_size**2

    @property
    def decoder_scales(self) -> list[float]:
        """Upsampling factors between the pixel decoder's resolutions, coarsest first; their product is `patch_size`.

        All are 2 if `patch_size` is a power of two; otherwise the last one is smaller.
        """
        doublings = len(self.decoder_channel_multipliers) - 2
        return [2.0] * doublings + [self.patch_size / 2**doublings] if doublings >= 0 else []
