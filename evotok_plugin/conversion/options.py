"""The options of converting a research checkpoint."""

from dataclasses import dataclass, field
from typing import Any


def _option(text: str, default: int | None = None) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """Sizes that cannot be inferred from the shapes of a tokenizer checkpoint; None applies the convention."""

    encoder_num_layers: int | None = _option("SigLIP layers to run (default: all in the file but the last)")
    encoder_num_heads: int | None = _option(
        "attention heads of SigLIP (default: of 64 dimensions each; 16 heads for width 1152)"
    )
    semantic_num_heads: int | None = _option(
        "attention heads of the semantic decoder (default: 12 if its inner width is 12 * (width // 12), otherwise of "
        "64 dimensions each)"
    )
    pixel_depth: int = _option("levels summed for pixels (default: 4)", 4)
    semantic_depth: int | None = _option("levels summed for features (default: all)")
    decoder_norm_groups: int = _option("groups of the pixel decoder's GroupNorm (default: 32)", 32)
