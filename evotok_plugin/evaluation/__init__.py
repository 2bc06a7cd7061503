"""Evaluation of a tokenizer: reconstruction, semantic features and code usage, also level by level."""
