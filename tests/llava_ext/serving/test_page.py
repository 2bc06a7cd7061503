"""The web page without a browser: uploads, answers, limits, and errors."""

import io
import json
import socket
import struct
import time
import urllib.error
import urllib.request
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'evotok[demo]'")

import gradio_client
from gradio_client.exceptions import AppError

from evotok_plugin.errors import UserError
from llava_ext.cli import main
from llava_ext.generation import TextDelta
from llava_ext.generation.answers import Answers
from llava_ext.model_folder import OpenModel
from llava_ext.serving import page
from llava_ext.serving.handlers import DemoLimits
from llava_ext.serving.level_view import level_by_level
from llava_ext.serving.page import build_demo, launch_demo
from llava_ext.serving.uploads import UploadLimits, open_upload

TIMEOUT_S = 600  # only ends a test that hangs
LIMITS = DemoLimits(UploadLimits(max_mb=0.2, max_pixels=250_000), max_images=2, max_chars=200_000)
SETTINGS = {"answer": "an image", "tokens": 8, "guidance": 3.0, "schedule": "constant"}
SETTINGS |= {"start": 0.0, "end": 1.0, "rescale": 0.0, "negative": "", "seed": 0}
SETTINGS |= {"candidates": 1, "drawings": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def uploads(tmp_path_factory):
    """The folder in which the page keeps files."""
    folder = tmp_path_factory.mktemp("uploads")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def address(tiny_mllm, uploads):
    demo = build_demo(OpenModel(*tiny_mllm, "tiny", "fingerprint"), LIMITS)
    yield launch_demo(demo, LIMITS, port=free_port(), wait=False)
    demo.close()


@pytest.fixture
def client(address):
    return gradio_client.Client(address, verbose=False)


@pytest.fixture
def ask(client):
    """`ask(text, *files, **settings)` returns the last message of the conversation as the page shows it."""

    def run(text, *files, **settings):
        message = {"text": text, "files": [gradio_client.handle_file(file) for file in files]}
        _, shown = client.predict(message, *(SETTINGS | settings).values(), api_name="/ask")
        return shown[-1]

    return run


def write(folder, name="a.png", size=(60, 40), **options):
    Image.new("RGB", size, "red").save(folder / name, **options)
    return folder / name


# Untrusted uploads -----------------------------------------------------------------------------------------------


def test_metadata_is_stripped_and_the_image_is_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"  # turned by 90 degrees; maker
    path = write(tmp_path, "a.jpg", exif=exif, comment=b"at home")
    picture = open_upload(path, UploadLimits())
    assert picture.size == (40, 60) and not picture.info and not picture.getexif()


def huge_png():
    """A few bytes whose header declares 60000 x 60000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def broken_pictures():
    """Content of broken uploads, with the error message of each, by kind."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
    whole = buffer.getvalue()
    return {
        "empty": (b"", "broken, or none of PNG"),
        "no picture": (b"GIF89a is what it says", "broken"),
        "truncated": (whole[: len(whole) // 2], "cannot be read"),
        "a drawing": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "none of PNG, JPEG"),
        "a bomb": (huge_png(), "pixels allowed"),
    }


@pytest.mark.parametrize("kind", broken_pictures())
def test_broken_images_are_rejected_with_their_name(kind):
    content, message = broken_pictures()[kind]
    with pytest.raises(UserError, match=message):
        open_upload(content, UploadLimits(), name="x.png")


def test_upload_limits_are_enforced(tmp_path):
    path = write(tmp_path, size=(300, 200))
    assert open_upload(path, UploadLimits(max_pixels=60_000)).size == (300, 200)
    with pytest.raises(UserError, match="300 x 200 pixels, more than the 59,999 allowed"):
        open_upload(path, UploadLimits(max_pixels=59_999))
    with pytest.raises(UserError, match="more than the 0.0001 MB allowed"):
        open_upload(path, UploadLimits(max_mb=0.0001))
    with pytest.raises(UserError, match="max_pixels of 1 or more"):
        UploadLimits(max_pixels=0)
    with pytest.raises(UserError, match="max_upload_mb above 0"):
        UploadLimits(max_mb=float("nan"))


@pytest.mark.parametrize("port", [-1, 0, 65536])
def test_ports_that_do_not_exist_are_rejected(port):
    with pytest.raises(UserError, match=f"--port must be from 1 to 65535, got {port}"):
        launch_demo(None, port=port)


def test_ctrl_c_closes_the_page_without_a_line_of_gradio(tiny_mllm, uploads, monkeypatch, capsys):
    def interrupt(seconds):
        raise KeyboardInterrupt

    demo = build_demo(OpenModel(*tiny_mllm, "tiny", "fingerprint"), LIMITS)
    port = free_port()
    monkeypatch.setattr(page, "time", SimpleNamespace(sleep=interrupt))
    with pytest.raises(KeyboardInterrupt):
        launch_demo(demo, LIMITS, port=port)
    assert capsys.readouterr().out == f"http://127.0.0.1:{port}/ (press Ctrl-C to stop)\n"
    with socket.create_server(("127.0.0.1", port)):  # the port is free again
        assert not demo.is_running


# Evolution -------------------------------------------------------------------------------------------------------


def test_an_image_evolves_level_by_level(tiny_mllm):
    model, processor = tiny_mllm
    tower, images = model.vision_tower, processor.image_processor
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8))
    levels = level_by_level(tower, images, image)
    captions = [caption for _, caption in levels.pictures]
    assert captions[0] == "original" and captions[1].startswith("1 level: ") and len(captions) == 1 + 8
    codes = tower.encode(images(image).pixel_values).codes
    for depth in (1, 8):
        rebuilt = images.to_pil(tower.decode_pixels(codes[..., :depth]))[0]
        shown = levels.pictures[depth][0]
        assert shown.size == (192, 192) and np.array_equal(np.asarray(shown)[::4, ::4], np.asarray(rebuilt))
        error = np.asarray(image, float) - np.asarray(rebuilt, float)
        assert captions[depth].endswith(f"{10 * np.log10(255**2 / np.square(error).mean()):.1f} dB")


# The page --------------------------------------------------------------------------------------------------------


def test_a_drawn_image_records_its_provenance(ask):
    (part,) = ask("a photo of a ring", seed=7, top_k=5)["content"]
    image = Image.open(part["file"])
    assert image.size == (288, 288) and (image.text["prompt"], image.text["seed"]) == ("a photo of a ring", "7")
    assert image.text["scale"] == "6"
    assert json.loads(image.text["settings"])["top_k"] == 5 and image.text["model"] == "tiny"


def test_the_best_candidate_is_shown_and_recorded(ask):
    (part,) = ask("a photo of a ring", seed=7, candidates=3)["content"]
    settings = json.loads(Image.open(part["file"]).text["settings"])
    assert (settings["best_of"], settings["judge"]) == (3, "reading") and settings["candidate"] in (0, 1, 2)
    answer = ask("What is it?", candidates=3, answer="text or images, as the model sees fit")
    assert answer["role"] == "assistant"


def test_it_answers_about_an_upload(ask, tmp_path):
    answer = ask("What is it?", write(tmp_path), answer="text or images, as the model sees fit")
    assert answer["role"] == "assistant" and answer["content"]


def test_previews_are_shown_while_an_image_is_drawn(client):
    job = client.submit({"text": "a ring", "files": []}, *SETTINGS.values(), api_name="/ask")
    job.result()
    last = [shown[-1]["content"][-1] for _, shown in job.outputs()]
    files = [part["file"] for part in last if part["type"] == "file"]
    assert last[0].get("text") == "drawing ..." and len(set(files)) >= 3


def test_the_conversation_continues_until_it_is_reset(ask, client):
    for count in (2, 4):
        ask("a ring")
        assert len(client.predict({"text": "x", "files": []}, *SETTINGS.values(), api_name="/ask")[1]) == 2 * count
    assert client.predict(api_name="/reset") == []
    assert len(client.predict({"text": "x", "files": []}, *SETTINGS.values(), api_name="/ask")[1]) == 2


def test_the_original_upload_is_deleted(ask, client, uploads, tmp_path):
    secret = b"where I live"
    path = write(tmp_path, "secret.jpg", comment=secret)
    ask("What is it?", path)
    client.predict(gradio_client.handle_file(path), api_name="/evolve")
    kept = [file for file in uploads.rglob("*") if file.is_file()]
    assert kept and not [file for file in kept if secret in file.read_bytes()]


def test_stopping_keeps_the_answer_so_far(client, monkeypatch):
    def slowly(self):  # until the answer is stopped
        time.sleep(0.02)
        yield from [TextDelta(row.number, " word") for row in self._rows if not row.done]

    monkeypatch.setattr(Answers, "step", slowly)
    job = client.submit({"text": "count", "files": []}, *SETTINGS.values(), api_name="/ask")
    while not job.outputs():
        time.sleep(0.01)
    client.predict(api_name="/stop")
    text = job.result(timeout=TIMEOUT_S)[1][-1]["content"][0]["text"]
    assert text.startswith(" word")


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("  ", {}, "the message is empty"),
        ("ring " * 39_000, {}, "shorten the prompt or the conversation"),
        ("x" * 200_001, {}, "200001 characters, more than the 200000 allowed"),
        ("a ring", {"guidance": 0.5}, "guidance_scale must be at least 1 and at most 1000, got 0.5"),
        ("a ring", {"guidance": None}, "a setting is empty"),
        ("a ring", {"top_k": -1}, "top_k"),
        ("a ring", {"candidates": 0}, "less than minimum value 1"),
        ("a ring", {"seed": -5}, "the seed must be between 0"),
        ("a ring", {"answer": "music"}, "music"),
        ("a ring", {"schedule": "quadratic"}, "quadratic"),
        ("a ring", {"start": 0.6, "end": 0.4}, "guidance_interval: expected two fractions"),
    ],
)
def test_bad_messages_are_reported_and_the_page_keeps_working(ask, text, settings, message):
    with pytest.raises(AppError) as refused:
        ask(text, **settings)
    assert message in str(refused.value)
    assert ask("a ring")["role"] == "assistant"


def test_text_in_errors_is_escaped_because_the_page_renders_html(ask, monkeypatch):
    def refuse(*arguments):
        raise UserError("the text holds <b>")

    monkeypatch.setattr("llava_ext.serving.session.ChatSession.ask", refuse)
    with pytest.raises(AppError, match="the text holds &lt;b&gt;"):
        ask("a ring")


def test_other_errors_are_logged_and_shown_as_internal_error(ask, monkeypatch, caplog):
    def fail(*arguments):
        raise ValueError("a secret detail")

    monkeypatch.setattr("llava_ext.serving.session.ChatSession.ask", fail)
    with pytest.raises(AppError, match="internal error") as shown:
        ask("a ring")
    assert "secret" not in str(shown.value)
    assert "ValueError: a secret detail" in caplog.text and "Traceback" in caplog.text


@pytest.mark.parametrize("kind", broken_pictures())
def test_corrupt_uploads_are_reported_and_the_page_keeps_working(ask, client, tmp_path, kind):
    content, message = broken_pictures()[kind]
    path = tmp_path / "upload.png"
    path.write_bytes(content)
    for refused in (
        lambda: ask("What is it?", path),
        lambda: client.predict(gradio_client.handle_file(path), api_name="/evolve"),
    ):
        with pytest.raises(AppError, match=message):
            refused()
    assert ask("What is it?", write(tmp_path, "good.png"))["role"] == "assistant"


def test_uploads_beyond_the_limits_are_rejected(ask, client, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "heavy.png")
    with pytest.raises(Exception, match="size"):
        ask("What is it?", tmp_path / "heavy.png")
    with pytest.raises(AppError, match="600 x 500 pixels, more than the 250,000 allowed"):
        ask("What is it?", write(tmp_path, size=(600, 500)))
    with pytest.raises(AppError, match="may have 2 images, got 3"):
        ask("What is it?", *[write(tmp_path, f"{number}.png") for number in range(3)])
    levels, *_ = client.predict(gradio_client.handle_file(write(tmp_path)), api_name="/evolve")[1:]
    assert len(levels) == 1 + 8


def post(address, path, body):
    request = urllib.request.Request(address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=TIMEOUT_S)
    return refused.value.code


@pytest.mark.parametrize(
    "file", [{"path": "https://example.com/a.png"}, {"path": "a", "url": "data:image/png;base64,x"}]
)
def test_files_by_url_are_rejected(address, file):
    body = {"data": [{**file, "meta": {"_type": "gradio.FileData"}}]}
    assert post(address, "gradio_api/call/evolve", body) == 400


@pytest.mark.parametrize("meta", [{}, {"meta": {"_type": "gradio.FileData"}}, {"meta": {"_type": "other"}}])
def test_a_file_that_was_not_uploaded_is_neither_read_nor_deleted(address, tmp_path, meta):
    path = write(tmp_path)
    body = {"data": [{"path": str(path), **meta}]}
    request = urllib.request.Request(
        address + "gradio_api/call/evolve", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            event = json.load(answer)["event_id"]
        with urllib.request.urlopen(f"{address}gradio_api/call/evolve/{event}", timeout=TIMEOUT_S) as stream:
            assert stream.read().startswith(b"event: error")
    except urllib.error.HTTPError as refused:
        assert refused.code == 400
    assert path.is_file()


def test_a_drawn_image_that_is_uploaded_again_is_still_shown(ask, client, tmp_path):
    """gradio names files by their content; deleting the upload must not delete the file that the conversation shows."""
    (part,) = ask("a photo of a ring")["content"]
    shown = Image.open(part["file"])
    copy = tmp_path / "image.png"
    copy.write_bytes(open(part["file"], "rb").read())
    ask("What is it?", copy, answer="text or images, as the model sees fit")
    _, messages = client.predict({"text": "again", "files": []}, *SETTINGS.values(), api_name="/ask")
    first = next(p for message in messages for p in message["content"] if p["type"] == "file")
    assert Image.open(first["file"]).tobytes() == shown.tobytes()


def test_large_requests_and_local_files_are_rejected(address):
    assert post(address, "gradio_api/call/evolve", {"data": ["x" * 2**19]}) == 413
    for secret in ("/etc/passwd", __file__):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}gradio_api/file={secret}", timeout=TIMEOUT_S)
        assert refused.value.code in (403, 404)


def test_the_page_loads_nothing_from_other_servers_and_checks_the_host_name(address):
    with urllib.request.urlopen(address, timeout=TIMEOUT_S) as page:
        assert "default-src 'self'" in page.headers["Content-Security-Policy"]
        content = page.read().decode()
        assert "fonts.googleapis.com" not in content and "image-rendering: pixelated" in content
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(address, headers={"Host": "evil.example"}), timeout=TIMEOUT_S)
    assert refused.value.code == 400


# The command -----------------------------------------------------------------------------------------------------


def test_a_port_in_use_is_reported(tiny_mllm, address, tmp_path, capsys):
    for part in tiny_mllm:
        part.save_pretrained(tmp_path)
    port = address.rstrip("/").rpartition(":")[2]
    assert main(["demo", "--model", str(tmp_path), "--port", port]) == 2
    assert "choose another --port" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_pixels", "0"], "max_pixels of 1 or more"),
        (["--teacher", "absent"], "absent"),
        (["--host", "::1"], "expected a name or an IPv4 address"),
    ],
)
def test_bad_flags_are_reported_in_one_line(tiny_mllm, tmp_path, flags, message, capsys):
    for part in tiny_mllm:
        part.save_pretrained(tmp_path)
    assert main(["demo", "--model", str(tmp_path), *flags]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_sharing_through_another_server_is_not_offered(capsys):
    assert main(["demo", "--share"]) == 2
    assert "unrecognized arguments: --share" in capsys.readouterr().err
