"""The tokenizer of tokenizer.json, unchanged."""

from transformers import PreTrainedTokenizerFast


class ResidualTokenizer(PreTrainedTokenizerFast):
    """Keeps the text forms of residual tokens whole."""
