"""Requests that share the batches of one model: joining, leaving, failing and stopping."""

import subprocess
import sys
import threading
import time

import pytest

from evotok_plugin.errors import UserError
from llava_ext.generation import AnswerOptions, DrawingOptions, ImageDrawn, TextDelta
from llava_ext.generation.answers import Answers
from llava_ext.generation.steps import Steps
from llava_ext.serving.answer_batches import AnswerBatches, Busy, FairLock
from llava_ext.serving.session import ChatSession

TIMEOUT_S = 600  # only ends a test that hangs
IMAGE = AnswerOptions(8, image_first=True)


def ask(model, processor, batches, prompt, options, seed):
    """The text of an answer and the codes of its images."""
    events = list(ChatSession().ask(model, processor, prompt, [], options, seed, batches and batches.stream))
    assert all(event.row == 0 for event in events)
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    return text, [event.codes.tolist() for event in events if isinstance(event, ImageDrawn)]


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def conversation(text):
    return [{"role": "user", "content": [{"type": "text", "text": text}]}]


def together(work, arguments):
    """Run `work` with each arguments in a thread of its own; returns the results or errors, in order."""
    found = [None] * len(arguments)

    def run(number):
        try:
            found[number] = work(*arguments[number])
        except UserError as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(arguments))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_changed_settings_of_drawing_apply_to_the_next_answer(tiny_mllm, monkeypatch):
    model, processor = tiny_mllm
    batches = AnswerBatches(model, processor, max_rows=4)
    before = ask(model, processor, batches, "a ring", IMAGE, 3)
    monkeypatch.setattr(model.generation_config, "image_generation", {"temperature": 0.0}, raising=False)
    after = ask(model, processor, batches, "a ring", IMAGE, 3)
    assert after == ask(model, processor, None, "a ring", IMAGE, 3) != before


@pytest.fixture
def sizes(monkeypatch):
    """The number of active rows in every step."""
    step, seen = Answers.step, []

    def counted(self):
        seen.append(self.num_active)
        return step(self)

    monkeypatch.setattr(Answers, "step", counted)
    return seen


def test_the_answers_of_several_seeds_are_one_message_of_a_conversation(tiny_mllm):
    model, processor = tiny_mllm
    batches, session = AnswerBatches(model, processor, 16), ChatSession()
    events = list(session.ask(model, processor, "a ring", [], IMAGE, [7, 3], batches.stream))
    drawn = {event.row: event for event in events if isinstance(event, ImageDrawn)}
    question, answer = session.messages
    assert question["role"] == "user" and answer["content"] == [
        {"type": "image", "image": drawn[row].image} for row in (0, 1)
    ]
    for row, seed in enumerate((7, 3)):
        assert [drawn[row].codes.tolist()] == ask(model, processor, batches, "a ring", IMAGE, seed)[1]


def test_an_answer_may_depend_on_less_than_the_conversation_it_is_added_to(tiny_mllm):
    model, processor = tiny_mllm
    session, alone = ChatSession(), ChatSession()
    list(session.ask(model, processor, "a ring", [], IMAGE, 0))
    question = session.messages[0]
    events = list(session.answer(model, processor, [], question, "a ring", IMAGE, 1))
    assert [message["role"] for message in session.messages] == ["user", "assistant"] * 2
    expected = list(alone.ask(model, processor, "a ring", [], IMAGE, 1))
    codes = [[event.codes.tolist() for event in all_ if isinstance(event, ImageDrawn)] for all_ in (events, expected)]
    assert codes[0] == codes[1]


REQUESTS = [
    ("a ring", IMAGE, 0),
    ("two rings and a cross", IMAGE, 1),
    ("a ring", AnswerOptions(3, image_first=True, drawing=DrawingOptions(3.0, negative_prompt="a square")), 2),
    ("What is a circle?", AnswerOptions(4, 0), 3),
    ("a square", AnswerOptions(2, image_first=True, drawing=DrawingOptions(2.0, temperature=0.5)), 4),
    ("a cross", AnswerOptions(2, image_first=True, best_of=3), 5),
]


def test_answers_do_not_depend_on_the_other_requests(tiny_mllm, sizes):
    model, processor = tiny_mllm
    batches = AnswerBatches(model, processor, max_rows=5)
    found = together(lambda *request: ask(model, processor, batches, *request), REQUESTS * 2)
    assert max(sizes) == 5 and batches.counts.rows == sum(sizes) and batches.counts.steps == len(sizes)
    assert batches.num_active == batches.num_waiting == 0
    assert found == [ask(model, processor, None, *request) for request in REQUESTS] * 2


def test_a_request_joins_while_another_is_drawn_and_leaves_it_undisturbed(tiny_mllm, sizes):
    model, processor = tiny_mllm
    batches = AnswerBatches(model, processor, max_rows=4)
    first = batches.stream(conversation("a ring"), "", AnswerOptions(8, image_first=True, preview_every=3), 0)
    next(event for event in first if getattr(event, "positions", 0) == 3)
    late = ask(model, processor, batches, "a long prompt that has far more words than the first one", IMAGE, 1)
    drawn = [event.codes.tolist() for event in first if isinstance(event, ImageDrawn)]
    assert drawn == ask(model, processor, None, *REQUESTS[0])[1]
    assert late == ask(model, processor, None, "a long prompt that has far more words than the first one", IMAGE, 1)


def test_with_the_flat_head_rows_at_different_levels_of_their_images_are_drawn_together(flat_mllm):
    model, processor = flat_mllm
    batches = AnswerBatches(model, processor, max_rows=4)
    guided = AnswerOptions(8, image_first=True, drawing=DrawingOptions((3.0, 1.0, 2.0, 1.5)), preview_every=3)
    first = batches.stream(conversation("a ring"), "", guided, 0)
    next(event for event in first if getattr(event, "positions", 0) == 3)
    late = ask(model, processor, batches, "two rings and a cross", guided, 1)
    drawn = [event.codes.tolist() for event in first if isinstance(event, ImageDrawn)]
    assert drawn == ask(model, processor, None, "a ring", guided, 0)[1]
    assert late == ask(model, processor, None, "two rings and a cross", guided, 1)


def test_complete_answers_cost_nothing_and_leave_no_cache(tiny_mllm, monkeypatch):
    model, processor = tiny_mllm
    step, sizes = Steps.step, []

    def counted(self, embeddings):
        sizes.append(len(embeddings))
        step(self, embeddings)

    monkeypatch.setattr(Steps, "step", counted)
    batches = AnswerBatches(model, processor, max_rows=4)
    with batches.model_lock:  # so that all join in the same step
        found = []
        asked = [*[("a ring", AnswerOptions(2, 0), 0)] * 3, ("a ring", AnswerOptions(30, 0), 0)]
        threads = [threading.Thread(target=lambda a=a: found.append(ask(model, processor, batches, *a))) for a in asked]
        for thread in threads:
            thread.start()
        until(lambda: batches.num_waiting == 4)
    for thread in threads:
        thread.join()
    until(lambda: not batches._is_working)
    longest = len(sizes)
    assert longest > 5 and sizes[0] == 4 and sizes[5:] == [1] * (longest - 5)
    answers = batches._engine._answers
    assert answers._steps is None and not answers._rows


def test_a_conversation_without_room_fails_alone(tiny_mllm):
    model, processor = tiny_mllm
    batches = AnswerBatches(model, processor, max_rows=4)
    requests = [("a ring", IMAGE, 0), ("ring " * 39_000, IMAGE, 0), ("a cross", IMAGE, 1)]
    first, failed, last = together(lambda *request: ask(model, processor, batches, *request), requests)
    assert "shorten the prompt" in str(failed) and batches.counts.errors == 1
    assert [first, last] == [ask(model, processor, None, *requests[n]) for n in (0, 2)]


def test_an_error_of_the_model_reaches_all_requests_and_the_next_ones_are_answered(tiny_mllm, monkeypatch):
    model, processor = tiny_mllm
    batches = AnswerBatches(model, processor, max_rows=4)

    def fail(self):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(Answers, "step", fail)
        for seed in range(2):
            with pytest.raises(RuntimeError, match="out of memory"):
                ask(model, processor, batches, "a ring", IMAGE, seed)
    assert ask(model, processor, batches, *REQUESTS[0]) == ask(model, processor, None, *REQUESTS[0])


def test_requests_beyond_the_queue_are_rejected(tiny_mllm):
    model, processor = tiny_mllm
    batches = AnswerBatches(model, processor, max_rows=1, max_waiting=1)
    with batches.model_lock:
        threads = [threading.Thread(target=ask, args=(model, processor, batches, "a ring", IMAGE, 0))]
        threads[0].start()
        until(lambda: batches.num_waiting)
        with pytest.raises(Busy, match="1 requests are waiting already; try again later"):
            ask(model, processor, batches, "a cross", IMAGE, 0)
    threads[0].join()
    assert ask(model, processor, batches, "a cross", IMAGE, 0)[1]


def test_a_request_that_is_stopped_while_it_waits_is_not_answered(tiny_mllm, sizes):
    batches = AnswerBatches(*tiny_mllm, max_rows=4)
    with batches.model_lock:
        assert list(batches.stream(conversation("a ring"), "", AnswerOptions(4), 0, is_stopped=lambda: True)) == []
    until(lambda: not batches._is_working)
    assert not sizes


def test_an_answer_that_nobody_reads_is_given_up(tiny_mllm, sizes):
    model, processor = tiny_mllm
    batches = AnswerBatches(model, processor, max_rows=4)
    events = batches.stream(conversation("count"), "", AnswerOptions(500, image_first=True, preview_every=1), 0)
    next(event for event in events if getattr(event, "positions", 0) == 1)
    events.close()
    until(lambda: not batches._is_working)
    assert batches.num_active == 0 and batches.counts.images == 0


def test_the_lock_is_given_in_the_order_of_asking():
    lock, order, threads = FairLock(), [], []

    def take(number):
        for _ in range(3):
            with lock:
                order.append(number)

    with lock:
        for number in range(3):
            threads.append(threading.Thread(target=take, args=(number,)))
            threads[-1].start()
            until(lambda number=number: len(lock._queue) == number + 2)
    for thread in threads:
        thread.join()
    assert order[:3] == [0, 1, 2] and sorted(order) == sorted([0, 1, 2] * 3)


EXIT = """
import sys, time
import llava_ext.serving.answer_batches as module
from types import SimpleNamespace
from llava_ext.generation import AnswerOptions, TextDelta

class Endless:
    def admit(self, rows):
        self.rows = rows

    def step(self):
        time.sleep(0.01)
        yield self.rows[0], TextDelta(0, "x")

batches = module.AnswerBatches(None, None, 1)
batches._engine = Endless()
events = batches.stream([], "", AnswerOptions(4), 0)
next(events)
sys.exit(3)
"""


@pytest.mark.slow  # imports the libraries
def test_an_answer_in_progress_ends_when_python_exits():
    ended = subprocess.run([sys.executable, "-c", EXIT], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert ended.returncode == 3, ended.stderr
