"""The exported tower, opened by transformers in a process that cannot import this project."""

import ast
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor

from evotok_plugin import EvoTokConfig, EvoTokModel, EvoTokVisionModel
from evotok_plugin.cli import main

BLOCK = "import sys; sys.modules.update(dict.fromkeys(['evotok_plugin', 'llava_ext', 'eval_tasks']))\n"
PROGRAM = """
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel

tower = AutoModel.from_pretrained("tower", trust_remote_code=True).eval()
half = AutoModel.from_pretrained("tower", trust_remote_code=True, dtype=torch.bfloat16)
processor = AutoImageProcessor.from_pretrained("tower", trust_remote_code=True)
out = tower(load_file("pixels.safetensors")["pixels"], output_hidden_states=True)
tower.save_pretrained("again")
again = AutoModel.from_pretrained("again", trust_remote_code=True)
assert torch.equal(again(load_file("pixels.safetensors")["pixels"]).last_hidden_state, out.last_hidden_state)
assert torch.equal(half.quantizer.codebooks, tower.quantizer.codebooks) and half.dtype == torch.bfloat16
assert AutoConfig.from_pretrained("tower", trust_remote_code=True).hidden_size == out.last_hidden_state.shape[-1]
save_file({
    "features": out.last_hidden_state.contiguous(), "pooled": out.pooler_output.contiguous(),
    "second_to_last": out.hidden_states[-2].clone(), "wide": processor(Image.open("wide.png")).pixel_values,
}, "out.safetensors")
"""


def run_alone(folder, program):
    """Run a program in a folder, in a process without this project and with a cache of code of its own."""
    environment = {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", BLOCK + program], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def exported(tiny_evotok_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    assert main(["export-tower", str(tiny_evotok_folder), "-o", str(folder / "tower")]) == 0
    return folder


def test_features_equal_those_of_the_tokenizer(exported, tiny_evotok_folder, pixel_values, pictures):
    save_file({"pixels": pixel_values}, exported / "pixels.safetensors")
    pictures[1].save(exported / "wide.png")
    run_alone(exported, PROGRAM)
    out = load_file(exported / "out.safetensors")
    with torch.no_grad():
        expected = EvoTokModel.from_pretrained(tiny_evotok_folder)(pixel_values).features
    torch.testing.assert_close(out["features"][:, 1:], expected)
    torch.testing.assert_close(out["features"][:, 0], expected.mean(dim=1))
    torch.testing.assert_close(out["pooled"], expected.mean(dim=1))
    assert torch.equal(out["second_to_last"], out["features"])
    wide = AutoImageProcessor.from_pretrained(tiny_evotok_folder)(pictures[1], return_tensors="pt").pixel_values
    torch.testing.assert_close(out["wide"], wide)


@pytest.mark.parametrize("quantizer", ["simvq", "fsq"])
def test_towers_with_other_quantizers_give_the_same_features(quantizer, pixel_values, pictures, tmp_path):
    torch.manual_seed(0)
    model = EvoTokModel(EvoTokConfig.preset("tiny", quantizer=quantizer)).eval()
    model.save_pretrained(tmp_path / "evotok")
    assert main(["export-tower", str(tmp_path / "evotok"), "-o", str(tmp_path / "tower")]) == 0
    save_file({"pixels": pixel_values}, tmp_path / "pixels.safetensors")
    pictures[1].save(tmp_path / "wide.png")
    run_alone(tmp_path, PROGRAM)
    with torch.no_grad():
        expected = model(pixel_values).features
    torch.testing.assert_close(load_file(tmp_path / "out.safetensors")["features"][:, 1:], expected)


def test_hosts_that_do_not_trust_the_code_prepare_squares_alike(exported, tiny_evotok_folder, pictures):
    processor = AutoImageProcessor.from_pretrained(exported / "tower")
    assert type(processor).__name__.startswith("CLIP")
    ours = AutoImageProcessor.from_pretrained(tiny_evotok_folder)(pictures[0], return_tensors="pt").pixel_values
    theirs = processor(pictures[0], return_tensors="pt").pixel_values
    assert (theirs - ours).abs().max() <= 1.01 / 127.5  # one level of 255


def test_the_folder_has_the_tower_and_nothing_of_this_machine(exported, tiny_evotok_folder):
    names = set(load_file(exported / "tower" / "model.safetensors"))
    assert names == set(EvoTokVisionModel.from_pretrained(tiny_evotok_folder).state_dict())
    config = json.loads((exported / "tower" / "config.json").read_text())
    assert config["model_type"] == "evotok_tower" and config["hidden_size"] == config["semantic_dim"]
    for path in (exported / "tower").iterdir():
        if path.suffix != ".safetensors":
            assert str(tiny_evotok_folder) not in path.read_text()
        if path.suffix == ".py":
            imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
            assert not [node.module for node in imports if not node.level and "evotok" in str(node.module)]
    card = (exported / "tower" / "README.md").read_text()
    assert "images of 48 x 48 pixels" in card and "$" not in card


def test_a_tokenizer_without_semantics_is_rejected(tiny_evotok_folder, tmp_path, capsys):
    for path in tiny_evotok_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    values = json.loads((tmp_path / "config.json").read_text()) | {"semantic_decoder_trained": False}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert main(["export-tower", str(tmp_path), "-o", str(tmp_path / "out")]) == 2
    assert "was not trained" in capsys.readouterr().err and not (tmp_path / "out").exists()
