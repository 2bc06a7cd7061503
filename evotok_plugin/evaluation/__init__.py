"""Evaluation of a tokenizer: reconstruction, features, probes, and the same level by level."""
