"""The tokenizer of tokenizer.json, unchanged."""

from transformers import PreTrainedTokenizerFast


class ResidualTokenizer(PreTrainedTokenizerFast):
    """A tokenizer that never splits the text form of a residual token."""
