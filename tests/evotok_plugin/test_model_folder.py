"""Model folders: every kind of damage gives one UserError that names the file, the cause and the remedy."""

import json
import logging
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, SiglipVisionModel

from evotok_plugin import EvoTokConfig, EvoTokModel, EvoTokVisionModel, EvoTokVisionTower
from evotok_plugin.cli import main
from evotok_plugin.common.weight_checks import check_values, load_strictly
from evotok_plugin.common.weight_files import folder_fingerprint, weight_files
from evotok_plugin.errors import UserError
from evotok_plugin.model_folder import (
    load_whole,
    model_type_of,
    open_config,
    open_tokenizer_folder,
)
from evotok_plugin.teacher import load_teacher
from evotok_plugin.tokenizer_folder import open_tokenizer
from evotok_plugin.training.teacher import build_siglip

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 14458342\n"
WEIGHTS = "model.safetensors"


def copy(folder, to):
    return shutil.copytree(folder, to / "copy")


def rewrite(folder, change):
    """Change the state dict of a folder in place."""
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def shard(folder):
    """Split the weights of a folder over two files with an index."""
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names, index = list(weights), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def test_a_complete_folder_is_loaded_bit_for_bit(tiny_evotok_folder, tmp_path):
    folder = copy(tiny_evotok_folder, tmp_path)
    expected = load_file(folder / WEIGHTS)
    shard(folder)
    loaded = open_tokenizer(str(folder), "cpu")[0].state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, "is a Git LFS pointer.*git lfs pull"),
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>Sign in</html>", "is a web page"),
        (b"  <html lang='en'>", "is a web page"),
        (bytes(4096), "begins with zeros"),
        (b"PK\x03\x04" + bytes(64), "is a pickled file"),
        (b"not a tensor in sight", "is cut off or damaged"),
        (b"\xff" * 4096, "is cut off or damaged"),
        (None, "is cut off or damaged"),
    ],
)
def test_damaged_weight_files_are_named(tiny_evotok_folder, tmp_path, content, message):
    folder = copy(tiny_evotok_folder, tmp_path)
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1000] if content is None else content)
    with pytest.raises(UserError, match=message) as caught:
        open_tokenizer(str(folder), "cpu")
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("encoder.to_latent.0.weight"), r"1 missing \(encoder.to_latent.0.weight\)"),
        (lambda weights: weights.update(odd=torch.zeros(2)), r"1 unexpected \(odd\)"),
        (
            lambda weights: weights.update({"quantizer.codebooks": torch.zeros(8, 16, 16)}),
            r"quantizer.codebooks \(8, 16, 16\) instead of \(8, 32, 16\)",
        ),
        (lambda weights: weights["quantizer.codebooks"].view(-1)[7:8].fill_(float("nan")), "NaN or infinite"),
        (lambda weights: weights["encoder.to_latent.0.weight"].view(-1)[:1].fill_(float("-inf")), "NaN or infinite"),
        (lambda weights: [weights[name].zero_() for name in weights], "[0-9]+ of [0-9]+ weight matrices are zero"),
        (
            lambda weights: weights.update({"quantizer.codebooks": weights["quantizer.codebooks"].to(torch.int32)}),
            "integers where floating-point weights are expected",
        ),
    ],
)
def test_weights_that_do_not_match_the_model_are_rejected(tiny_evotok_folder, tmp_path, change, message):
    folder = copy(tiny_evotok_folder, tmp_path)
    rewrite(folder, change)
    with pytest.raises(UserError, match=message):
        open_tokenizer(str(folder), "cpu")


def test_a_single_matrix_of_zeros_is_loaded_with_a_warning(tiny_evotok_folder, tmp_path, caplog):
    folder = copy(tiny_evotok_folder, tmp_path)
    rewrite(folder, lambda weights: weights["encoder.to_latent.0.weight"].zero_())
    with caplog.at_level(logging.WARNING):
        open_tokenizer(str(folder), "cpu")
    assert "1 weight matrices are all zero (encoder.to_latent.0.weight)" in caplog.text


def test_missing_shards_are_named(tiny_evotok_folder, tmp_path):
    folder = copy(tiny_evotok_folder, tmp_path)
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00002.safetensors does not exist.*1 of 2 files"):
        open_tokenizer(str(folder), "cpu")
    (folder / f"{WEIGHTS}.index.json").unlink()
    with pytest.raises(UserError, match="index.json is missing"):
        weight_files(folder)
    (folder / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"a": "../outside.safetensors"}}')
    with pytest.raises(UserError, match="expected a file of the folder"):
        weight_files(folder)
    (folder / f"{WEIGHTS}.index.json").write_text('{"weight_map": []}')
    with pytest.raises(UserError, match="expected a weight_map"):
        weight_files(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "cannot be read"),
        (b"", "is empty"),
        (b"[]", "expected an object in JSON, got list"),
        (b"\xff\xfe\x00", "cannot be read"),
        (POINTER, "is a Git LFS pointer"),
        (b"<html>", "is a web page"),
        (b'{"model_type": 7}', "expected a name as model_type, got 7"),
        (b"{}", "holds a nameless model"),
        (b'{"model_type": "vit"}', "holds a vit model, expected evotok"),
        (
            b'{"model_type": "evotok", "image_size": "large"}',
            "config.json.*image_size: expected a whole number, got 'large'",
        ),
        (b'{"model_type": "evotok", "codebook_dim": null}', "codebook_dim: expected a whole number, got None"),
        (b'{"model_type": "evotok", "image_size": 50}', "image_size 50 is not a multiple"),
        (None, "holds no config.json"),
    ],
)
def test_damaged_configurations_are_named(tiny_evotok_folder, tmp_path, content, message):
    folder = copy(tiny_evotok_folder, tmp_path)
    (folder / "config.json").unlink() if content is None else (folder / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        open_tokenizer(str(folder), "cpu")
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_broken_config_gives_the_same_error_for_every_reader(tiny_evotok_folder, tmp_path, capsys):
    folder = copy(tiny_evotok_folder, tmp_path)
    (folder / "config.json").write_text("{")
    errors = []
    for read in (
        lambda: model_type_of(folder),
        lambda: open_tokenizer(str(folder), "cpu"),
        lambda: load_whole(EvoTokModel, folder),
        lambda: open_config(AutoConfig, folder),
        lambda: EvoTokVisionModel.from_pretrained(folder),
        lambda: EvoTokVisionTower(folder, delay_load=True),
        lambda: load_teacher(str(folder)),
    ):
        with pytest.raises(UserError) as caught:
            read()
        errors.append(str(caught.value))
    Image.new("RGB", (48, 48)).save(tmp_path / "image.png")
    assert main(["reconstruct", str(tmp_path / "image.png"), "--model", str(folder)]) == 2
    errors.append(capsys.readouterr().err.strip().removeprefix("error: "))
    assert len(set(errors)) == 1 and errors[0].startswith(f"{folder / 'config.json'} cannot be read as JSON")


def test_a_missing_or_damaged_image_processor_is_named(tiny_evotok_folder, tmp_path):
    folder = copy(tiny_evotok_folder, tmp_path)
    (folder / "preprocessor_config.json").write_bytes(POINTER)
    with pytest.raises(UserError, match="preprocessor_config.json is a Git LFS pointer"):
        open_tokenizer(str(folder), "cpu")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="preprocessor_config.json or processor_config.json is missing; copy it"):
        open_tokenizer(str(folder), "cpu")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_missing_and_damaged_files_of_a_text_tokenizer_are_named(tiny_tokenizer_folder, tmp_path, name):
    folder = copy(tiny_tokenizer_folder, tmp_path)
    (folder / name).write_text("{")
    with pytest.raises(UserError, match="text tokenizer|cannot be read as JSON"):
        open_tokenizer_folder(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name}.*is missing"):
        open_tokenizer_folder(folder)


def test_unknown_model_types_are_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    assert model_type_of(tmp_path) == "no_such_model"
    with pytest.raises(UserError, match="config.json cannot be loaded: .*no_such_model"):
        open_config(AutoConfig, tmp_path)


# Language models -----------------------------------------------------------------------------------------------


def test_tied_weights_and_old_rotary_buffers_are_accepted(make_backbone, tiny_tokenizer_folder, tmp_path):
    folder = make_backbone(tiny_tokenizer_folder, tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / WEIGHTS)
    rewrite(folder, lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    model = load_whole(AutoModelForCausalLM, folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_language_model_with_a_missing_matrix_is_rejected(tiny_backbone_folder, tmp_path):
    folder = copy(tiny_backbone_folder, tmp_path)
    rewrite(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(UserError, match=r"1 missing \(model.layers.1.mlp.up_proj.weight\)"):
        load_whole(AutoModelForCausalLM, folder)


def test_a_state_dict_is_loaded_strictly():
    module = torch.nn.Linear(2, 3)
    good = {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}
    load_strictly(module, good, "it")
    assert torch.equal(module.weight, good["weight"])
    for bad, message in (
        ({"weight": good["weight"]}, r"1 missing \(bias\)"),
        (good | {"more": torch.ones(1)}, r"1 unexpected \(more\)"),
        (good | {"bias": torch.zeros(4)}, r"bias \(4,\) instead of \(3,\)"),
        (good | {"bias": torch.full((3,), float("inf"))}, "NaN or infinite"),
    ):
        with pytest.raises(UserError, match=message):
            load_strictly(module, bad, "it")
    check_values({"ids": torch.zeros(3, 3, dtype=torch.long), "empty.weight": torch.zeros(0, 2)}, "it")


# Teachers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def siglip():
    torch.manual_seed(0)
    return build_siglip(EvoTokConfig.preset("tiny"), vocab_size=100, max_text_length=8)


def test_a_teacher_is_loaded_from_the_full_model_and_from_the_tower_alone(siglip, tmp_path):
    siglip.save_pretrained(tmp_path / "full")
    siglip.vision_model.save_pretrained(tmp_path / "tower")
    images = torch.rand(1, 3, 48, 48)
    expected = siglip.vision_model(images, output_hidden_states=True).hidden_states[-2]
    for name in ("full", "tower"):
        torch.testing.assert_close(load_teacher(str(tmp_path / name))(images), expected)


def test_a_teacher_may_lack_unused_parts(siglip, tmp_path):
    siglip.vision_model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda weights: [weights.pop(name) for name in list(weights) if name.startswith("head.")])
    load_teacher(str(tmp_path))
    rewrite(tmp_path, lambda weights: weights.pop("encoder.layers.0.mlp.fc1.weight"))
    with pytest.raises(UserError, match=r"1 missing \(encoder.layers.0.mlp.fc1.weight\)"):
        load_teacher(str(tmp_path))


@pytest.mark.parametrize("kind", ["resnet", "swin", "qwen2"])
def test_other_models_are_rejected_as_teachers(kind, tmp_path):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"it holds a {kind} model; expected one of siglip, siglip2, clip, vit, dinov2"):
        load_teacher(str(tmp_path))


def test_the_weights_of_another_tower_are_rejected(siglip, tmp_path):
    siglip.vision_model.save_pretrained(tmp_path)
    other = SiglipVisionModel(siglip.vision_model.config).state_dict()
    save_file({f"other.{name}": value for name, value in other.items()}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match="missing .*; .*unexpected"):
        load_teacher(str(tmp_path))


# Tokenizers that were trained without a teacher ----------------------------------------------------------------


@pytest.fixture(scope="module")
def pixels_only(tiny_evotok_folder, tmp_path_factory):
    """A tokenizer folder with an untrained semantic decoder according to its configuration."""
    folder = shutil.copytree(tiny_evotok_folder, tmp_path_factory.mktemp("pixels") / "evotok")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"semantic_decoder_trained": False}))
    return folder


@pytest.fixture
def older_folder(tiny_evotok_folder, tmp_path):
    """A tokenizer folder that does not say whether its semantic decoder was trained."""
    folder = copy(tiny_evotok_folder, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config.pop("semantic_decoder_trained", None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("recipe", [None, "- not settings", "max_steps: 3", "semantic_weight: often"])
def test_semantic_decoders_of_older_folders_count_as_trained(older_folder, recipe, caplog):
    if recipe:
        (older_folder / "recipe.yaml").write_text(recipe)
    assert EvoTokModel.from_pretrained(older_folder).config.semantic_decoder_trained
    assert open_tokenizer(str(older_folder), "cpu")[0].config.semantic_decoder_trained
    assert "does not record whether its semantic decoder was trained" in caplog.text


@pytest.mark.parametrize("weight", [0, 0.5])
def test_the_training_settings_tell_whether_an_older_semantic_decoder_was_trained(older_folder, weight, caplog):
    (older_folder / "recipe.yaml").write_text(f"teacher: null\nsemantic_weight: {weight}\n")
    for model in (EvoTokModel.from_pretrained(older_folder), open_tokenizer(str(older_folder), "cpu")[0]):
        assert model.config.semantic_decoder_trained is (weight > 0)
    assert "does not record" not in caplog.text
    if not weight:
        with pytest.raises(UserError, match="was not trained"):
            EvoTokVisionModel.from_pretrained(older_folder)


def test_an_untrained_semantic_decoder_is_rejected(pixels_only):
    model = open_tokenizer(str(pixels_only), "cpu")[0]
    codes = model.encode(torch.zeros(1, 3, 48, 48)).codes
    assert model.decode_pixels(codes[..., :4]).shape == (1, 3, 48, 48)
    for read in (
        lambda: model.decode_semantics(codes),
        lambda: EvoTokVisionModel.from_pretrained(pixels_only),
        lambda: EvoTokVisionTower(pixels_only),
        lambda: EvoTokVisionTower(pixels_only, delay_load=True),
    ):
        with pytest.raises(UserError, match="semantic decoder .* was not trained .*--teacher FOLDER"):
            read()


# Fingerprints --------------------------------------------------------------------------------------------------


def test_a_fingerprint_changes_with_any_weight_and_with_the_processor(tiny_evotok_folder, tmp_path):
    folder = copy(tiny_evotok_folder, tmp_path)
    before = folder_fingerprint(folder)
    (folder / "README.md").write_text("about it")
    assert folder_fingerprint(folder) == before == folder_fingerprint(tiny_evotok_folder)
    rewrite(folder, lambda weights: weights["encoder.to_latent.0.weight"][-1, -1].add_(1))
    after = folder_fingerprint(folder)
    (folder / "preprocessor_config.json").write_text('{"size": 64}')
    assert len({before, after, folder_fingerprint(folder)}) == 3
