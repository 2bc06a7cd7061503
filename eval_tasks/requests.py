"""The requests of lmms-eval: their options by modality, their prompts and images, and the seeds of drawn images."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lmms_eval.protocol import ChatMessages
from PIL.Image import Image

from evotok_plugin.data.images import as_picture
from evotok_plugin.errors import UserError
from llava_ext.generation import DrawingOptions
from llava_ext.generation.answer_options import AnswerOptions
from llava_ext.serving.image_files import read_png_text


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Options of generated answers: the keys of a task's `generation_kwargs` that are passed to `model.generate`.

    Attributes:
        do_sample: None samples if the temperature is above 0.
        repetition_penalty: None is the model's own.
        until: stop strings.
    """

    max_new_tokens: int = 128
    do_sample: bool | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    num_beams: int = 1
    repetition_penalty: float | None = None
    until: tuple[str, ...] = ()

    @classmethod
    def from_gen_kwargs(cls, gen_kwargs: Mapping[str, Any]) -> "TextOptions":
        """Select the options among a task's `generation_kwargs`.

        Raises:
            UserError: sampling with a temperature of 0.
        """
        known = _select(gen_kwargs, OPTION_NAMES["text"])
        if known.get("do_sample") and known.get("temperature") == 0:
            raise UserError("do_sample=true needs a temperature above 0, got 0")
        until = known.get("until", ())
        return cls(**{**known, "until": (until,) if isinstance(until, str) else tuple(until)})

    def generate_kwargs(self) -> dict[str, Any]:
        """The arguments of `model.generate`."""
        do_sample = self.temperature > 0 if self.do_sample is None else self.do_sample
        kwargs: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams}
        kwargs["do_sample"] = do_sample
        if self.repetition_penalty is not None:
            kwargs["repetition_penalty"] = self.repetition_penalty
        if do_sample:
            kwargs |= {"temperature": self.temperature or 1.0, "top_k": self.top_k, "top_p": self.top_p}
        return kwargs

    def cut(self, text: str) -> str:
        """The answer up to the first stop string."""
        ends = [end for stop in self.until if stop and (end := text.find(stop)) >= 0]
        return text[: min(ends)] if ends else text


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """The number of images of a request, complete options for drawing them, and the number of candidates per image."""

    drawing: DrawingOptions
    num_images: int = 1
    best_of: int = 1

    @classmethod
    def from_gen_kwargs(cls, gen_kwargs: Mapping[str, Any], defaults: Mapping[str, Any]) -> "ImageOptions":
        """Select the options among a task's `generation_kwargs`.

        Args:
            defaults: the complete settings of the model (`DrawingOptions.settings`), and `best_of`.
        """
        known = {**defaults, **_select(gen_kwargs, OPTION_NAMES["image"])}
        num_images, best_of = (int(known.pop(name, getattr(cls, name))) for name in ("num_images", "best_of"))
        return cls(drawing=DrawingOptions(**known).completed(), num_images=num_images, best_of=best_of)

    def answer_options(self) -> AnswerOptions:
        """The options of the answer that is one of the images."""
        return AnswerOptions(max_images=1, image_first=True, drawing=self.drawing, best_of=self.best_of)

    def settings(self) -> dict[str, Any]:
        """The settings that an image depends on besides its prompt and seed, as its PNG file records them."""
        return drawn_with(self.drawing.settings(), self.best_of)


def drawn_with(settings: Mapping[str, Any], best_of: int) -> dict[str, Any]:
    """Drawing settings with the number of candidates, which images drawn without a selection do not record."""
    return {**settings, "best_of": best_of} if best_of > 1 else dict(settings)


@dataclass(frozen=True, kw_only=True)
class DocumentOptions:
    """Options of answers with images to conversations that may have images themselves.

    Attributes:
        image_first: the answer is one image (an edited one); otherwise the model decides when to draw.
    """

    drawing: DrawingOptions
    image_first: bool
    max_new_tokens: int = 512
    max_images: int = 4
    best_of: int = 1

    @classmethod
    def from_gen_kwargs(
        cls, gen_kwargs: Mapping[str, Any], defaults: Mapping[str, Any], image_first: bool
    ) -> "DocumentOptions":
        """Select the options among a task's `generation_kwargs`, as `ImageOptions.from_gen_kwargs` does."""
        known = {**defaults, **_select(gen_kwargs, OPTION_NAMES["edit" if image_first else "document"])}
        best_of = int(known.pop("best_of"))
        counts = {name: int(known.pop(name)) for name in ("max_new_tokens", "max_images") if name in known}
        drawing = DrawingOptions(**known).completed()
        return cls(drawing=drawing, image_first=image_first, best_of=best_of if image_first else 1, **counts)

    def answer_options(self) -> AnswerOptions:
        """The options of the answer."""
        return AnswerOptions(
            self.max_new_tokens,
            1 if self.image_first else self.max_images,
            self.image_first,
            drawing=self.drawing,
            best_of=self.best_of,
        )

    def settings(self) -> dict[str, Any]:
        """The settings that an image depends on besides its conversation and seed."""
        return drawn_with(self.drawing.settings(), self.best_of)


@dataclass(frozen=True)
class ReconstructionOptions:
    """No options: the task `evotok_reconstruction` itself determines the images and metrics."""


Options = TextOptions | ImageOptions | DocumentOptions | ReconstructionOptions
_DRAWING = frozenset(DrawingOptions().completed().settings())
OPTION_NAMES: dict[str, frozenset[str]] = {
    "text": frozenset(field.name for field in fields(TextOptions)),
    "image": _DRAWING | {"num_images", "best_of"},
    "edit": _DRAWING | {"best_of"},
    "document": _DRAWING | {"max_new_tokens", "max_images"},
    "reconstruction": frozenset(),
}


def _select(gen_kwargs: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {key: value for key, value in gen_kwargs.items() if key in names and value is not None}


@dataclass(frozen=True)
class Request:
    """One requested answer.

    Attributes:
        place: index in lmms-eval's list.
        repeat: number of earlier requests for the same document; lmms-eval repeats a request by listing it again.
        context: the prompt's text, of which only the length is used.
    """

    place: int
    task: str
    doc_id: int
    repeat: int
    context: str
    messages: Callable[[], ChatMessages]
    options: Options


@dataclass(frozen=True)
class PlannedImage:
    """An image to draw, and the text chunks of its PNG file, which record how it was drawn."""

    path: Path
    prompt: str
    seed: int
    chunks: dict[str, str]


def is_drawn(image: PlannedImage) -> bool:
    """Whether the image exists already, drawn in the planned way."""
    return read_png_text(image.path) == image.chunks


def images_digest(images: Sequence[Image]) -> str:
    """A digest of the pixels of images, in order."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(f"{image.size}".encode() + image.tobytes())
    return digest.hexdigest()[:16]


def image_seed(seed: int, task: str, doc_id: int, sample: int) -> int:
    """The seed of one image, independent of batch, rank and limit."""
    digest = hashlib.sha256(f"{seed}|{task}|{doc_id}|{sample}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 2


def sample_numbers(request: Request, num_images: int) -> range:
    """The numbers of a request's images among all images of its document."""
    return range(request.repeat * num_images, (request.repeat + 1) * num_images)


def to_conversation(request: Request) -> list[dict]:
    """The messages of a request in the format of Hugging Face, with RGB images.

    Raises:
        UserError: the document has video or audio, or an image that cannot be read.
    """
    messages = request.messages()
    _, videos, audios = messages.extract_media()
    if videos or audios:
        raise UserError(f"{request.task}, document {request.doc_id}: evotok reads images, but got video or audio")
    conversation = messages.to_hf_messages()
    for message in conversation:
        for part in message["content"]:
            if part["type"] == "image":
                try:
                    part["image"] = as_picture(part["image"])
                except UserError as error:
                    raise UserError(f"{request.task}, document {request.doc_id}: {error}") from error
    return conversation


def to_prompt(request: Request) -> str:
    """The text of a request for images.

    Raises:
        UserError: the document has images or other media; tasks that edit images have the modality `edit`.
    """
    messages = request.messages()
    if any(messages.extract_media()):
        raise UserError(
            f"{request.task}, document {request.doc_id}: the modality image draws from text, but got media; set "
            "modality: edit in the task's generation_kwargs"
        )
    texts = [part.text for message in messages.messages for part in message.content]
    return "\n".join(texts)
