"""Conversion of checkpoints of the research code into model folders."""
