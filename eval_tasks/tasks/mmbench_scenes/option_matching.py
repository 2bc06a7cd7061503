"""Matching of free answers to options by MMBench's rules, without a language model as judge."""

import re
from collections.abc import Mapping

_WRAPPING = "()[]{}<>.,:;!?*'\"`"


def _letter(answer: str, letters: set[str]) -> str | None:
    words = answer.split()
    # In a sentence, "A" is more often an article than an option.
    is_sentence = len(words) > 3
    found = {bare for word in words if (bare := word.strip(_WRAPPING)) in letters and not (is_sentence and word == "A")}
    return found.pop() if len(found) == 1 else None


def _text(answer: str, options: Mapping[str, str]) -> str | None:
    lowered = answer.lower()
    found = {
        letter: text.lower().strip()
        for letter, text in options.items()
        if text.strip() and re.search(rf"(?<!\w){re.escape(text.lower().strip())}(?!\w)", lowered)
    }
    # "top left" also contains "left": an option within a longer one that was found does not count.
    whole = [
        letter
        for letter, text in found.items()
        if not any(text != other and re.search(rf"(?<!\w){re.escape(text)}(?!\w)", other) for other in found.values())
    ]
    return whole[0] if len(whole) == 1 else None


def match_option(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that an answer names; None if it names none or several.

    The letter itself takes precedence ("B", "(B)", "B.", "The answer is B"), then the option's text.

    Args:
        answer: the model's answer.
        options: text by letter.
    """
    return _letter(answer, set(options)) or _text(answer, options)
