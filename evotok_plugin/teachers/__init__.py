"""Pretrained vision networks of transformers and timm as teachers."""
