"""Image tokens of a text tokenizer, and the ids that its own tokens must leave to the residual tokens."""

import re

from transformers import PreTrainedTokenizerFast

from evotok_plugin.errors import UserError
from llava_ext.prompts.messages import IMAGE_TOKEN
from llava_ext.vocabulary import ResidualVocabulary

IMAGE_START_TOKEN, IMAGE_END_TOKEN = "<|image_start|>", "<|image_end|>"
IMAGE_TOKENS = (IMAGE_TOKEN, IMAGE_START_TOKEN, IMAGE_END_TOKEN)

_INSERTED = re.compile(f"{re.escape(IMAGE_START_TOKEN)}(?:{re.escape(IMAGE_TOKEN)})+{re.escape(IMAGE_END_TOKEN)}")


def collapse_images(text: str) -> str:
    """Replace images that are written out in rendered text, with delimiters, by `<|image_pad|>`.

    `decode` writes an image so, with one `<|image_pad|>` per position; templates of other models write a single one.
    """
    return _INSERTED.sub(IMAGE_TOKEN, text)


def image_token_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Return the ids of `IMAGE_TOKENS`.

    Raises:
        UserError: the tokenizer lacks some of them.
    """
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in IMAGE_TOKENS if token not in vocabulary]
    if missing:
        raise UserError(
            f"the tokenizer lacks {', '.join(missing)}; build the processor with EvoTokLlavaProcessor.from_parts"
        )
    return tuple(vocabulary[token] for token in IMAGE_TOKENS)


def check_residual_range(tokenizer: PreTrainedTokenizerFast, residual: ResidualVocabulary) -> None:
    """Check that no token of the tokenizer is in the range of the residual tokens.

    Raises:
        UserError: some tokens are.
    """
    first, end = residual.offset, residual.offset + residual.size
    inside = [(number, token) for token, number in tokenizer.get_vocab().items() if first <= number < end]
    if inside:
        number, token = min(inside)
        raise UserError(
            f"the tokenizer has {len(inside)} tokens in the range {first}..{end - 1} of the image codes, the first "
            f"is {token!r} with id {number}; after adding tokens, call "
            "model.resize_token_embeddings(len(processor.tokenizer)) and set processor.residual_token_offset = "
            "model.config.residual_token_offset"
        )
