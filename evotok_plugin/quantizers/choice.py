"""The quantizer that a configuration names."""

from evotok_plugin.quantizer import ResidualVectorQuantizer
from evotok_plugin.quantizers.base import Quantizer
from evotok_plugin.quantizers.fsq import FiniteScalarQuantizer
from evotok_plugin.quantizers.simvq import SimVQuantizer
from evotok_plugin.tokenizer_settings import TokenizerSettings


def build_quantizer(settings: TokenizerSettings) -> Quantizer:
    """Build the quantizer of checked settings, with random codebooks."""
    sizes = (settings.num_quantizers, settings.codebook_size, settings.codebook_dim)
    if settings.quantizer == "simvq":
        return SimVQuantizer(*sizes, settings.level_dropout, settings.quantizer_gradient)
    if settings.quantizer == "fsq":
        return FiniteScalarQuantizer(*sizes, settings.fsq_levels, settings.level_dropout, settings.quantizer_gradient)
    return ResidualVectorQuantizer(
        *sizes,
        ema_decay=settings.ema_decay,
        restart_threshold=settings.restart_threshold,
        warmup_steps=settings.codebook_warmup_steps,
        restart_by_error=settings.restart_by_error,
        level_dropout=settings.level_dropout,
        gradient=settings.quantizer_gradient,
    )
