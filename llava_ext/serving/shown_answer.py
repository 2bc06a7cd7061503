"""An answer in progress as the messages of the page show it."""

import html
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder
from PIL import Image

from evotok_plugin.common.pictures import enlarged
from llava_ext.generation import Event, ImageDrawn, ImagePreview, ImageStarted, TextDelta
from llava_ext.serving.image_files import Provenance

_LARGEST_SHOWN = 512  # pixels per side


@dataclass
class ShownAnswer:
    """An answer in progress, which may have several rows: one per drawing that is drawn at the same time.

    Attributes:
        provenance: creates the provenance of a finished image.
        rows: the parts of each row, as in the `content` of a message for `gr.Chatbot`.
        drawing: rows whose last part is a placeholder of an unfinished image.
    """

    provenance: Callable[[ImageDrawn], Provenance]
    rows: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    drawing: set[int] = field(default_factory=set)

    @property
    def content(self) -> list[dict[str, Any]]:
        """The `content` of the message: the parts of all rows in their order."""
        return [part for row in sorted(self.rows) for part in self.rows[row]]

    def add(self, event: Event) -> None:
        """Add an event to the content."""
        parts = self.rows.setdefault(event.row, [])
        if isinstance(event, TextDelta):
            if not parts or "text" not in parts[-1]:
                parts += text_parts(event.text)
            else:
                parts[-1] = {"type": "text", "text": parts[-1]["text"] + _as_html(event.text)}
        elif isinstance(event, ImageStarted):
            self.drawing.add(event.row)
            parts.append({"type": "text", "text": "drawing ..."})
        elif isinstance(event, ImagePreview):
            parts[-1] = image_part(event.image)
        elif isinstance(event, ImageDrawn):
            self.drawing.discard(event.row)
            provenance = self.provenance(event)
            image = enlarged(event.image, provenance.scale).copy()
            image.info.update(provenance.as_png_text())
            parts[-1] = image_part(image)

    def end(self) -> None:
        """Remove unfinished images, which are not part of the conversation."""
        for row in self.drawing:
            self.rows[row].pop()
        self.drawing.clear()
        if not self.content:
            self.rows[0] = text_parts("(no answer)")


def text_parts(text: str) -> list[dict[str, Any]]:
    """The parts of a message that has this text; none if it is empty."""
    return [{"type": "text", "text": _as_html(text)}] if text else []


def _as_html(text: str) -> str:
    """Escape a text, which the page renders as HTML even without Markdown: `<image>` would be invisible."""
    return html.escape(text, quote=False)


def image_part(image: Image.Image) -> dict[str, Any]:
    """Save an image as a file of the page; its only metadata is our PNG text."""
    # gradio names files by their content. With a folder of its own for each image, an upload or image with the same
    # content neither removes the file that the page shows nor writes it again while it is being sent.
    folder = os.path.join(get_upload_folder(), "shown", secrets.token_hex(8))
    return {"path": save_pil_to_cache(reduced(image), folder, format="png")}


def reduced(image: Image.Image) -> Image.Image:
    """Scale down an image that is larger than the page shows."""
    if max(image.size) <= _LARGEST_SHOWN:
        return image
    reduced = image.copy()
    reduced.thumbnail((_LARGEST_SHOWN, _LARGEST_SHOWN))
    return reduced
