"""Preparation of the embedded default: atomic steps, and folders of the user."""

import pytest

from evotok_plugin.errors import UserError
from llava_ext.embedded import prepare
from llava_ext.embedded.prepare import DONE, holds_model, make, uses_embedded_default
from llava_ext.embedded.text_backbone import corpus_texts


def test_only_embedded_recipes_need_preparation():
    assert uses_embedded_default("pretrain", [])
    assert uses_embedded_default("pretrain", ["--max_steps", "3"])
    assert not uses_embedded_default("pretrain", ["--data_path", "mine.json"])
    assert not uses_embedded_default("pretrain", ["--model_name_or_path=llm"])
    for later in ("finetune", "finetune_lora", "finetune_qlora"):
        assert not uses_embedded_default(later, [])
    assert not uses_embedded_default("paper", [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "not valid YAML"),
        ("- a", "expected 'key: value' lines"),
        ("\xff", "valid YAML"),
        ("a: 2020-13-45", "not valid YAML"),
        ("\x01", "not valid YAML"),
    ],
)
def test_a_damaged_recipe_is_named(tmp_path, capsys, content, message):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(content, encoding="latin-1")
    assert prepare.main(["--recipe", str(recipe), "--workspace", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: recipe {recipe}: ") and message in error


def test_an_empty_recipe_name_is_unknown(capsys):
    assert prepare.main(["--recipe", ""]) == 2
    assert "unknown recipe ''" in capsys.readouterr().err


def test_damaged_records_of_a_scene_folder_are_named(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "pretrain.json").write_text('[{"conversations"')
    with pytest.raises(UserError, match="pretrain.json cannot be loaded"):
        list(corpus_texts(tmp_path, [{"conversations": [{"value": "hi"}]}]))


def test_a_step_is_atomic(tmp_path):
    folder = tmp_path / "thing"

    def fail(out):
        (out / "half").write_text("x")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        make(folder, "a thing", fail, holds_model())
    assert not folder.exists()
    make(folder, "a thing", lambda out: (out / "whole").write_text("x"), holds_model())
    assert {path.name for path in folder.iterdir()} == {"whole", DONE}
    make(folder, "a thing", fail, holds_model())  # there already: not built again


def test_a_folder_of_the_user_is_used_or_rejected_and_never_deleted(tmp_path):
    folder = tmp_path / "evotok"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")

    def build(out):
        raise AssertionError("nothing must be built")

    with pytest.raises(UserError, match="evotok was not made by this program .* --workspace"):
        make(folder, "a tokenizer", build, holds_model("evotok"))
    (folder / "config.json").write_text('{"model_type": "evotok"}')
    (folder / "model.safetensors").touch()
    make(folder, "a tokenizer", build, holds_model("evotok"))
    with pytest.raises(UserError, match="was not made by this program"):
        make(folder, "a teacher", build, holds_model("siglip_vision_model"))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]


def test_all_folders_are_checked_before_the_first_step(tmp_path, capsys):
    (tmp_path / "evotok").mkdir()
    (tmp_path / "evotok" / "notes.txt").write_text("mine")
    assert prepare.main(["--workspace", str(tmp_path)]) == 2
    assert "evotok was not made by this program" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["evotok"]


def test_flags_are_checked_before_anything_is_prepared(tmp_path, capsys):
    command = ["--recipe", "pretrain", "--workspace", str(tmp_path / "new"), "--learnin_rate", "1"]
    assert prepare.main(command) == 2
    assert "did you mean --learning_rate" in capsys.readouterr().err and not (tmp_path / "new").exists()
