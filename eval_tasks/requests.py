"""Requests of lmms-eval: their options by kind, their images, their prompts and their seeds."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmms_eval.protocol import ChatMessages

from evotok_plugin.data.images import as_picture
from evotok_plugin.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How an answer is generated: the keys of a task's `generation_kwargs` that `model.generate` shall see."""

    max_new_tokens: int = 128
    do_sample: bool | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    num_beams: int = 1
    repetition_penalty: float | None = None  # the model's own
    until: tuple[str, ...] = ()

    def generate_kwargs(self) -> dict[str, Any]:
        sampled = self.temperature > 0 if self.do_sample is None else self.do_sample
        kwargs = {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams, "do_sample": sampled}
        if self.repetition_penalty is not None:
            kwargs["repetition_penalty"] = self.repetition_penalty
        if sampled:
            kwargs |= {"temperature": self.temperature or 1.0, "top_k": self.top_k, "top_p": self.top_p}
        return kwargs

    def cut(self, text: str) -> str:
        """The answer up to the first stop string."""
        ends = [end for stop in self.until if stop and (end := text.find(stop)) >= 0]
        return text[: min(ends)] if ends else text


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """Settings for drawing, named as in `generate_images` and completed by the model's own."""

    guidance_scale: float
    guidance_schedule: str
    negative_prompt: str
    temperature: float | tuple[float, ...]
    top_k: int | tuple[int, ...]
    top_p: float | tuple[float, ...]
    min_p: float | tuple[float, ...]
    num_images: int = 1

    def generate_kwargs(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class ReconstructionOptions:
    """The tokenizer is measured on a folder of images; the task `evotok_reconstruction` says which and how."""


@dataclass(frozen=True)
class Request:
    """One answer to give: where it goes in the list, whose it is, and the options it asks for."""

    place: int
    task: str
    doc_id: int
    repeat: int  # lmms-eval repeats a request by listing it again
    context: str
    messages: Callable[[], ChatMessages]
    options: TextOptions | ImageOptions | ReconstructionOptions


@dataclass(frozen=True)
class PlannedImage:
    """One image to draw: its file, and the text chunks that tell how it was drawn, which it keeps."""

    path: Path
    prompt: str
    seed: int
    chunks: dict[str, str]


OPTIONS_BY_MODALITY = {"text": TextOptions, "image": ImageOptions, "reconstruction": ReconstructionOptions}


def known_options(kind: type, gen_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The entries that are options of `kind`."""
    return {key: value for key, value in gen_kwargs.items() if key in kind.__dataclass_fields__ and value is not None}


def image_seed(seed: int, task: str, doc_id: int, sample: int) -> int:
    """The seed of one image: the same in every run, whatever the batch, the rank or the limit."""
    digest = hashlib.sha256(f"{seed}|{task}|{doc_id}|{sample}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 2


def sample_numbers(request: Request) -> range:
    """The numbers of a request's images among those of its document."""
    count = request.options.num_images
    return range(request.repeat * count, (request.repeat + 1) * count)


def to_conversation(request: Request) -> list[dict]:
    """A document as Hugging Face messages with RGB images.

    Raises:
        UserError: it holds video or audio, or an image that cannot be read.
    """
    messages = request.messages()
    _, videos, audios = messages.extract_media()
    if videos or audios:
        raise UserError(f"{request.task}, document {request.doc_id}: evotok reads images, this one has video or audio")
    conversation = messages.to_hf_messages()
    for message in conversation:
        for part in message["content"]:
            if part["type"] == "image":
                try:
                    part["image"] = as_picture(part["image"])
                except ValueError as error:
                    raise UserError(f"{request.task}, document {request.doc_id}: {error}") from error
    return conversation


def to_prompt(request: Request) -> str:
    """The text of a drawing request.

    Raises:
        UserError: it comes with images: editing is something else.
    """
    messages = request.messages()
    if any(messages.extract_media()):
        raise UserError(f"{request.task}, document {request.doc_id}: evotok draws from text, this one brings media")
    texts = [part.text for message in messages.messages for part in message.content]
    return "\n".join(texts)
