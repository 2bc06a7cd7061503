"""Answers to several visitors: one batch of rows that requests join and leave while it is being generated."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import Any

from evotok_plugin.errors import UserError
from llava_ext.generation import AnswerOptions, Event
from llava_ext.generation.answer_engine import AnswerEngine, AnswerRow
from llava_ext.generation.best_answers import best_answers
from llava_ext.generation.events import CandidateDrawn, Finished, ImageDrawn, TextDelta
from llava_ext.modeling_evotok_llava import EvoTokLlavaForConditionalGeneration
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor

_STOP_INTERVAL_S = 0.2  # within which a stopped request that waits is noticed


class Busy(UserError):
    """Too many requests wait for the model."""


class _Stopped(Exception):
    """The caller has stopped a request."""


class FairLock:
    """A lock whose holders take turns in the order in which they asked.

    With a `threading.Lock`, a thread that releases it and takes it again at once keeps all others out.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()  # one mark per thread that holds the lock, which is first, or waits

    def __enter__(self) -> None:
        mark = object()
        with self._changed:
            self._queue.append(mark)
            try:
                self._changed.wait_for(lambda: self._queue[0] is mark)
            except BaseException:  # interrupted: the others must not wait for this thread
                self._queue.remove(mark)
                self._changed.notify_all()
                raise

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._queue.popleft()
            self._changed.notify_all()


@dataclass(eq=False)
class _Request:
    """Rows of one conversation, one per seed, and the queue of their events; None ends the queue, an exception is
    raised."""

    conversation: list[dict[str, Any]]
    options: AnswerOptions
    seeds: list[int]
    events: SimpleQueue[Event | Exception | None] = field(default_factory=SimpleQueue)
    left: int = 0  # rows that are not finished
    is_cancelled: bool = False


@dataclass
class Counts:
    """Counters since the start.

    Attributes:
        requests: including those that were rejected or failed.
        errors: requests that failed.
        steps: of the language model.
        rows: sum of the active rows of all steps.
        images, texts: finished images, and pieces of text.
    """

    requests: int = 0
    errors: int = 0
    steps: int = 0
    rows: int = 0
    images: int = 0
    texts: int = 0


class AnswerBatches:
    """Generates answers in a thread of its own. A request joins the batch at the next step of the model and leaves it
    when its answer is complete, whatever the others do and whatever their options are (continuous batching).

    An answer depends only on its own conversation, seed and options. A request that fails, for example because its
    conversation is too long, fails alone.

    Args:
        max_rows: rows of the batch; a request takes one per candidate. One that needs more waits until it is alone.
        max_waiting: requests that can wait for rows; None for any number.

    Attributes:
        model_lock: held during every step of the model; other users of the model take it too.
        counts: of everything since the start.
    """

    def __init__(
        self,
        model: EvoTokLlavaForConditionalGeneration,
        processor: EvoTokLlavaProcessor,
        max_rows: int,
        max_waiting: int | None = None,
    ) -> None:
        self.model_lock, self.counts = FairLock(), Counts()
        self._model, self._processor, self._max_rows, self._max_waiting = model, processor, max_rows, max_waiting
        self._lock = threading.Lock()  # protects `counts.requests` and the two attributes below
        self._waiting: list[_Request] = []
        self._is_working = False
        self._engine = AnswerEngine(model, processor)  # this and the following are used by the working thread only
        self._active: dict[AnswerRow, tuple[_Request, int]] = {}  # their requests, and their numbers in these

    @property
    def num_waiting(self) -> int:
        """The number of requests that wait for rows."""
        return len(self._waiting)

    @property
    def num_active(self) -> int:
        """The number of rows that are being generated."""
        return len(self._active)

    def stream(
        self,
        conversation: list[dict[str, Any]],
        prompt: str,
        options: AnswerOptions,
        seed: int | Sequence[int],
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> Generator[Event, None, None]:
        """Yield the events of an answer, whose `row` is 0, or of one answer per seed.

        Args:
            conversation: Hugging Face messages that end with the user's.
            prompt: what an image should show, for `options.best_of`.
            is_stopped: asked regularly; the events end when it is true.

        Raises:
            Busy: too many requests wait.
            UserError: the conversation leaves no room for an answer, or an option does not fit the model.
        """
        with self._lock:
            self.counts.requests += 1

        def run(_: int, seeds: list[int]) -> Iterator[Event]:
            for event in self._stream_rows(_Request(conversation, options, seeds)):
                if event is not None:
                    yield event
                if is_stopped():
                    raise _Stopped

        wanted = [seed] if isinstance(seed, int) else list(seed)
        prompts = [prompt] * len(wanted)
        with suppress(_Stopped):
            yield from best_answers(
                run, self._model, self._processor, wanted, options.best_of, prompts, self.model_lock
            )

    def _stream_rows(self, request: _Request) -> Iterator[Event | None]:
        """Yield the events of a request, and None now and then while there is none."""
        with self._lock:
            if self._max_waiting is not None and len(self._waiting) >= self._max_waiting:
                raise Busy(f"{len(self._waiting)} requests are waiting already; try again later")
            self._waiting.append(request)
            if not self._is_working:
                self._is_working = True
                threading.Thread(target=self._work).start()  # a daemon would crash in PyTorch when Python exits
        try:
            while True:
                try:
                    event = request.events.get(timeout=_STOP_INTERVAL_S)
                except Empty:
                    yield None
                    continue
                if event is None:
                    return
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            request.is_cancelled = True

    # The working thread --------------------------------------------------------------------------------------

    def _work(self) -> None:
        """Step until no request waits and no answer is in progress, or Python exits."""
        while threading.main_thread().is_alive():
            with self.model_lock:
                self._drop_cancelled()
                self._admit_waiting()
                if self._active:
                    self._step()
                    continue
            with self._lock:
                if not self._waiting:
                    self._is_working = False
                    return

    def _drop_cancelled(self) -> None:
        if cancelled := [row for row, (request, _) in self._active.items() if request.is_cancelled]:
            self._engine.drop(cancelled)
            for row in cancelled:
                del self._active[row]

    def _admit_waiting(self) -> None:
        """Move requests from the queue into the batch, in their order, as far as there are rows."""
        with self._lock:
            self._waiting = [request for request in self._waiting if not request.is_cancelled]
            admitted: list[_Request] = []
            taken = len(self._active)
            for request in self._waiting:
                if taken and taken + len(request.seeds) > self._max_rows:
                    break
                admitted.append(request)
                taken += len(request.seeds)
            self._waiting = self._waiting[len(admitted) :]
        if admitted:
            self._admit(admitted)

    def _admit(self, requests: Sequence[_Request]) -> None:
        rows = {
            AnswerRow(request.conversation, request.options, seed): (request, number)
            for request in requests
            for number, seed in enumerate(request.seeds)
        }
        try:
            self._engine.admit(list(rows))
        except Exception as error:
            if len(requests) > 1:
                for request in requests:
                    self._admit([request])
                return
            self._fail(requests[0], error)
            return
        for request in requests:
            request.left = len(request.seeds)
        self._active |= rows

    def _fail(self, request: _Request, error: Exception) -> None:
        """The thread goes on, and the request raises the error."""
        self.counts.errors += 1
        request.events.put(error)

    def _step(self) -> None:
        self.counts.steps, self.counts.rows = self.counts.steps + 1, self.counts.rows + len(self._active)
        try:
            for row, event in self._engine.step():
                self._pass_on(row, event)
        except Exception as error:  # of the model itself: all rows are lost
            for request in dict.fromkeys(request for request, _ in self._active.values()):
                self._fail(request, error)
            self._active = {}

    def _pass_on(self, row: AnswerRow, event: Event) -> None:
        self.counts.images += isinstance(event, ImageDrawn | CandidateDrawn)
        self.counts.texts += isinstance(event, TextDelta)
        request, number = self._active[row]
        request.events.put(replace(event, row=number))
        if isinstance(event, Finished):
            del self._active[row]
            request.left -= 1
            if not request.left:
                request.events.put(None)


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
