"""Model folders: opening, saving, and errors about damaged folders."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from evotok_plugin.errors import UserError
from llava_ext.assembly import assemble
from llava_ext.cli import main
from llava_ext.model_folder import load_model, read_tower, save_model, set_tower_aside


@pytest.fixture(scope="module")
def model_folder(tiny_mllm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model, processor = tiny_mllm
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_errors_name_a_folder_without_a_model(tmp_path, tiny_backbone_folder, tiny_evotok_folder):
    with pytest.raises(UserError, match="does not exist"):
        load_model(tmp_path / "nothing")
    with pytest.raises(UserError, match="no config.json"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="holds a qwen2 model, expected evotok_llava"):
        load_model(tiny_backbone_folder)
    with pytest.raises(UserError, match="not an EvoTok tokenizer"):
        assemble(tiny_backbone_folder, tiny_backbone_folder, 32, 2, 2)


def test_weights_that_are_missing_or_of_another_shape_are_errors(model_folder, tmp_path):
    for damage in ("drop", "shape"):
        folder = tmp_path / damage
        shutil.copytree(model_folder, folder)
        weights = load_file(folder / "model.safetensors")
        name = "image_head.from_hidden.weight"
        if damage == "drop":
            weights.pop(name)
        else:
            weights[name] = torch.zeros(7, 7)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match="image_head.from_hidden.weight|cannot be loaded"):
            load_model(folder)


def test_draw_writes_images_and_a_grid(model_folder, tmp_path, capsys):
    assert (
        main(["draw", "a photo of a ring", "-n", "2", "-o", str(tmp_path), "--model", str(model_folder), "--seed", "3"])
        == 0
    )
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["a_photo_of_a_ring_grid.png", "a_photo_of_a_ring_seed3.png", "a_photo_of_a_ring_seed4.png"]
    assert str(tmp_path / names[0]) in capsys.readouterr().out


def test_chat_answers_about_an_image(model_folder, scene_folder, capsys):
    image = next((scene_folder / "val" / "images").iterdir())
    assert (
        main(["chat", "What is it?", "--image", str(image), "--model", str(model_folder), "--max_new_tokens", "3"]) == 0
    )
    assert capsys.readouterr().out.endswith("\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chat", "x", "--image", "absent.png"], "'absent.png' does not exist"),
        (["draw", "x", "--model", "nowhere"], "'nowhere' does not exist"),
        (["draw", " "], "prompt"),
        (["draw", "x", "--guidance_scale", "0"], "guidance_scale must be at least 1"),
    ],
)
def test_cli_errors_are_one_line(arguments, message, model_folder, capsys):
    if "--model" not in arguments:
        arguments = [*arguments, "--model", str(model_folder)]
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_saved_files_contain_no_path_of_this_machine(model_folder):
    for file in model_folder.glob("*.json"):
        assert str(model_folder.parent.parent) not in file.read_text(), file.name


# Saving --------------------------------------------------------------------------------------------------------


def modules_and_weights(model):
    """Names and identities of all modules and weights, in order."""
    return (
        [(name, id(module)) for name, module in model.named_modules()],
        [(name, id(parameter), parameter.dtype) for name, parameter in model.named_parameters()],
        {name: value.clone() for name, value in model.state_dict().items()},
    )


def check_unchanged(model, before):
    modules, parameters, weights = modules_and_weights(model)
    assert (modules, parameters) == before[:2] and list(weights) == list(before[2])
    assert all(torch.equal(value, before[2][name]) for name, value in weights.items())


@pytest.fixture
def own_mllm(tiny_mllm):
    return copy.deepcopy(tiny_mllm[0])


def test_saving_leaves_the_model_unchanged(own_mllm, tmp_path):
    before = modules_and_weights(own_mllm)
    assert next(iter(own_mllm.named_children()))[0] == "vision_tower"
    save_model(own_mllm, tmp_path)
    check_unchanged(own_mllm, before)
    assert set(load_file(tmp_path / "model.safetensors")) <= set(before[2])
    assert own_mllm.to(torch.float64).vision_tower.dtype == torch.float64


@pytest.mark.parametrize("save", [save_model, lambda model, folder: model.save_pretrained(folder)])
def test_saving_leaves_the_settings_of_the_model_unchanged(own_mllm, tmp_path, save):
    def settings():
        values = [own_mllm.config.to_dict(), own_mllm.language_model.config.to_dict()]
        for one in (values[0], values[0]["text_config"], values[0]["vision_config"], values[1]):
            for name in ("dtype", "architectures"):  # transformers sets them
                one.pop(name, None)
        return copy.deepcopy([*values, vars(own_mllm.generation_config)])

    own_mllm.config.use_cache = own_mllm.config.text_config.use_cache = False  # as during training
    own_mllm.generation_config = GenerationConfig(eos_token_id=3)
    before = settings()
    save(own_mllm, tmp_path)
    assert settings() == before
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["use_cache"] is saved["text_config"]["use_cache"] is True
    assert "guidance_scale" in json.loads((tmp_path / "generation_config.json").read_text())["image_generation"]


def test_the_saved_dtype_is_that_of_the_language_model(own_mllm, tmp_path):
    for name, part in own_mllm.named_children():
        part.to(torch.float32 if name == "vision_tower" else torch.bfloat16)
    save_model(own_mllm, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_file(tmp_path / "model.safetensors")["vision_tower.quantizer.codebooks"].dtype == torch.float32


def test_an_error_while_writing_leaves_the_model_unchanged(own_mllm, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    before = modules_and_weights(own_mllm)
    monkeypatch.setattr(type(own_mllm), "save_pretrained", fail)
    with pytest.raises(OSError, match="no space"):
        save_model(own_mllm, tmp_path)
    check_unchanged(own_mllm, before)
    assert own_mllm.to(torch.float64).vision_tower.dtype == torch.float64


def test_saving_keeps_a_tokenizer_aside_that_training_has_set_aside(own_mllm, tmp_path):
    set_tower_aside(own_mllm)
    before = modules_and_weights(own_mllm)
    assert not any(name.startswith("vision_tower") for name in before[2])
    save_model(own_mllm, tmp_path)
    check_unchanged(own_mllm, before)
    assert "vision_tower.quantizer.codebooks" in load_file(tmp_path / "model.safetensors")


# Damage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("processor_config.json", "processor_config.json is missing; copy the processor's files"),
        ("tokenizer_config.json", "tokenizer_config.json is missing"),
        ("tokenizer.json", "tokenizer.json is missing"),
        ("chat_template.jinja", "no chat_template"),
        ("config.json", "holds no config.json"),
        ("model.safetensors", "holds no weights"),
    ],
)
def test_errors_name_a_missing_file(model_folder, tmp_path, capsys, name, message):
    folder = shutil.copytree(model_folder, tmp_path / "copy")
    (folder / name).unlink()
    assert main(["draw", "a red circle", "--model", str(folder), "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "processor_config.json", "config.json"])
@pytest.mark.parametrize("command", ["draw", "chat", "export"])
def test_errors_name_a_git_lfs_pointer_and_its_remedy(model_folder, tmp_path, capsys, name, command):
    folder = shutil.copytree(model_folder, tmp_path / "copy")
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 14458342\n")
    arguments = {
        "draw": ["draw", "a red circle", "--model", str(folder), "-o", str(tmp_path / "out")],
        "chat": ["chat", "What is it?", "--model", str(folder)],
        "export": ["export", str(folder), "-o", str(tmp_path / "out")],
    }
    assert main(arguments[command]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{folder / name} is a Git LFS pointer" in error and "git lfs pull" in error


@pytest.mark.parametrize("command", ["draw", "chat", "export", "merge"])
@pytest.mark.parametrize("content", ['{"model_type": "evotok_llava",', "[]", "\xff"])
def test_a_damaged_configuration_gives_the_same_error_in_every_command(
    model_folder, tmp_path, capsys, command, content
):
    folder = shutil.copytree(model_folder, tmp_path / "copy")
    (folder / "config.json").write_text(content, encoding="latin-1")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").touch()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "base.json").write_text(json.dumps({"name": "base", "sha256": "0"}))
    arguments = {
        "draw": ["draw", "a red circle", "--model", str(folder), "-o", str(tmp_path / "out")],
        "chat": ["chat", "What is it?", "--model", str(folder)],
        "export": ["export", str(folder), "-o", str(tmp_path / "out")],
        "merge": ["merge", str(folder), str(adapter), "-o", str(tmp_path / "out")],
    }
    with pytest.raises(UserError) as raised:
        load_model(folder)
    assert main(arguments[command]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == f"error: {raised.value}"
    assert str(folder / "config.json") in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("generation_config.json", "{", "generation_config.json cannot be read as JSON"),
        ("processor_config.json", "[]", "processor_config.json cannot be read: expected an object"),
        ("tokenizer.json", "{", "tokenizer.json cannot be read as JSON"),
        ("tokenizer.json", "{}", "the processor in .* cannot be loaded"),
        ("tokenizer_config.json", '{"tokenizer_class": "NoSuchTokenizer"}', "neither a pad_token nor an eos_token"),
        ("chat_template.jinja", "", "chat_template.jinja is empty"),
        ("config.json", '{"model_type": "evotok_llava"}', "expected an object with model settings as text_config"),
    ],
)
def test_errors_name_damaged_settings(model_folder, tmp_path, name, content, message):
    folder = shutil.copytree(model_folder, tmp_path / "copy")
    (folder / name).write_text(content)
    (folder / "notes.json").write_text("")  # a user's own file
    with pytest.raises(UserError, match=message):
        load_model(folder)


def test_the_processor_of_another_model_is_rejected(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "copy")
    file = folder / "processor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"codebook_size": 64}))
    with pytest.raises(UserError, match="codebook_size is 32 in the model and 64 in the processor"):
        load_model(folder)
    settings = json.loads(file.read_text()) | {"image_processor": {"image_processor_type": "CLIPImageProcessor"}}
    file.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="expected an EvoTokImageProcessor, got CLIPImageProcessor"):
        load_model(folder)


def test_a_damaged_tokenizer_inside_a_model_folder_is_rejected(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    weights.pop("vision_tower.quantizer.codebooks")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"the tokenizer in .*1 missing \(quantizer.codebooks\)"):
        read_tower(folder)
