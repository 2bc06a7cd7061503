"""`<image>` placeholders in text, and the escaping of a literal `<image>`.

In a string, `<image>` represents an image and `\\<image>` the text `<image>`. Backslashes have a meaning only before
`<image>`: `\\\\<image>` is one backslash and an image. In a list of message parts nothing is escaped: the text of a
`{"type": "text"}` part is always literal.
"""

import re

LLAVA_IMAGE = "<image>"
_WITH_BACKSLASHES = re.compile(r"(\\*)" + re.escape(LLAVA_IMAGE))


def split_at_images(text: str) -> list[str]:
    """Split at every `<image>` that represents an image, and remove the escapes from the pieces.

    Returns:
        one piece more than there are images.
    """
    pieces: list[str] = []
    current, end = "", 0
    for match in _WITH_BACKSLASHES.finditer(text):
        pairs, escaped = divmod(len(match[1]), 2)
        current += text[end : match.start()] + "\\" * pairs
        end = match.end()
        if escaped:
            current += LLAVA_IMAGE
        else:
            pieces.append(current)
            current = ""
    return [*pieces, current + text[end:]]


def count_images(text: str) -> int:
    """Count the `<image>` in `text` that represent images."""
    return sum(len(match[1]) % 2 == 0 for match in _WITH_BACKSLASHES.finditer(text))


def escape_images(text: str) -> str:
    """Escape every `<image>`, so that `split_at_images` returns `text` as one piece."""
    return _WITH_BACKSLASHES.sub(lambda match: match[1] * 2 + "\\" + LLAVA_IMAGE, text)
