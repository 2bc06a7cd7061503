"""The routes of the API and their answers."""

import asyncio
import base64
import io
import json
import logging
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import anyio
import anyio.to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from PIL import Image, PngImagePlugin
from starlette.exceptions import HTTPException

from evotok_plugin.common.pictures import enlarged
from evotok_plugin.common.version import VERSION
from evotok_plugin.errors import UserError
from llava_ext.generation import AnswerOptions, Event, ImageDrawn, ImagePreview, TextDelta
from llava_ext.generation.events import Finished
from llava_ext.model_folder import OpenModel
from llava_ext.serving.answer_batches import AnswerBatches, Busy
from llava_ext.serving.api.guard import error_body
from llava_ext.serving.api.requests import ApiLimits, ChatRequest, ImageRequest, last_text
from llava_ext.serving.image_files import Provenance, file_scale

logger = logging.getLogger(__name__)

_SPARE_THREADS = 8  # beside one for every request that is answered or waits
_ASK_EVERY_S = 0.5  # whether the client is still there
T = TypeVar("T")


@dataclass
class Api:
    """The state behind the routes: one model for all clients."""

    opened: OpenModel
    limits: ApiLimits
    batches: AnswerBatches
    threads: anyio.CapacityLimiter  # for every request that is answered or waits, so that all of them reach the queue
    started: float

    @property
    def side(self) -> int:
        """Width and height of the images that the model draws."""
        return self.opened.model.config.vision_config.image_size

    @property
    def num_positions(self) -> int:
        return self.opened.model.config.vision_config.num_positions

    def png(self, image: Image.Image, scale: int, provenance: Provenance | None = None) -> str:
        """An enlarged image as base64 of a PNG file, whose text chunks say how it was drawn."""
        info = PngImagePlugin.PngInfo()
        for name, text in ({} if provenance is None else provenance.as_png_text()).items():
            info.add_itxt(name, text)
        file = io.BytesIO()
        enlarged(image, scale).save(file, format="PNG", pnginfo=info)
        return base64.b64encode(file.getvalue()).decode()

    def provenance(self, prompt: str, seed: int, options: AnswerOptions, scale: int) -> Provenance:
        settings = options.drawing.for_model(self.opened.model).settings()
        if options.best_of > 1:
            settings = {**settings, "best_of": options.best_of}
        return Provenance(prompt, seed, self.opened.name, settings, self.opened.fingerprint, scale)


# Images ------------------------------------------------------------------------------------------------------------


def draw(api: Api, request: ImageRequest, is_stopped: Callable[[], bool]) -> dict[str, Any]:
    """The body of the answer to an image request."""
    options, scale = request.options(api.num_positions, api.limits), request.scale(api.side, file_scale(api.side))
    seeds = [(request.seed + number) % 2**32 for number in range(request.n)]
    pictures: dict[int, Image.Image] = {}
    for event in api.batches.stream(_prompt(request), request.prompt, options, seeds, is_stopped):
        if isinstance(event, ImageDrawn):
            pictures[event.row] = event.image
    return {"created": int(time.time()), "output_format": "png", "size": f"{api.side * scale}x{api.side * scale}",
            "data": [
                {"b64_json": api.png(pictures[row], scale, api.provenance(request.prompt, seed, options, scale)),
                 "seed": seed}
                for row, seed in enumerate(seeds) if row in pictures
            ]}  # fmt: skip


def draw_events(api: Api, request: ImageRequest, is_stopped: Callable[[], bool]) -> Generator[str, None, None]:
    """The events of a streamed image: previews, then the image."""
    options, scale = request.options(api.num_positions, api.limits), request.scale(api.side, file_scale(api.side))
    common = {"created_at": int(time.time()), "output_format": "png", "size": f"{api.side * scale}x{api.side * scale}"}
    index = 0
    with closing(api.batches.stream(_prompt(request), request.prompt, options, request.seed, is_stopped)) as events:
        for event in events:
            if isinstance(event, ImagePreview):
                body = {"b64_json": api.png(event.image, scale), "partial_image_index": index}
                yield _event({"type": "image_generation.partial_image", **body, **common})
                index += 1
            elif isinstance(event, ImageDrawn):
                provenance = api.provenance(request.prompt, request.seed, options, scale)
                body = {"b64_json": api.png(event.image, scale, provenance), "seed": request.seed}
                yield _event({"type": "image_generation.completed", **body, **common})


def _prompt(request: ImageRequest) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": request.prompt}]}]


# Chat --------------------------------------------------------------------------------------------------------------


class _Chat:
    """An answer to a conversation."""

    def __init__(self, api: Api, request: ChatRequest) -> None:
        self.api, self.request = api, request
        self.options = request.options(api.num_positions, api.limits)
        self.conversation = request.conversation(api.limits)
        self.prompt, self.scale = last_text(self.conversation), file_scale(api.side)
        if self.options.best_of > 1 and not self.prompt.strip():
            raise UserError("best_of needs a text in the last message, which candidates are compared with")
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": api.opened.name}
        self.num_prompt_tokens, self.num_tokens, self.ends_early = 0, 0, False

    def events(self, is_stopped: Callable[[], bool]) -> Generator[Event, None, None]:
        events = self.api.batches.stream(self.conversation, self.prompt, self.options, self.request.seed, is_stopped)
        with closing(events):
            for event in events:
                if isinstance(event, Finished):
                    self._count(event)
                yield event

    def _count(self, event: Finished) -> None:
        model = self.api.opened.model
        ends = model.generation_config.eos_token_id
        ids = event.ids.tolist()
        self.num_prompt_tokens, self.num_tokens = event.num_prompt_ids, len(ids)
        ended = bool(ids) and ids[-1] in (ends if isinstance(ends, list) else [ends])
        self.ends_early = not ended and not self.options.image_first

    @property
    def finish_reason(self) -> str:
        return "length" if self.ends_early else "stop"

    @property
    def usage(self) -> dict[str, int]:
        total = self.num_prompt_tokens + self.num_tokens
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_tokens,
            "total_tokens": total,
        }

    def image_part(self, event: ImageDrawn) -> dict[str, Any]:
        provenance = self.api.provenance(self.prompt, self.request.seed + event.index, self.options, self.scale)
        return _image_part(self.api.png(event.image, self.scale, provenance))


def answer(api: Api, request: ChatRequest, is_stopped: Callable[[], bool]) -> dict[str, Any]:
    """The body of the answer to a conversation: its content is a text, or a list of parts if it contains an image."""
    chat = _Chat(api, request)
    parts: list[dict[str, Any]] = []
    for event in chat.events(is_stopped):
        if isinstance(event, ImageDrawn):
            parts.append(chat.image_part(event))
        elif isinstance(event, TextDelta) and parts and parts[-1]["type"] == "text":
            parts[-1]["text"] += event.text
        elif isinstance(event, TextDelta):
            parts.append({"type": "text", "text": event.text})
    only_text = all(part["type"] == "text" for part in parts)
    content: Any = "".join(part["text"] for part in parts) if only_text else parts
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": chat.finish_reason}
    return {**chat.head, "object": "chat.completion", "choices": [choice], "usage": chat.usage}


def answer_chunks(api: Api, request: ChatRequest, is_stopped: Callable[[], bool]) -> Generator[str, None, None]:
    """The chunks of a streamed answer: texts, and lists of one part for images and previews."""
    chat = _Chat(api, request)

    def chunk(delta: dict[str, Any], reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return _event({**chat.head, "object": "chat.completion.chunk", "choices": [choice], **more})

    with closing(chat.events(is_stopped)) as events:
        first = next(events, None)  # before any chunk, so that errors have a status of their own
        yield chunk({"role": "assistant", "content": ""})
        for event in chain([first] if first else [], events):
            if isinstance(event, TextDelta):
                yield chunk({"content": event.text})
            elif isinstance(event, ImagePreview):
                place = {"index": event.index, "positions": event.positions, "num_positions": event.num_positions}
                yield chunk({"preview": {**place, **_image_part(api.png(event.image, chat.scale))}})
            elif isinstance(event, ImageDrawn):
                yield chunk({"content": [chat.image_part(event)]})
    yield chunk({}, chat.finish_reason)
    if (request.stream_options or {}).get("include_usage"):
        yield _event({**chat.head, "object": "chat.completion.chunk", "choices": [], "usage": chat.usage})
    yield "data: [DONE]\n\n"


def _image_part(encoded: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


# Routes ------------------------------------------------------------------------------------------------------------


def build_app(opened: OpenModel, limits: ApiLimits) -> FastAPI:
    """The application, without `ApiGuard`."""
    batches = AnswerBatches(opened.model, opened.processor, limits.max_rows, limits.max_waiting)
    threads = anyio.CapacityLimiter(limits.max_rows + limits.max_waiting + _SPARE_THREADS)
    api = Api(opened, limits, batches, threads, time.time())
    app = FastAPI(title="EvoTok", version=VERSION, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.api = api
    _add_errors(app)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(_metrics(api), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(api)]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        _check_model(api, name)
        return _model(api)

    @app.post("/v1/images/generations")
    async def images(body: ImageRequest, request: Request) -> Any:
        _check_model(api, body.model)
        if body.stream:
            return await _streamed(api, request, lambda stopped: draw_events(api, body, stopped))
        return await _while_connected(api, request, lambda stopped: draw(api, body, stopped), threading.Event())

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Any:
        _check_model(api, body.model)
        if body.stream:
            return await _streamed(api, request, lambda stopped: answer_chunks(api, body, stopped))
        return await _while_connected(api, request, lambda stopped: answer(api, body, stopped), threading.Event())

    return app


def _model(api: Api) -> dict[str, Any]:
    return {"id": api.opened.name, "object": "model", "created": int(api.started), "owned_by": "evotok"}


def _check_model(api: Api, name: str | None) -> None:
    if name not in (None, "", "default", api.opened.name):
        raise HTTPException(404, f"the model {name!r} does not exist; this server has {api.opened.name!r}")


async def _while_connected(
    api: Api, request: Request, work: Callable[[Callable[[], bool]], T], stop: threading.Event
) -> T:
    """Work in a thread. The event is set when the client has gone, and the work should then end."""
    task = asyncio.ensure_future(anyio.to_thread.run_sync(work, stop.is_set, limiter=api.threads))
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=_ASK_EVERY_S)
            if not task.done() and await request.is_disconnected():
                stop.set()
        return task.result()
    except asyncio.CancelledError:
        stop.set()
        raise


async def _streamed(
    api: Api, request: Request, make: Callable[[Callable[[], bool]], Generator[str, None, None]]
) -> StreamingResponse:
    """A response of server-sent events; an error before the first event is an ordinary response."""
    end, stop = object(), threading.Event()
    pieces = make(stop.is_set)
    first = await _while_connected(api, request, lambda _: next(pieces, end), stop)

    async def rest() -> AsyncIterator[str]:
        piece: Any = first
        try:
            while piece is not end:
                yield piece
                piece = await anyio.to_thread.run_sync(next, pieces, end, limiter=api.threads)
        except UserError as error:
            yield _event(error_body(400, str(error)))
        except Exception:
            logger.exception("a streamed answer failed")
            yield _event(error_body(500, "internal error"))
        finally:
            stop.set()
            pieces.close()

    return StreamingResponse(rest(), media_type="text/event-stream", headers={"cache-control": "no-store"})


def _add_errors(app: FastAPI) -> None:
    def response(status: int, message: str) -> JSONResponse:
        headers = {"retry-after": "1"} if status == 429 else None
        return JSONResponse(error_body(status, message), status, headers)

    @app.exception_handler(UserError)
    async def wrong(request: Request, error: UserError) -> JSONResponse:
        return response(429 if isinstance(error, Busy) else 400, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        problems = [f"{'.'.join(map(str, one['loc'][1:])) or 'body'}: {one['msg']}" for one in error.errors()]
        return response(400, "; ".join(problems[:5]))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return response(error.status_code, str(error.detail))

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        return response(500, "internal error")  # the server logs its traceback


def _metrics(api: Api) -> str:
    """The state of the server in Prometheus' text format."""
    batches = api.batches
    kinds = {
        "evotok_uptime_seconds": ("gauge", time.time() - api.started),
        "evotok_requests_waiting": ("gauge", batches.num_waiting),
        "evotok_rows_active": ("gauge", batches.num_active),
        **{f"evotok_{name}_total": ("counter", value) for name, value in vars(batches.counts).items()},
    }
    return "".join(f"# TYPE {name} {kind}\n{name} {value}\n" for name, (kind, value) in kinds.items())
