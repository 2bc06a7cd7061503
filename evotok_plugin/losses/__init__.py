"""Losses of the tokenizer and of the language model."""
