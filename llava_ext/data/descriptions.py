"""Conversations that describe an image, turned into samples that draw the image from the description.

LLaVA's data only reads images: every `<image>` is in a human turn. A conversation that asks for a description and
receives one contains a prompt and its image, so it can also teach drawing. `is_description` is the rule.
"""

import hashlib
import re
from collections.abc import Sequence

from evotok_plugin.errors import UserError
from llava_ext.prompts.placeholders import LLAVA_IMAGE, count_images

_PICTURE = frozenset(
    "image picture photo photograph scene snapshot painting illustration drawing artwork visual visuals this".split()
)
_ASKS = frozenset(
    """
    describe describing description caption captions summarize summarise summary explain explanation explanatory
    elaborate narrate narrative narration portray portrayal depict depiction interpretation interpret account rundown
    characterize characterise walk break analyze analyse analysis examine examination clarify illustrate overview
    descriptive narrative
    """.split()
)
# Words without a subject of their own: an instruction with any other word asks for something in particular.
_GENERIC = frozenset(
    """
    a an the this that it its these of in on with for to by through from into at as down about out and or but you i
    me us your what what's whats is are do does see seen think notice observe look take happening going shown show
    shows depicted visible displayed contained there every everything all please kindly can could would will give
    provide offer share present relay render write create make generate produce compose add tell enlighten using use
    brief briefly short shortly succinct succinctly concise concisely compact terse clear clearly simple precise
    precisely precision informative detailed detail details well-detailed elaborate exhaustive comprehensive
    thorough thoroughly rich full complete depth in-depth great manner way closely vivid accurate possible much
    representing one-sentence one sentence single few sentences words paragraph key main important striking major
    various aspects features feature elements element content contents given provided presented following subsequent
    below above before attached displayed image's picture's photo's photograph's scene's go ahead let know
    """.split()
)
_QUESTIONS = ("what", "what's", "whats")
_OCR_HINT = re.compile(r"^reference ocr tokens?:.*$", re.MULTILINE | re.DOTALL | re.IGNORECASE)  # of TextCaps
_NOT_PROSE = re.compile(r"^\s*[\[{<]|\[\s*[\d.]+\s*,")  # code, lists, coordinates


def check_share(share: float) -> None:
    """Check the share of descriptions that are drawn.

    Raises:
        UserError: it is outside 0 to 1.
    """
    if not 0 <= share <= 1:
        raise UserError(f"draw_share must be from 0 to 1, got {share}")


def is_description(messages: Sequence[dict]) -> bool:
    """Whether a conversation describes one image as a whole.

    It has one user turn with exactly one image, and one answer of at least two words of prose without an image; a
    system turn may precede them. The user's text is empty, or it names the picture, asks for a description (or begins
    with "what") and has only generic words: any other word, such as "man" or "left", asks for something in particular.
    A list of OCR tokens, as in TextCaps, is disregarded.

    Args:
        messages: with `role` and `content`; `<image>` in a content is an image.
    """
    turns = [message for message in messages if message["role"] != "system"]
    if [turn["role"] for turn in turns] != ["user", "assistant"] or count_images(turns[0]["content"]) != 1:
        return False
    if len(turns) < len(messages) and count_images(messages[0]["content"]):
        return False
    answer = turns[1]["content"]
    if count_images(answer) or len(answer.split()) < 2 or _NOT_PROSE.search(answer):
        return False
    return asks_for_description(instruction_of(messages))


def instruction_of(messages: Sequence[dict]) -> str:
    """The text of the first user turn, without its image."""
    content = next(message["content"] for message in messages if message["role"] == "user")
    return content.replace(LLAVA_IMAGE, " ").strip()


def asks_for_description(instruction: str) -> bool:
    """Whether a text asks for a description of a whole picture; an empty text does."""
    text = _OCR_HINT.sub("", instruction).lower().replace("’", "'")
    words = [word.strip(".,?!;'") for word in text.split()]
    words = [word for word in words if word]
    if not words:
        return True
    if not all(word in _PICTURE | _ASKS | _GENERIC for word in words):
        return False
    return any(word in _PICTURE for word in (word.removesuffix("'s") for word in words)) and (
        words[0] in _QUESTIONS or any(word in _ASKS for word in words)
    )


def drawing_of(messages: Sequence[dict]) -> tuple[dict, ...]:
    """The conversation that draws the image of a description: the description asks, the image answers."""
    description = next(message["content"] for message in messages if message["role"] == "assistant")
    return {"role": "user", "content": description.strip()}, {"role": "assistant", "content": LLAVA_IMAGE}


def is_chosen(description: str, image: str, share: float) -> bool:
    """Whether a description is among the share that is drawn.

    The choice depends only on the description and its image, so it is the same in every process, run and epoch, and a
    larger share contains a smaller one.

    Args:
        image: key of the image.
    """
    digest = hashlib.sha256(f"{image}\n{description}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
