"""Answers to several visitors: requests that wait for the model are generated in one batch."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import Any

from llava_ext.generation import AnswerOptions, Event
from llava_ext.generation.events import Finished
from llava_ext.modeling_evotok_llava import EvoTokLlavaForConditionalGeneration
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor

_STOP_INTERVAL_S = 0.2  # within which a stopped request that waits is noticed


@dataclass(eq=False)
class _Request:
    """A conversation to answer, and the queue of its events; None ends the queue, an exception is raised."""

    conversation: list[dict[str, Any]]
    prompt: str
    options: AnswerOptions
    seed: int
    events: SimpleQueue[Event | Exception | None] = field(default_factory=SimpleQueue)
    is_cancelled: bool = False


class AnswerBatches:
    """Generates answers in a thread of its own: one batch at a time, of the waiting requests with the same options.

    An answer depends only on its own conversation, seed and options. A request that fails, for example because its
    conversation is too long, fails alone.

    Args:
        max_rows: rows of the largest batch; a request takes one per candidate.

    Attributes:
        model_lock: held while the model computes; other users of the model take it too.
    """

    def __init__(
        self, model: EvoTokLlavaForConditionalGeneration, processor: EvoTokLlavaProcessor, max_rows: int
    ) -> None:
        self.model_lock = threading.Lock()
        self._model, self._processor, self._max_rows = model, processor, max_rows
        self._lock = threading.Lock()  # protects the two attributes below
        self._waiting: list[_Request] = []
        self._is_working = False

    def stream(
        self,
        conversation: list[dict[str, Any]],
        prompt: str,
        options: AnswerOptions,
        seed: int,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> Iterator[Event]:
        """Yield the events of an answer, whose `row` is 0.

        Args:
            conversation: Hugging Face messages that end with the user's.
            prompt: what an image should show, for `options.best_of`.
            is_stopped: asked regularly; the events end when it is true.
        """
        request = _Request(conversation, prompt, options, seed)
        with self._lock:
            self._waiting.append(request)
            if not self._is_working:
                self._is_working = True
                threading.Thread(target=self._work).start()  # a daemon would crash in PyTorch when Python exits
        try:
            while not is_stopped():
                try:
                    event = request.events.get(timeout=_STOP_INTERVAL_S)
                except Empty:
                    continue
                if event is None:
                    return
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            request.is_cancelled = True

    def _work(self) -> None:
        """Answer batch after batch, until no request waits or Python exits."""
        while threading.main_thread().is_alive():
            with self.model_lock:
                batch = self._next_batch()
                if not batch:
                    return
                self._answer(batch)

    def _next_batch(self) -> list[_Request]:
        with self._lock:
            waiting = [request for request in self._waiting if not request.is_cancelled]
            limit = max(1, self._max_rows // waiting[0].options.best_of) if waiting else 0
            batch = [request for request in waiting if request.options == waiting[0].options][:limit]
            self._waiting = [request for request in waiting if request not in batch]
            self._is_working = bool(batch)
            return batch

    def _answer(self, batch: Sequence[_Request]) -> None:
        has_started = False
        try:
            with closing(self._events(batch)) as events:
                for event in events:
                    has_started = True
                    request = batch[event.row]
                    request.events.put(replace(event, row=0))
                    if isinstance(event, Finished):
                        request.events.put(None)
                    if all(request.is_cancelled for request in batch) or not threading.main_thread().is_alive():
                        return
        except Exception as error:  # the thread goes on, and the requests raise the error
            if len(batch) > 1 and not has_started:
                for request in batch:
                    self._answer([request])
                return
            for request in batch:
                request.events.put(error)
        for request in batch:
            request.events.put(None)

    def _events(self, batch: Sequence[_Request]) -> Any:
        conversations = [request.conversation for request in batch]
        inputs = self._processor.apply_chat_template(conversations, add_generation_prompt=True, tokenize=True)
        seeds, prompts = [request.seed for request in batch], [request.prompt for request in batch]
        return self._model.stream(inputs, self._processor, batch[0].options, seeds, prompts)


class Turns:
    """The answers in progress, at most one per session; nothing is kept of sessions without one."""

    def __init__(self) -> None:
        self._stops: dict[str | None, threading.Event] = {}
        self._changed = threading.Condition()

    @contextmanager
    def turn(self, session: str | None) -> Iterator[threading.Event]:
        """Wait until the session has no other answer in progress; the event is set when this one should stop."""
        stop = threading.Event()
        with self._changed:
            self._changed.wait_for(lambda: session not in self._stops)
            self._stops[session] = stop
        try:
            yield stop
        finally:
            with self._changed:
                del self._stops[session]
                self._changed.notify_all()

    def stop(self, session: str | None) -> None:
        """Stop the answer in progress of a session, if there is one."""
        with self._changed:
            if session in self._stops:
                self._stops[session].set()

    def wait(self, session: str | None, timeout_s: float) -> None:
        """Wait until the session has no answer in progress."""
        with self._changed:
            self._changed.wait_for(lambda: session not in self._stops, timeout_s)
