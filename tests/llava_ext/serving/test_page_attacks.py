"""The page under attack: foreign web sites, full disks, interrupted uploads, slow clients, many sessions."""

import http.client
import json
import socket
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'evotok[demo]'")

import gradio_client

from evotok_plugin.errors import UserError
from llava_ext.model_folder import OpenModel
from llava_ext.serving import page_files, slow_clients
from llava_ext.serving.answer_batches import Turns
from llava_ext.serving.handlers import DemoLimits
from llava_ext.serving.page import build_demo, launch_demo
from llava_ext.serving.page_files import PageFiles
from llava_ext.serving.request_filter import BodyLimits, RequestFilter
from llava_ext.serving.uploads import UploadLimits

TIMEOUT_S = 600  # only ends a test that hangs
LIMITS = DemoLimits(UploadLimits(max_mb=0.1), max_total_mb=0.5, max_sessions=8)
SETTINGS = ["an image", 8, 1.0, "constant", 0.0, 1.0, 0.0, "", 0, 1, 1, 1.0, 0, 1.0, 0.0]
UPLOAD = "/gradio_api/upload"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        patch.setattr(slow_clients, "REQUEST_S", 0.5)
        yield folder


@pytest.fixture(scope="module")
def demo(tiny_mllm, files):
    demo = build_demo(OpenModel(*tiny_mllm, "tiny", "fingerprint"), LIMITS)
    demo.address = launch_demo(demo, LIMITS, port=free_port(), wait=False)
    yield demo
    demo.close()


@pytest.fixture(scope="module")
def address(demo):
    return demo.address


def multipart(content, name="files", end="\r\n--x--\r\n"):
    head = f'--x\r\nContent-Disposition: form-data; name="{name}"; filename="a.png"\r\n\r\n'
    return head.encode() + content + end.encode()


def post(address, path, body, **headers):
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=TIMEOUT_S)
    try:
        connection.request("POST", path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        answer.read()
        return answer.status
    finally:
        connection.close()


def upload(address, body, **headers):
    return post(address, UPLOAD, body, Content_Type="multipart/form-data; boundary=x", **headers)


def kept(files):
    return [path for path in files.rglob("*") if path.is_file()]


@pytest.fixture(autouse=True)
def no_files(files):
    yield
    for path in kept(files):
        path.unlink()


# Foreign pages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "http://["},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"Sec_Fetch_Site": "same-origin", "Origin": "http://evil.example"},
    ],
)
def test_requests_of_foreign_pages_are_rejected(address, files, headers):
    assert upload(address, multipart(b"x"), **headers) == 403 and not kept(files)
    body = json.dumps({"data": [], "session_hash": "a"})
    assert post(address, "/gradio_api/call/stop", body, Content_Type="application/json", **headers) == 403


@pytest.mark.parametrize("headers", [{}, {"Sec_Fetch_Site": "none"}, {"Sec_Fetch_Site": "same-origin", "Origin": ""}])
def test_requests_of_the_page_and_of_programs_are_accepted(address, headers):
    if "Origin" in headers:
        headers = {**headers, "Origin": address.rstrip("/")}
    assert upload(address, multipart(b"x"), **headers) == 200


@pytest.mark.parametrize("host", ["", " "])
def test_an_empty_host_is_rejected(host):
    with pytest.raises(UserError, match="--host: expected a name or an IPv4 address"):
        launch_demo(None, host=host)


# The disk --------------------------------------------------------------------------------------------------------


def test_uploads_have_a_total_quota(address, files):
    statuses = [upload(address, multipart(bytes([number]) * 90_000)) for number in range(10)]
    assert statuses[:4] == [200] * 4 and statuses[-1] == 507
    assert sum(path.stat().st_size for path in kept(files)) <= 2**19


def test_old_files_make_room_and_recent_ones_do_not(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(bytes(100))
    limited = PageFiles(quota=350)
    limited.make_room(50)
    with pytest.raises(UserError, match="no room"):
        limited.make_room(100)
    later = time.time() + 3600
    monkeypatch.setattr(page_files.time, "time", lambda: later)
    limited.make_room(100)
    assert len(kept(tmp_path)) == 2


def test_interrupted_and_malformed_uploads_leave_no_file(address, files):
    location = urlsplit(address)
    for content in (multipart(bytes(50_000), end=""), multipart(b"")[:30]):
        head = f"POST {UPLOAD} HTTP/1.1\r\nHost: {location.netloc}\r\nContent-Length: 90000\r\n"
        head += "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        with socket.create_connection((location.hostname, location.port)) as connection:
            connection.sendall(head.encode() + content)
            time.sleep(0.1)
        upload(address, content)  # without its end
    assert upload(address, multipart(b"x", name="other")) == 200
    assert upload(address, multipart(bytes(150_000))) == 413
    time.sleep(0.2)
    assert not kept(files)


def test_an_upload_that_is_too_large_is_rejected_before_it_is_read(address):
    assert upload(address, b"", Content_Length=str(2**30)) == 413


# State and time --------------------------------------------------------------------------------------------------


def test_stops_of_unknown_sessions_leave_no_state(demo, address):
    for number in range(300):
        body = json.dumps({"data": [], "session_hash": f"session{number}"})
        assert post(address, "/gradio_api/call/stop", body, Content_Type="application/json") == 200
    assert len(demo.state_holder.session_data) <= 8
    assert len(demo._queue.pending_event_ids_session) <= 201
    body = json.dumps({"data": [], "session_hash": "x" * 1000})
    assert post(address, "/gradio_api/call/stop", body, Content_Type="application/json") == 400
    assert post(address, "/gradio_api/upload?upload_id=" + "x" * 5000, b"") == 414


def test_connections_that_send_no_complete_request_are_closed(address):
    location = urlsplit(address)
    for start in (b"", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: " + location.netloc.encode() + b"\r\n\r\nGET "):
        with socket.create_connection((location.hostname, location.port), timeout=60) as connection:
            connection.sendall(start)
            while connection.recv(2**16):  # until it is closed
                pass


def slow_filter(limits):
    async def app(scope, receive, send):
        raise AssertionError("the request is not complete")

    return RequestFilter(app, PageFiles(2**20), limits)


@pytest.mark.parametrize("path", ["/gradio_api/upload", "/gradio_api/call/stop"])
@pytest.mark.parametrize("limits", [BodyLimits(2**20, idle_s=0.05), BodyLimits(2**20, grace_s=0.1, bytes_per_s=2**20)])
def test_bodies_that_arrive_too_slowly_are_rejected(path, limits):
    import asyncio

    sent = []

    async def receive():
        await asyncio.sleep(0.03 if limits.idle_s > 1 else 60)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": []}
    asyncio.run(asyncio.wait_for(slow_filter(limits)(scope, receive, send), TIMEOUT_S))
    assert sent[0]["status"] == 408


# Load ------------------------------------------------------------------------------------------------------------


def test_a_session_has_one_answer_at_a_time_and_no_state_without_one():
    turns, order = Turns(), []

    def take(number):
        with turns.turn("a"):
            order.append(number)
            time.sleep(0.01)
            order.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    turns.wait("a", TIMEOUT_S)
    for thread in threads:
        thread.join()
    assert order[::2] == order[1::2]
    turns.stop("b")
    assert not turns._stops


def test_visitors_at_the_same_time_get_their_own_images(address):
    clients = [gradio_client.Client(address, verbose=False) for _ in range(3)]
    message = {"text": "a ring", "files": []}
    jobs = [
        client.submit(message, *SETTINGS[:8], seed, *SETTINGS[9:], api_name="/ask")
        for seed, client in enumerate(clients)
    ]
    shown = [job.result(timeout=TIMEOUT_S)[1] for job in jobs]
    assert all(len(messages) == 2 for messages in shown)
    images = [Path(messages[-1]["content"][0]["file"]).read_bytes() for messages in shown]
    assert len(set(images)) == 3
