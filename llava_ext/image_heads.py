"""Build the image head that a configuration asks for."""

from evotok_plugin import DepthTransformerConfig, DepthTransformerHead
from llava_ext.configuration_evotok_llava import EvoTokLlavaConfig
from llava_ext.flat_head import FlatHead, FreeFlatHead, TiedFlatHead


def build_image_head(config: EvoTokLlavaConfig) -> DepthTransformerHead | FlatHead:
    """Build an image head with random weights: `config.image_head` selects its type."""
    vision, width = config.vision_config, config.text_config.hidden_size
    if config.image_head == "depth":
        return DepthTransformerHead(
            DepthTransformerConfig(
                llm_hidden_size=width,
                codebook_dim=vision.codebook_dim,
                codebook_size=vision.codebook_size,
                num_levels=vision.pixel_depth,
                hidden_size=config.head_hidden_size,
                num_layers=config.head_num_layers,
                num_heads=config.head_num_heads,
            )
        )
    if config.residual_embeddings == "free":
        return FreeFlatHead(vision.pixel_depth, vision.codebook_size, width)
    return TiedFlatHead(vision.pixel_depth, vision.codebook_size, vision.codebook_dim, width)
