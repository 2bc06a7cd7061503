"""The vocabulary of llama.cpp: a byte-level BPE with residual tokens, in the form that a GGUF file stores.

llama.cpp splits text into words with rules of its own that a file selects by name. Words of other rules would be
tokenized differently, so only tokenizers with one of the rules below can be written.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from evotok_plugin.errors import UserError
from llava_ext.vocabulary import ResidualVocabulary

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
# By llama.cpp's name of the rule: the steps of a pre-tokenizer before the conversion of bytes to characters.
_RULES: dict[str, list[tuple[str, Any]]] = {
    "gpt-2": [("ByteLevel", True)],
    "qwen2": [("Split", _QWEN2_WORDS), ("ByteLevel", False)],
    "llama-bpe": [("Split", _LLAMA3_WORDS), ("ByteLevel", False)],
    "smollm": [("Digits", True), ("ByteLevel", True)],
}
_NAMES_OF_RULES = {
    "gpt-2": "GPT-2's",
    "qwen2": "Qwen2's",
    "llama-bpe": "Llama 3's",
    "smollm": "SmolLM's",
}


class TokenKind(IntEnum):
    """Kinds of tokens in a GGUF file."""

    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


@dataclass(frozen=True)
class GgufVocabulary:
    """Tokens of a GGUF file.

    Attributes:
        tokens: by id; those of the BPE as characters that stand for bytes, the others as plain text.
        kinds: by id. llama.cpp always reads and writes tokens of the kind USER_DEFINED as their text.
        merges: two parts separated by a space, best first.
        rule: llama.cpp's name of the rule that splits text into words.
    """

    tokens: list[str]
    kinds: list[TokenKind]
    merges: list[str]
    rule: str


def gguf_vocabulary(tokenizer: Any, residual: ResidualVocabulary, num_rows: int) -> GgufVocabulary:
    """Describe a tokenizer with residual tokens to llama.cpp.

    Args:
        tokenizer: a fast tokenizer of transformers without residual tokens.
        num_rows: number of rows of the embedding table; rows without a token get a name that no text contains.

    Raises:
        UserError: llama.cpp cannot tokenize text as this tokenizer does.
    """
    facts = json.loads(tokenizer.backend_tokenizer.to_str())
    bpe = facts["model"]
    _check_bpe(bpe)
    if facts["normalizer"] not in (None, {"type": "NFC"}):
        raise UserError(f"llama.cpp does not normalize text, but the tokenizer does ({facts['normalizer']['type']})")
    rule = _rule_of(facts["pre_tokenizer"])
    tokens = [f"[UNUSED:{token_id}]" for token_id in range(num_rows)]
    kinds = [TokenKind.UNUSED] * num_rows

    def put(token_id: int, text: str, kind: TokenKind) -> None:
        tokens[token_id], kinds[token_id] = text, kind

    for text, token_id in bpe["vocab"].items():
        put(token_id, text, TokenKind.NORMAL)
    for token in facts["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise UserError(
                f"the token {token['content']!r} takes spaces or depends on the text around it (lstrip, rstrip or "
                "single_word), which llama.cpp does not support"
            )
        put(token["id"], token["content"], TokenKind.CONTROL if token["special"] else TokenKind.USER_DEFINED)
    for token_id in range(residual.offset, residual.offset + residual.size):
        put(token_id, residual.to_text(token_id), TokenKind.USER_DEFINED)
    if len(set(tokens)) < num_rows:
        raise UserError("two tokens of the tokenizer have the same text, which llama.cpp does not support")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    return GgufVocabulary(tokens, kinds, merges, rule)


def _check_bpe(bpe: dict[str, Any]) -> None:
    """Check that a tokenizer's model is a BPE over bytes, as that of GPT-2."""
    kind = bpe["type"]
    if kind == "BPE":
        others = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "fuse_unk")
        used = [name for name in others if bpe.get(name)]
        absent = sum(letter not in bpe["vocab"] for letter in ByteLevel.alphabet())
        if not used and not absent:
            return
        kind = f"BPE with {', '.join(used)}" if used else f"BPE without tokens for {absent} of the 256 bytes"
    raise UserError(
        f"--format gguf supports byte-level BPEs, as those of Qwen2 and Llama 3; this tokenizer is a {kind} "
        "(SentencePiece-style tokenizers are not supported)"
    )


def _rule_of(pre_tokenizer: dict[str, Any] | None) -> str:
    """llama.cpp's name of the rule that splits text as a pre-tokenizer does."""
    steps = [] if pre_tokenizer is None else pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    found = [_essence(step) for step in steps]
    for name, rule in _RULES.items():
        if found == rule:
            return name
    raise UserError(
        f"llama.cpp has no rule that splits text as this tokenizer does ({found}); supported are "
        f"{', '.join(_NAMES_OF_RULES.values())}"
    )


def _essence(step: dict[str, Any]) -> tuple[str, Any]:
    """The type of a step with the setting that matters, or with all settings if they are unusual."""
    kind = step["type"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return kind, step["use_regex"]
    if kind == "Digits":
        return kind, step["individual_digits"]
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return kind, step["pattern"].get("Regex")
    return kind, {name: value for name, value in step.items() if name != "type"}


def rivals_of_residual_tokens(vocabulary: GgufVocabulary, texts: Iterable[str]) -> list[int]:
    """Ids of other tokens that begin one of the texts.

    A grammar compares characters: it would accept a text in several tokens instead of the one token of that text.
    """
    texts = set(texts)
    beginnings = {text[:length] for text in texts for length in range(1, len(text))}
    return [token_id for token_id, text in enumerate(vocabulary.tokens) if text in beginnings]
