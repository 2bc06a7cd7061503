"""Reconstruction of images through the tokenizer of a model."""
