"""Bodies of requests, and what they ask the model for."""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from evotok_plugin.errors import UserError
from evotok_plugin.sampling import SamplingOptions
from llava_ext.generation import AnswerOptions, DrawingOptions
from llava_ext.generation.options import SCHEDULES
from llava_ext.serving.uploads import UploadLimits, open_upload

_LARGEST_SIDE = 2048  # pixels of an enlarged image
# Fields of OpenAI's requests that do not concern the answer.
_WITHOUT_EFFECT = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "moderation",
    "parallel_tool_calls",
}  # fmt: skip
# Fields of OpenAI's requests that would change the answer if they were honored, and their values without effect.
_NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "stop": ([],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "audio": (),
    "prediction": (),
    "quality": ("auto",),
    "background": ("auto", "opaque"),
    "style": (),
    "output_compression": (100,),
}


@dataclass(frozen=True)
class ApiLimits:
    """Limits of what clients can ask for.

    Attributes:
        upload: limits of one image.
        max_body_mb: size of a request in MB.
        max_messages, max_images: messages and images of a conversation.
        max_chars: characters of a conversation, and of a prompt.
        max_new_tokens: largest number of tokens of an answer.
        max_candidates: images of a request times candidates of each.
        max_rows: answers and candidates that are generated together.
        max_waiting: requests that can wait for the model; further ones are rejected with 429.
        max_connections: connections at the same time; further ones are rejected.
    """

    upload: UploadLimits = UploadLimits()
    max_body_mb: float = 32.0
    max_messages: int = 64
    max_images: int = 16
    max_chars: int = 16_000
    max_new_tokens: int = 1024
    max_candidates: int = 32
    max_rows: int = 16
    max_waiting: int = 64
    max_connections: int = 512


class _Drawing(BaseModel):
    """Settings of images, beside OpenAI's; the model's own apply where they are absent."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str | None = None
    seed: int = Field(0, ge=0, lt=2**32)
    guidance_scale: float | list[float] | None = None
    guidance_schedule: str | None = None
    guidance_interval: list[float] | None = None
    guidance_rescale: float | None = None
    negative_prompt: str | None = None
    best_of: int = Field(1, ge=1)

    def check_fields(self) -> None:
        """Check that no field is unknown or not supported: it would be ignored without a word.

        Raises:
            UserError: one is.
        """
        for name, value in (self.model_extra or {}).items():
            if value is None or name in _WITHOUT_EFFECT:
                continue
            if name not in _NOT_SUPPORTED:
                near = get_close_matches(name, type(self).model_fields, n=1)
                raise UserError(
                    f"unknown field {name!r}; " + (f"did you mean {near[0]!r}?" if near else "leave it out")
                )
            if value not in _NOT_SUPPORTED[name]:
                raise UserError(f"{name} is not supported; leave it out")

    def drawing(self, sampling: dict[str, Any]) -> DrawingOptions:
        """The drawing settings, with those of sampling.

        Raises:
            UserError: a value is out of its range.
        """
        if self.guidance_schedule not in (None, *SCHEDULES):
            raise UserError(f"guidance_schedule: expected one of {', '.join(SCHEDULES)}")
        per_level: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in {"guidance_scale": self.guidance_scale, **sampling}.items()
        }
        return DrawingOptions(
            guidance_schedule=self.guidance_schedule,
            guidance_interval=None if self.guidance_interval is None else tuple(self.guidance_interval),
            guidance_rescale=self.guidance_rescale,
            negative_prompt=self.negative_prompt,
            **per_level,
        )


class ImageRequest(_Drawing):
    """`POST /v1/images/generations`."""

    prompt: str = Field(min_length=1)
    n: int = Field(1, ge=1)
    size: str | None = None
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=16)
    temperature: float | list[float] | None = None
    top_k: int | list[int] | None = None
    top_p: float | list[float] | None = None
    min_p: float | list[float] | None = None

    def options(self, num_positions: int, limits: ApiLimits) -> AnswerOptions:
        """The options of the images.

        Raises:
            UserError: a value is out of its range, or a field is unknown or not supported.
        """
        self.check_fields()
        check_length("the prompt", self.prompt, limits)
        check_length("the negative prompt", self.negative_prompt or "", limits)
        if not self.prompt.strip():
            raise UserError("prompt: expected a text that is not empty; say what to draw")
        if self.n * self.best_of > limits.max_candidates:
            raise UserError(f"n x best_of must be at most {limits.max_candidates}, got {self.n} x {self.best_of}")
        if self.stream and self.n > 1:
            raise UserError(f"stream: expected n = 1, got {self.n}")
        sampling = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        return AnswerOptions(
            max_new_tokens=0,
            image_first=True,
            drawing=self.drawing(sampling),
            max_images=1,
            preview_every=preview_interval(num_positions, self.partial_images if self.stream else 0),
            best_of=self.best_of,
        )

    def scale(self, side: int, default: int) -> int:
        """The whole factor that enlarges images of `side` pixels to the requested size.

        Raises:
            UserError: the size is not a multiple of what the model draws, or too large.
        """
        if self.size in (None, "auto"):
            return default
        width, _, height = str(self.size).partition("x")
        if width == height and width.isdecimal() and int(width) % side == 0 and 0 < int(width) <= _LARGEST_SIDE:
            return int(width) // side
        raise UserError(
            f"size: expected auto or a multiple of {side}x{side}, at most {_LARGEST_SIDE}x{_LARGEST_SIDE} (the model "
            f"draws {side}x{side}, which is enlarged pixel by pixel), got {self.size!r}"
        )


class ChatRequest(_Drawing):
    """`POST /v1/chat/completions`."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int = Field(1, ge=1, le=1)
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    modalities: list[Literal["text", "image"]] | None = None
    max_images: int = Field(4, ge=0, le=16)
    partial_images: int = Field(0, ge=0, le=16)

    def options(self, num_positions: int, limits: ApiLimits) -> AnswerOptions:
        """The options of the answer.

        Raises:
            UserError: a value is out of its range, or a field is unknown or not supported.
        """
        self.check_fields()
        check_length("the negative prompt", self.negative_prompt or "", limits)
        wanted = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        if wanted is not None and wanted > limits.max_new_tokens:
            raise UserError(f"max_tokens must be at most {limits.max_new_tokens}, got {wanted}")
        given = self.modalities or ["text", "image"]
        if self.best_of > limits.max_candidates:
            raise UserError(f"best_of must be at most {limits.max_candidates}, got {self.best_of}")
        text = None
        if self.temperature is not None or self.top_p is not None:
            temperature = 1.0 if self.temperature is None else self.temperature
            text = SamplingOptions(temperature=temperature, top_p=1.0 if self.top_p is None else self.top_p)
        return AnswerOptions(
            max_new_tokens=wanted,
            max_images=0 if "image" not in given else self.max_images,
            image_first="text" not in given,
            text=text,
            drawing=self.drawing({}),
            preview_every=preview_interval(num_positions, self.partial_images if self.stream else 0),
            best_of=self.best_of,
        )

    def conversation(self, limits: ApiLimits) -> list[dict[str, Any]]:
        """The messages as the processor reads them, with decoded images.

        Raises:
            UserError: a message or an image has another form, is too large, or the last message is not the user's.
        """
        if len(self.messages) > limits.max_messages:
            raise UserError(f"messages: at most {limits.max_messages} are allowed, got {len(self.messages)}")
        found = [_message(number, message, limits) for number, message in enumerate(self.messages)]
        if found[-1]["role"] != "user":
            raise UserError(f"messages: the last one must be the user's, got role {found[-1]['role']!r}")
        parts = [part for message in found for part in message["content"]]
        num_images = sum(part["type"] == "image" for part in parts)
        if num_images > limits.max_images:
            raise UserError(f"messages: at most {limits.max_images} images are allowed, got {num_images}")
        check_length("the conversation", "".join(part.get("text", "") for part in parts), limits)
        return found


def last_text(conversation: Sequence[dict[str, Any]]) -> str:
    """The text of the last message."""
    return " ".join(part["text"] for part in conversation[-1]["content"] if part["type"] == "text")


def preview_interval(num_positions: int, num_previews: int) -> int:
    """Positions between two of `num_previews` previews of an image; 0 for none."""
    return -(-num_positions // (num_previews + 1)) if num_previews else 0


def check_length(what: str, text: str, limits: ApiLimits) -> None:
    """Check the number of characters.

    Raises:
        UserError: there are too many.
    """
    if len(text) > limits.max_chars:
        raise UserError(f"{what} has {len(text)} characters, more than the {limits.max_chars} allowed")


def _message(number: int, message: dict[str, Any], limits: ApiLimits) -> dict[str, Any]:
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "developer", "user", "assistant"):
        raise UserError(f"messages[{number}].role: expected system, user or assistant, got {role!r}")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise UserError(f"messages[{number}].content: expected a text or a list of parts that is not empty")
    parts = [_part(f"messages[{number}].content[{place}]", part, limits) for place, part in enumerate(content)]
    return {"role": "system" if role == "developer" else role, "content": parts}


def _part(where: str, part: Any, limits: ApiLimits) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image_url":
        named = part.get("image_url")
        address = named.get("url") if isinstance(named, dict) else named
        if isinstance(address, str):
            return {"type": "image", "image": open_upload(_content_of(where, address), limits.upload, f"{where}")}
    raise UserError(f"{where}: expected a part of type text or image_url, got {kind!r}")


def _content_of(where: str, address: str) -> bytes:
    """The bytes of a data URL; the server fetches nothing from other addresses."""
    head, separator, encoded = address.partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64") or not separator:
        raise UserError(
            f"{where}.image_url: expected data:image/...;base64,...; this server does not fetch other addresses"
        )
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{where}.image_url: the base64 cannot be decoded ({error})") from error
