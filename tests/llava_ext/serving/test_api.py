"""The API over HTTP, with OpenAI's own client: images, chat, streams, errors, limits, and many clients at once."""

import base64
import http.client
import io
import json
import socket
import threading
import time

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the server needs FastAPI: pip install 'evotok[serve]'")
pytest.importorskip("openai", reason="the tests need OpenAI's client: pip install 'evotok[test]'")

import openai

from llava_ext.model_folder import OpenModel
from llava_ext.serving.api.requests import ApiLimits
from llava_ext.serving.api.server import listen, make_server
from llava_ext.serving.uploads import UploadLimits

TIMEOUT_S = 600  # only ends a test that hangs
LIMITS = ApiLimits(
    UploadLimits(0.1, 90_000), 0.2, 8, 3, 500, max_new_tokens=64, max_candidates=6, max_rows=4, max_waiting=20
)


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def start(model, processor, limits=LIMITS, token=None):
    """Start a server in a thread; returns it, its port and its batches."""
    server = make_server(OpenModel(model, processor, "tiny", "fingerprint"), limits, "127.0.0.1", 0, token)
    listening = listen("127.0.0.1", 0)
    threading.Thread(target=lambda: server.run(sockets=[listening]), daemon=True).start()
    until(lambda: server.started)
    return server, listening.getsockname()[1], server.config.app.app.state.api.batches


@pytest.fixture(scope="module")
def port(tiny_mllm):
    server, port, _ = start(*tiny_mllm)
    yield port
    server.should_exit = True


@pytest.fixture
def client(port):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", timeout=TIMEOUT_S, max_retries=0)


def pixels_of(encoded):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))


def same(encoded, expected):
    """Whether images are equal up to rounding: decoding several together differs in the last digits."""
    return np.abs(pixels_of(encoded).astype(int) - np.asarray(expected)).max() <= 1


def data_url(size=(40, 30), file_format="PNG"):
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, format=file_format)
    return f"data:image/{file_format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def content(text="a ring", *urls):
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def post(port, path, body, headers=()):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    encoded = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, encoded, {"content-type": "application/json", **dict(headers)})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def test_small_packets_are_sent_at_once():
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        connection, _ = listening.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_model_is_listed(client):
    (model,) = client.models.list().data
    assert model.id == "tiny" == client.models.retrieve("tiny").id
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.models.retrieve("gpt")


def test_images_are_those_that_the_model_draws(client, tiny_mllm):
    model, processor = tiny_mllm
    body = {"seed": 5, "guidance_scale": 2.0, "negative_prompt": "a square", "temperature": 0.7}
    drawn = client.images.generate(model="tiny", prompt="two rings", n=3, size="96x96", extra_body=body)
    expected = model.generate_images(
        "two rings", processor, 3, 2.0, negative_prompt="a square", seed=5, temperature=0.7
    )
    assert [one.seed for one in drawn.data] == [5, 6, 7] and drawn.size == "96x96"
    for one, image in zip(drawn.data, expected, strict=True):
        assert same(one.b64_json, image.resize((96, 96), Image.Resampling.NEAREST))
    picture = Image.open(io.BytesIO(base64.b64decode(drawn.data[1].b64_json)))
    picture.load()
    assert picture.text["prompt"] == "two rings" and picture.text["seed"] == "6"
    assert json.loads(picture.text["settings"])["guidance_scale"] == 2.0


def test_an_image_can_be_selected_among_candidates(client, tiny_mllm):
    model, processor = tiny_mllm
    (one,) = client.images.generate(model="tiny", prompt="a cross", size="48x48", extra_body={"best_of": 3}).data
    (expected,) = model.generate_images("a cross", processor, best_of=3)
    assert same(one.b64_json, expected)


def test_a_streamed_image_has_previews(client):
    events = list(client.images.generate(model="tiny", prompt="a ring", stream=True, partial_images=2))
    assert [event.type.rpartition(".")[2] for event in events] == ["partial_image"] * 2 + ["completed"]
    (drawn,) = client.images.generate(model="tiny", prompt="a ring").data
    assert events[-1].b64_json == drawn.b64_json != events[0].b64_json
    assert pixels_of(drawn.b64_json).shape == (288, 288, 3)


def test_a_text_answer_is_a_string_with_its_usage(client, tiny_mllm):
    model, processor = tiny_mllm
    asked = content("What is this?", data_url())
    answer = client.chat.completions.create(model="tiny", messages=asked, max_tokens=6, modalities=["text"])
    picture = Image.open(io.BytesIO(base64.b64decode(data_url().partition(",")[2])))
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True
    )
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    (choice,) = answer.choices
    assert choice.message.content == processor.tokenizer.decode(ids, skip_special_tokens=True)
    assert choice.finish_reason == "length" and answer.usage.completion_tokens == 6
    assert answer.usage.prompt_tokens == inputs["input_ids"].shape[1] == answer.usage.total_tokens - 6


def test_an_image_answer_is_a_part_and_can_be_sent_back(client):
    body = {"seed": 2}
    answer = client.chat.completions.create(model="tiny", messages=content(), modalities=["image"], extra_body=body)
    (part,) = answer.choices[0].message.content
    (drawn,) = client.images.generate(model="tiny", prompt="a ring", extra_body=body).data
    encoded = part["image_url"]["url"].partition(",")[2]
    assert same(encoded, pixels_of(drawn.b64_json)) and answer.choices[0].finish_reason == "stop"
    messages = [*content(), {"role": "assistant", "content": [part]}, *content("What color is it?")]
    again = client.chat.completions.create(model="tiny", messages=messages, max_tokens=3, modalities=["text"])
    assert isinstance(again.choices[0].message.content, str)


def test_a_streamed_chat_has_the_same_content(client):
    def texts(chunks):
        return [one.choices[0].delta.content for one in chunks if one.choices]

    options = {"model": "tiny", "messages": content("What?"), "max_tokens": 5, "modalities": ["text"]}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(filter(None, texts(chunks))) == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 5 and chunks[-2].choices[0].finish_reason == "length"
    image = {"model": "tiny", "messages": content(), "modalities": ["image"]}
    chunks = list(client.chat.completions.create(**image, stream=True, extra_body={"partial_images": 2}))
    previews = [one.choices[0].delta.preview for one in chunks if hasattr(one.choices[0].delta, "preview")]
    assert [preview["positions"] for preview in previews] == [3, 6]
    (part,) = next(found for found in texts(chunks) if isinstance(found, list))
    assert part == client.chat.completions.create(**image).choices[0].message.content[0]


WRONG_IMAGES = [
    ({"prompt": "  "}, "say what to draw"),
    ({"prompt": "x" * 501}, "the prompt has 501 characters, more than the 500 allowed"),
    ({"prompt": "a", "size": "100x100"}, "size: expected auto or a multiple of 48x48"),
    ({"prompt": "a", "n": 4, "best_of": 2}, "n x best_of must be at most 6"),
    ({"prompt": "a", "n": 0}, "n: Input should be greater than or equal to 1"),
    ({"prompt": "a", "seed": -1}, "seed: Input should be greater than or equal to 0"),
    ({"prompt": "a", "response_format": "url"}, "response_format: Input should be 'b64_json'"),
    ({"prompt": "a", "stream": True, "n": 2}, "stream: expected n = 1"),
    ({"prompt": "a", "temperature": -1}, "temperature"),
    ({"prompt": "a", "guidance_scale": [1.0, 2.0]}, "guidance_scale"),
    ({"prompt": "a", "guidence_scale": 2.0}, "unknown field 'guidence_scale'; did you mean 'guidance_scale'?"),
    ({"prompt": "a", "background": "transparent"}, "background is not supported"),
    ({"prompt": "a", "guidance_schedule": "wild"}, "guidance_schedule: expected one of constant"),
    ({}, "prompt: Field required"),
    ([], "body"),
]


@pytest.mark.parametrize(("body", "message"), WRONG_IMAGES, ids=range(len(WRONG_IMAGES)))
def test_wrong_image_requests_are_explained(port, body, message):
    status, answer = post(port, "/v1/images/generations", body)
    assert status == 400 and message in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


WRONG_CHATS = [
    ({"messages": []}, "messages: List should have at least 1 item"),
    ({"messages": content()[:1] * 9}, "messages: at most 8 are allowed, got 9"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role: expected system, user or assistant"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content: expected a text or a list"),
    ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages[0].content[0]: expected a part"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "the last one must be the user's"),
    ({"messages": content("x", *[data_url()] * 4)}, "at most 3 images are allowed, got 4"),
    ({"messages": content("x", "http://example.org/a.png")}, "this server does not fetch other addresses"),
    ({"messages": content("x", "data:image/png;base64,%%%")}, "the base64 cannot be decoded"),
    ({"messages": content("x", "data:image/png;base64,AAAA")}, "image 'messages[0].content[0]'"),
    ({"messages": content("x", data_url((301, 300)))}, "301 x 300 pixels, more than the 90,000 allowed"),
    ({"messages": content("x" * 501)}, "the conversation has 501 characters"),
    ({"messages": content(), "max_tokens": 65}, "max_tokens must be at most 64, got 65"),
    ({"messages": content(), "stop": ["x"]}, "stop is not supported"),
    ({"messages": content(), "tools": [{"type": "function"}]}, "tools is not supported"),
    ({"messages": content(), "temprature": 0.5}, "unknown field 'temprature'; did you mean 'temperature'?"),
    ({"messages": content("ring " * 100), "max_tokens": 64, "max_images": 0, "guidance_scale": 0.5}, "guidance_scale"),
    ({"messages": content(), "best_of": 2}, "best_of=2 needs answers that are one image"),
    ({"messages": content(), "modalities": ["sound"]}, "modalities.0: Input should be 'text' or 'image'"),
]


@pytest.mark.parametrize(("body", "message"), WRONG_CHATS, ids=range(len(WRONG_CHATS)))
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_chat_requests_are_explained(port, body, message, stream):
    status, answer = post(port, "/v1/chat/completions", {**body, "stream": stream})
    assert status == 400 and message in answer["error"]["message"]


def test_requests_that_are_too_large_or_come_from_other_pages_are_rejected(port):
    status, answer = post(port, "/v1/chat/completions", b" " * 250_000)
    assert status == 413 and "larger than" in answer["error"]["message"]
    headers = {"origin": "http://evil.example"}
    status, answer = post(port, "/v1/images/generations", {"prompt": "a"}, headers)
    assert status == 403 and "other origins" in answer["error"]["message"]
    assert post(port, "/v1/images/generations", b"{", {})[0] == 400


def test_a_server_with_a_token_answers_only_with_it(tiny_mllm):
    server, port, _ = start(*tiny_mllm, token="secret")
    address = f"http://127.0.0.1:{port}/v1"
    with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer"):
        openai.OpenAI(base_url=address, api_key="guess", max_retries=0).models.list()
    assert openai.OpenAI(base_url=address, api_key="secret").models.list().data[0].id == "tiny"
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/health")
    assert json.loads(connection.getresponse().read()) == {"status": "ok"}
    server.should_exit = True


def test_sixteen_clients_get_what_each_would_get_alone(client, port):
    def ask(seed):
        (one,) = client.images.generate(model="tiny", prompt=f"{seed} rings", extra_body={"seed": seed}).data
        return one.b64_json

    found = {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: ask(n)})) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(found[n], pixels_of(ask(n))) for n in range(16))
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/metrics")
    metrics = dict(line.split() for line in connection.getresponse().read().decode().splitlines() if line[0] != "#")
    assert float(metrics["evotok_rows_total"]) > float(metrics["evotok_steps_total"])  # they were drawn together
    assert metrics["evotok_rows_active"] == metrics["evotok_requests_waiting"] == "0"


STREAMS = [
    ("/v1/images/generations", {"prompt": "a"}),
    ("/v1/images/generations", {"prompt": "a", "stream": True}),
    ("/v1/chat/completions", {"messages": content(), "max_tokens": 3, "stream": True}),
]


@pytest.mark.parametrize(("path", "body"), STREAMS, ids=["image", "streamed image", "streamed chat"])
def test_requests_beyond_the_queue_get_429(tiny_mllm, path, body):
    server, port, batches = start(*tiny_mllm, limits=ApiLimits(max_rows=1, max_waiting=1))
    with batches.model_lock:
        waiting = threading.Thread(target=post, args=(port, "/v1/images/generations", {"prompt": "a"}))
        waiting.start()
        until(lambda: batches.num_waiting)
        status, answer = post(port, path, body)
    waiting.join()
    assert status == 429 and answer["error"]["type"] == "rate_limit_error"
    server.should_exit = True


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_rows(tiny_mllm, stream):
    server, port, batches = start(*tiny_mllm)
    asked = {"messages": content(), "max_tokens": 60, "modalities": ["text"], "stream": stream}
    with batches.model_lock:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("POST", "/v1/chat/completions", json.dumps(asked), {"content-type": "application/json"})
        until(lambda: batches.num_waiting)
        connection.close()
        time.sleep(1.5)
    until(lambda: not (batches.num_waiting or batches.num_active))
    assert batches.counts.steps == 0
    server.should_exit = True
