"""Conversion of research checkpoints into model folders."""
