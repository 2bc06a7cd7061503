"""The training stages of the multimodal model."""
