"""Export of a self-contained model folder."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_ext.cli import main
from llava_ext.model_folder import load_model


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_an_export_is_self_contained(model_folder, tmp_path, capsys, dtype):
    """Checkpoints of the training folder are left out, and the tokenizer is never rounded."""
    (model_folder / "checkpoint-1").mkdir(exist_ok=True)
    assert main(["export", str(model_folder), "-o", str(tmp_path / "out"), "--dtype", dtype]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    assert all(path.is_file() for path in (tmp_path / "out").iterdir())
    assert not {path.suffix for path in (tmp_path / "out").iterdir()} & {".bin", ".pt", ".pth", ".pkl"}
    for name, tensor in load_file(model_folder / "model.safetensors").items():
        exported = load_file(tmp_path / "out" / "model.safetensors")[name]
        rounded = dtype == "bfloat16" and not name.startswith("vision_tower.")
        assert torch.equal(exported, tensor.to(torch.bfloat16) if rounded else tensor), name


def test_an_export_can_round_the_decoders_but_never_the_encoder_or_codebooks(model_folder, tmp_path):
    flags = ["--dtype", "bfloat16", "--decoder_dtype", "bfloat16"]
    assert main(["export", str(model_folder), "-o", str(tmp_path / "out"), *flags]) == 0
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        chooses = name.startswith(("vision_tower.encoder.", "vision_tower.quantizer."))
        assert tensor.dtype == (torch.float32 if chooses else torch.bfloat16), name
    model, _ = load_model(tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.vision_tower.fingerprint() == load_model(model_folder)[0].vision_tower.fingerprint()


def test_the_readme_of_an_export_works_and_contains_no_path(model_folder, tmp_path, monkeypatch):
    assert main(["export", str(model_folder), "-o", str(tmp_path / "out")]) == 0
    for file in (tmp_path / "out").iterdir():
        if file.suffix in (".json", ".md", ".jinja"):
            assert str(model_folder.parent) not in file.read_text(), file.name
    monkeypatch.chdir((tmp_path / "out").rename(tmp_path / "moved"))
    exec(re.search(r"```python\n(.*?)```", Path("README.md").read_text(), re.S)[1], {})
    assert Path("drawn.png").is_file()


def test_the_card_counts_the_tokenizer_separately_and_names_the_dtype_of_the_rest(model_folder, tmp_path):
    model, _ = load_model(model_folder)
    tower = sum(parameter.numel() for parameter in model.vision_tower.parameters())
    others = sum(parameter.numel() for parameter in model.parameters()) - tower
    assert main(["export", str(model_folder), "-o", str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| parameters | {others / 1e6:.1f} M in bfloat16 |" in card
    assert f"| of the tokenizer | {tower / 1e6:.1f} M in float32 |" in card


def test_an_export_never_overwrites_files(model_folder, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("dear")
    assert main(["export", str(model_folder), "-o", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err and (tmp_path / "mine.txt").read_text() == "dear"
