"""Pixels to latents: SigLIP's vision tower without its last layer, then a small bottleneck.

B batch, N positions, D width, C codebook_dim.
"""

from torch import Tensor, nn
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoder, SiglipVisionEmbeddings

from evotok_plugin.configuration_evotok import EvoTokConfig
from evotok_plugin.positions import resize_positions


class EvoTokEncoder(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> latents (B, N, C); H and W must be multiples of the patch size.

    The features are SigLIP's `hidden_states[-2]`, so its last layer, final norm and pooling head, which would never
    get a gradient, are left out.
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
        self.patch_size, self.grid_size = config.patch_size, config.grid_size
        self.embeddings = SiglipVisionEmbeddings(tower)
        self.encoder = SiglipEncoder(tower)  # type: ignore[arg-type]  # annotated with the wrong one of its configurations
        self.to_latent = nn.Sequential(
            nn.Linear(config.encoder_hidden_size, config.encoder_hidden_size),
            nn.Tanh(),
            nn.Linear(config.encoder_hidden_size, config.codebook_dim),
        )

    def features(self, pixel_values: Tensor) -> Tensor:
        """Features of the tower (B, N, D), before the bottleneck."""
        return self.encoder(inputs_embeds=self._embed(pixel_values)).last_hidden_state

    def _embed(self, pixel_values: Tensor) -> Tensor:
        grid = (pixel_values.shape[2] // self.patch_size, pixel_values.shape[3] // self.patch_size)
        if grid == (self.grid_size, self.grid_size):
            return self.embeddings(pixel_values)
        project, positions = self.embeddings.patch_embedding, self.embeddings.position_embedding.weight
        patches = project(pixel_values.to(project.weight.dtype)).flatten(2).transpose(1, 2)
        return patches + resize_positions(positions, self.grid_size, grid)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.to_latent(self.features(pixel_values))
