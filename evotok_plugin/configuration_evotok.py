"""Configuration of the EvoTok tokenizer for transformers, and its presets."""

import os
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from evotok_plugin.errors import UserError
from evotok_plugin.tokenizer_settings import TokenizerSettings, recorded_semantics

_PRESETS: dict[str, dict[str, Any]] = {
    # For 48x48 scenes, the embedded default: a hundred steps take seconds on two CPU cores.
    "tiny": {
        "image_size": 48,
        "patch_size": 16,
        "encoder_hidden_size": 128,
        "encoder_num_layers": 4,
        "encoder_num_heads": 4,
        "encoder_intermediate_size": 384,
        "codebook_dim": 16,
        "codebook_size": 32,
        "num_quantizers": 8,
        "semantic_depth": 8,
        "pixel_latent_channels": 64,
        "decoder_channels": 16,
        "decoder_channel_multipliers": (1, 1, 2, 4, 8),
        "decoder_num_res_blocks": 0,
        "decoder_norm_groups": 8,
        "semantic_hidden_size": 128,
        "semantic_num_layers": 2,
        "semantic_num_heads": 4,
        "semantic_head_dim": 32,
        "semantic_dim": 128,
        # For hundreds of training steps, not hundreds of thousands: codebooks must follow the encoder quickly.
        "ema_decay": 0.95,
        "codebook_warmup_steps": 0,
        "restart_threshold": 0.2,
        "restart_by_error": True,
    },
    # For one 24 GB GPU, with the teacher siglip2-base-patch16-256.
    "base": {
        "encoder_hidden_size": 768,
        "encoder_num_layers": 11,
        "encoder_num_heads": 12,
        "encoder_intermediate_size": 3072,
        "codebook_size": 16384,
        "decoder_channels": 96,
        "semantic_hidden_size": 768,
        "semantic_head_dim": 64,
        "semantic_dim": 768,
    },
    "paper": {},
    # The paper's method on google/siglip2-so400m-patch14-384: 27x27 positions.
    "paper_384": {
        "image_size": 378,
        "patch_size": 14,
        "encoder_hidden_size": 1152,
        "encoder_num_layers": 26,
        "encoder_num_heads": 16,
        "encoder_intermediate_size": 4304,
        # As wide as the features, as in the paper. Its 12 heads divide this width into 96 dimensions each, which fused
        # attention takes without padding (unlike the paper's 85).
        "semantic_hidden_size": 1152,
        "semantic_num_heads": 12,
        "semantic_head_dim": 96,
        "semantic_dim": 1152,
    },
}


class EvoTokConfig(TokenizerSettings, PreTrainedConfig):
    """`TokenizerSettings` as a configuration of transformers; the defaults are the paper's (arXiv 2603.12108)."""

    model_type = "evotok"

    def __post_init__(self, **kwargs: Any) -> None:
        self.check()
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read config.json; a missing `semantic_decoder_trained` is taken from `recorded_semantics`."""
        values, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if values.get("model_type") == EvoTokConfig.model_type and "semantic_decoder_trained" not in values:
            if (trained := recorded_semantics(pretrained_model_name_or_path, values)) is not None:
                values["semantic_decoder_trained"] = trained
        return values, kwargs

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "EvoTokConfig":
        """The configuration `tiny`, `base`, `paper` or `paper_384`, with fields replaced.

        Raises:
            UserError: the preset or a field does not exist.
        """
        if name not in _PRESETS:
            raise UserError(f"unknown preset {name!r}; expected one of {', '.join(_PRESETS)}")
        fields = TokenizerSettings.__annotations__
        if unknown := sorted(set(overrides) - set(fields)):
            raise UserError(f"EvoTokConfig has no field {', '.join(unknown)}; it has {', '.join(fields)}")
        return cls(**{**_PRESETS[name], **overrides})


AutoConfig.register(EvoTokConfig.model_type, EvoTokConfig, exist_ok=True)
