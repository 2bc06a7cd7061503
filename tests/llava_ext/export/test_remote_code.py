"""Export of a model with its code, opened by transformers in a process that cannot import this project."""

import re
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor

from evotok_plugin.data.images import open_picture
from llava_ext.cli import main
from llava_ext.model_folder import INCLUDED_MODEL, load_model

BLOCK = "import sys; sys.modules.update(dict.fromkeys(['evotok_plugin', 'llava_ext', 'eval_tasks']))\n"
CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What color is the ring?"}]}]
PROGRAM = """
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel
text = processor.apply_chat_template(CHAT, add_generation_prompt=True)
batch = processor(images=Image.open("drawn.png"), text=text, return_tensors="pt")
save_file({"logits": model(**batch).logits, "ids": batch["input_ids"]}, "../out.safetensors")
model.save_pretrained("../again")
processor.save_pretrained("../again")
again = AutoModelForImageTextToText.from_pretrained("../again", trust_remote_code=True).eval()
ids = AutoProcessor.from_pretrained("../again", trust_remote_code=True)(
    images=Image.open("drawn.png"), text=text, return_tensors="pt"
)["input_ids"]
assert ids.equal(batch["input_ids"]) and again(**batch).logits.equal(model(**batch).logits)
assert type(AutoModel.from_pretrained(".", trust_remote_code=True)).__name__ == "EvoTokLlavaModel"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The exported included model, after the snippet of its README and `PROGRAM` have run in it alone."""
    root = tmp_path_factory.mktemp("remote")
    assert main(["export", str(INCLUDED_MODEL), "--remote-code", "-o", str(root / "model")]) == 0
    (snippet,) = re.findall(r"```python\n(.*?)```", (root / "model" / "README.md").read_text(), re.S)
    environment = {"HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", BLOCK + snippet + PROGRAM.replace("CHAT", repr(CHAT))],
        cwd=root / "model", env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (root / "printed").write_text(done.stdout)
    return root


@torch.no_grad()
def test_logits_and_pictures_equal_those_of_the_package(folder):
    model, processor = load_model(INCLUDED_MODEL)
    drawn = model.eval().generate_images("a photo of a red circle", processor=processor, seed=0)[0]
    picture = open_picture(folder / "model" / "drawn.png")
    assert Image.Image.tobytes(picture) == drawn.tobytes()
    out = load_file(folder / "out.safetensors")
    batch = processor(
        images=picture, text=processor.apply_chat_template(CHAT, add_generation_prompt=True), return_tensors="pt"
    )
    assert out["ids"].equal(batch["input_ids"])
    torch.testing.assert_close(out["logits"], model(**batch).logits)
    assert "red circle" in (folder / "printed").read_text()


def test_the_package_opens_the_folder_too(folder):
    model, processor = load_model(folder / "model")
    assert type(model).__module__ == "llava_ext.modeling_evotok_llava"
    assert type(AutoProcessor.from_pretrained(folder / "model")).__module__ == "llava_ext.processing_evotok_llava"
    assert processor.image_processor.size == 48


def test_a_plain_causal_lm_has_no_code_to_add(tmp_path, capsys):
    arguments = ["--remote-code", "--format", "causal-lm", "-o", str(tmp_path / "out")]
    assert main(["export", str(INCLUDED_MODEL), *arguments]) == 2
    assert "--remote-code has no effect with --format causal-lm" in capsys.readouterr().err
