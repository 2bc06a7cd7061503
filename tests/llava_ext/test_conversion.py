"""Conversion of research adapters made from small random parts into a complete model."""

import os

import pytest
import torch
from research_layout import research_depth_transformer, research_projector, research_tokenizer
from safetensors.torch import load_file

from evotok_plugin import DepthTransformerConfig, DepthTransformerHead, EvoTokModel
from llava_ext.cli import main
from llava_ext.model_folder import load_model
from llava_ext.projector import Projector

WIDTH = 32  # of the small backbone


@pytest.fixture(scope="module")
def parts(tiny_evotok_folder):
    """A depth transformer and both projectors that fit the small backbone and the small tokenizer."""
    torch.manual_seed(5)
    config = EvoTokModel.from_pretrained(tiny_evotok_folder).config
    head = DepthTransformerHead(
        DepthTransformerConfig(WIDTH, config.codebook_dim, config.codebook_size, config.pixel_depth, 24, 3, 2)
    )
    torch.nn.init.normal_(head.level_embedding)
    return {
        "image_head": head,
        "read_projector": Projector(config.semantic_dim, WIDTH, config.num_positions),
        "write_projector": Projector(config.codebook_dim, WIDTH, config.num_positions),
    }


@pytest.fixture
def files(parts, tmp_path):
    (tmp_path / "read").mkdir()
    (tmp_path / "write").mkdir()
    paths = {
        "image_head": tmp_path / "rqtransformer.bin",
        "read_projector": tmp_path / "read" / "mm_projector.bin",
        "write_projector": tmp_path / "write" / "mm_projector.bin",
    }
    torch.save(research_depth_transformer(parts["image_head"]), paths["image_head"])
    for name in ("read_projector", "write_projector"):
        torch.save(research_projector(parts[name]), paths[name])
    return paths


@pytest.fixture
def convert(tiny_backbone_folder, tiny_evotok_folder, tmp_path, capsys):
    def run(*arguments, vision_tower=tiny_evotok_folder):
        folders = ["--language_model", tiny_backbone_folder, "--vision_tower", vision_tower, "-o", tmp_path / "out"]
        code = main([str(argument) for argument in ("convert", *arguments, *folders)])
        captured = capsys.readouterr()
        return code, captured.err.strip().splitlines()[-1] if code else captured.out

    return run


@torch.no_grad()
def test_all_adapters_together_make_a_model_that_loads(convert, parts, files, tmp_path):
    code, text = convert(*files.values(), "--head_num_heads", "2")
    assert code == 0, text
    assert "random" not in text and "left out: 48 keys, classifiers of levels never drawn" in text
    model, processor = load_model(tmp_path / "out")
    model.eval()
    hidden, latents = torch.randn(3, WIDTH), torch.randn(3, 4, parts["image_head"].from_latent.in_features)
    for ours, theirs in zip(model.image_head(hidden, latents), parts["image_head"](hidden, latents), strict=True):
        torch.testing.assert_close(ours, theirs)
    for part, module in parts.items():  # the projectors' position embeddings are zeros in both
        converted = getattr(model, part).state_dict()
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, converted[name]), (part, name)
    assert len(model.generate_images("a ring", processor, guidance_scale=1.0)) == 1


def test_a_part_without_a_file_is_initialized_at_random_and_reported(convert, files, tmp_path):
    code, text = convert(files["image_head"], "--head_num_heads", "2")
    assert code == 0
    for part in ("read_projector", "write_projector"):
        assert f"{part}: no file given, initialized at random" in text
    model, _ = load_model(tmp_path / "out")
    assert model.config.head_hidden_size == 24 and model.config.head_num_layers == 3
    assert model.read_projector.linear_1.weight.abs().sum() > 0


def test_the_tokenizer_stays_float32_in_a_bfloat16_model(convert, files, tmp_path):
    assert convert(*files.values(), "--head_num_heads", "2", "--dtype", "bfloat16")[0] == 0
    weights = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in weights.items():
        assert tensor.dtype == (torch.float32 if name.startswith("vision_tower.") else torch.bfloat16), name


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{image_head}"], "the width 24, which is not a multiple of 64; set it with --head_num_heads"),
        (["{image_head}", "--head_num_heads", "5"], "must be a multiple of its 5 heads, got 24"),
        (["{image_head}", "--head_num_heads", "2", "--head_num_layers", "4"], "num_layers is 3, but --head_num_layers"),
        (["{image_head}", "{image_head}", "--head_num_heads", "2"], "are both the image_head"),
        (["{read_projector}", "{read_projector}"], "are both the read_projector"),
        (["absent.bin"], "'absent.bin' does not exist"),
    ],
)
def test_invalid_arguments_are_explained(convert, files, tmp_path, arguments, expected):
    code, error = convert(*[argument.format(**files) for argument in arguments])
    assert code == 2 and error.startswith("error: ") and expected in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("part", "changes", "expected"),
    [
        ("image_head", {"classifiers.3.1.bias": None}, "1 missing: model.vision_tower.rqtransformer.classifiers.3"),
        ("image_head", {"classifiers.16.extra": 1}, None),
        ("image_head", {"head_transformer.norm.weight": 1}, "1 unknown: model.vision_tower.rqtransformer.head_transf"),
        ("image_head", {"in_mlp_1.bias": 7}, "in_mlp_1.bias is (7,), expected (24,)"),
        ("image_head", {"pos_emb_d": None}, "1 missing: pos_emb_d"),
        ("write_projector", {"0.bias": None}, "1 missing: model.mm_projector.0.bias"),
        ("write_projector", {"4.weight": 3}, "1 unknown: model.mm_projector.4.weight"),
        ("write_projector", {"2.bias": 3}, "model.mm_projector.2.bias is (3,), expected (32,)"),
    ],
)
def test_mismatched_keys_are_listed(convert, files, part, changes, expected):
    prefix = "model.vision_tower.rqtransformer." if part == "image_head" else "model.mm_projector."
    weights = torch.load(files[part], weights_only=True)
    for name, size in changes.items():
        weights.pop(prefix + name, None)
        if size is not None:
            weights[prefix + name] = torch.zeros(size)
    torch.save(weights, files[part])
    code, error = convert(files[part], "--head_num_heads", "2")
    if expected is None:  # classifiers after the last level may hold anything
        assert code == 0
    else:
        assert code == 2 and error.startswith(f"error: '{files[part]}'") and expected in error


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda c: research_projector(Projector(c.semantic_dim, 40, 4)),
            "output is 40 wide, but the language model is 32",
        ),
        (lambda c: research_projector(Projector(7, WIDTH, 4)), "input is 7 wide, expected either 128"),
        (
            lambda c: research_depth_transformer(
                DepthTransformerHead(DepthTransformerConfig(WIDTH, c.codebook_dim, 9, 4, 64, 1, 1))
            ),
            "codebook_size is 9, but the tokenizer's codebook_size is",
        ),
        (
            lambda c: research_depth_transformer(
                DepthTransformerHead(DepthTransformerConfig(WIDTH, c.codebook_dim, c.codebook_size, 3, 64, 1, 1))
            ),
            "num_levels is 3, but the tokenizer's pixel_depth is 4",
        ),
        (lambda c: {"lm_head.weight": torch.zeros(2, 2)}, "convert a tokenizer with `evotok convert`"),
    ],
)
def test_files_for_another_model_are_rejected(convert, tiny_evotok_folder, tmp_path, make, expected):
    config = EvoTokModel.from_pretrained(tiny_evotok_folder).config
    torch.save(make(config), tmp_path / "file.bin")
    code, error = convert(tmp_path / "file.bin")
    assert code == 2 and expected in error


def test_the_error_for_a_tokenizer_names_the_right_command(
    convert, tiny_evotok_folder, tiny_backbone_folder, files, tmp_path
):
    weights = research_tokenizer(EvoTokModel.from_pretrained(tiny_evotok_folder))
    torch.save({"ema": weights}, tmp_path / "evotok.pt")
    code, error = convert(tmp_path / "evotok.pt")
    assert code == 2 and "convert a tokenizer with `evotok convert`" in error
    code, error = convert(files["read_projector"], vision_tower=tiny_backbone_folder)
    assert code == 2 and "is not an EvoTok tokenizer" in error


class Code:
    """An object whose pickle runs a command when it is loaded unsafely."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_with_code_is_rejected_and_not_run(convert, tmp_path):
    torch.save({"model.mm_projector.0.weight": Code(tmp_path / "ran")}, tmp_path / "mm_projector.bin")
    code, error = convert(tmp_path / "mm_projector.bin")
    assert code == 2 and "is rejected" in error and not (tmp_path / "ran").exists()
