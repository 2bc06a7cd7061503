"""Pixels to latents: SigLIP's vision tower up to its last layer but one, then a small bottleneck.

B batch, N positions, D width, C codebook_dim.
"""

from torch import Tensor, nn
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoder, SiglipVisionEmbeddings

from evotok_plugin.configuration_evotok import EvoTokConfig


class EvoTokEncoder(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> latents (B, N, C).

    Only the layers that are used exist: SigLIP's last layer, its final norm and its pooling head would never get a
    gradient (the features are `hidden_states[-2]`).
    """

    def __init__(self, config: EvoTokConfig) -> None:
        super().__init__()
        tower = SiglipVisionConfig(
            hidden_size=config.encoder_hidden_size,
            intermediate_size=config.encoder_intermediate_size,
            num_hidden_layers=config.encoder_num_layers,
            num_attention_heads=config.encoder_num_heads,
            num_channels=config.num_channels,
            image_size=config.image_size,
            patch_size=config.patch_size,
        )
        tower._attn_implementation = "sdpa"
        self.image_size = config.image_size
        self.embeddings = SiglipVisionEmbeddings(tower)
        self.encoder = SiglipEncoder(tower)
        self.to_latent = nn.Sequential(
            nn.Linear(config.encoder_hidden_size, config.encoder_hidden_size),
            nn.Tanh(),
            nn.Linear(config.encoder_hidden_size, config.codebook_dim),
        )

    def features(self, pixel_values: Tensor) -> Tensor:
        """The tower's features (B, N, D), before the bottleneck."""
        return self.encoder(inputs_embeds=self.embeddings(pixel_values)).last_hidden_state

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.to_latent(self.features(pixel_values))
