"""The same file gives the same pixels in training, encoding, evaluation, lmms-eval, judges, chat and the demo page."""

import numpy as np
import pytest
from lmms_eval.protocol import ChatMessages
from PIL import Image
from transformers import AutoImageProcessor

from eval_tasks.judging.answers import open_image
from eval_tasks.requests import Request, TextOptions, to_conversation
from evotok_plugin import EvoTokModel
from evotok_plugin.data.code_cache import EncodingOptions, encode_images
from evotok_plugin.data.sources import FileSource
from evotok_plugin.data.stream import TrainingStream
from evotok_plugin.evaluation.evaluate import evaluate
from evotok_plugin.evaluation.options import EvaluationOptions
from llava_ext.commands.chat import open_chat_image
from llava_ext.serving.uploads import UploadLimits, open_upload

SIDE = 48


def rotated(path):
    """Red above blue, stored rotated with an EXIF orientation."""
    stored = np.zeros((SIDE, SIDE, 3), np.uint8)
    stored[:, : SIDE // 2, 0] = stored[:, SIDE // 2 :, 2] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate clockwise by 90 degrees to display
    Image.fromarray(stored).save(path, exif=exif)
    return np.rot90(stored, -1)


def transparent(path):
    """A black square on a transparent background."""
    pixels, expected = np.zeros((SIDE, SIDE, 4), np.uint8), np.full((SIDE, SIDE, 3), 255, np.uint8)
    pixels[10:30, 10:30, 3] = 255
    expected[10:30, 10:30] = 0
    Image.fromarray(pixels).save(path)
    return expected


def deep(path):
    """A 16-bit ramp."""
    ramp = np.linspace(0, 255, SIDE).round().astype(np.uint16)
    Image.fromarray(np.broadcast_to(ramp * 257, (SIDE, SIDE)).copy()).save(path)
    return np.broadcast_to(ramp[None, :, None], (SIDE, SIDE, 3)).astype(np.uint8)


@pytest.mark.parametrize("write", [rotated, transparent, deep])
def test_one_file_is_the_same_image_everywhere(tmp_path, tiny_evotok_folder, monkeypatch, write):
    folder = tmp_path / "pictures"
    folder.mkdir()
    path = folder / "a.png"
    expected, source = write(path), FileSource(folder)
    model = EvoTokModel.from_pretrained(tiny_evotok_folder).eval()
    processor = AutoImageProcessor.from_pretrained(tiny_evotok_folder)
    assert processor.size == SIDE

    read = {
        "training": TrainingStream([source], SIDE, None, seed=0, length=1)[0].pixels.permute(1, 2, 0),
        "evaluation": evaluate(model, processor, source, EvaluationOptions(num_workers=0)).pictures[0][0],
        "judges": open_image(path),
        "chat": open_chat_image(str(path)),
        "demo": open_upload(path, UploadLimits()),
    }
    for name, image in {"path": path, "image": Image.open(path)}.items():
        pixels = processor(image, do_rescale=False, do_normalize=False).pixel_values[0]
        read[f"processor, {name}"] = pixels.permute(1, 2, 0)

    encode, encoded = model.encode, []
    monkeypatch.setattr(model, "encode", lambda pixel_values: encoded.append(pixel_values) or encode(pixel_values))
    encode_images(tmp_path / "codes", source, model, SIDE, options=EncodingOptions(num_workers=0, show_progress=False))
    read["encoding"] = ((encoded[0][0] + 1) * 127.5).round().permute(1, 2, 0)

    content = [{"type": "image", "url": image} for image in (str(path), Image.open(path))]
    messages = ChatMessages(messages=[{"role": "user", "content": content}])
    (message,) = to_conversation(Request(0, "task", 0, 0, "", lambda: messages, TextOptions()))
    read["lmms-eval, path"], read["lmms-eval, image"] = (part["image"] for part in message["content"])

    for name, image in read.items():
        np.testing.assert_array_equal(np.asarray(image), expected, err_msg=name)
