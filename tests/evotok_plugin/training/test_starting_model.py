"""Runs that start from another tokenizer: all of it, its decoders or one of them, and other depths."""

import pytest
import torch
from safetensors.torch import load_file

from evotok_plugin import EvoTokModel
from evotok_plugin.errors import UserError
from evotok_plugin.training.config import TokenizerTrainingConfig
from evotok_plugin.training.teacher import build_siglip
from evotok_plugin.training.trainer import TokenizerTrainer


@pytest.fixture(scope="module")
def teacher_folder(tiny_evotok_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(5)
    config = EvoTokModel.from_pretrained(tiny_evotok_folder).config
    build_siglip(config, vocab_size=100, max_text_length=8).vision_model.save_pretrained(folder)
    return folder


def config(scene_folder, output, start, **options):
    values = dict(
        data=[str(scene_folder / "train")], output_dir=str(output), init_from=str(start), max_steps=4, batch_size=4,
        learning_rate=1e-3, lpips_weight=0, gan_weight=0, semantic_weight=0, kmeans_images=8, augment=False,
        val_fraction=0.1, val_every=4, save_every=2, log_every=1,
    )  # fmt: skip
    return TokenizerTrainingConfig(**values | options)


def changed_parts(before, after):
    return {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(
    ("parts", "with_teacher", "expected"),
    [
        ("all", True, {"encoder", "quantizer", "pixel_decoder", "semantic_decoder"}),
        ("all", False, {"encoder", "quantizer", "pixel_decoder"}),
        ("decoders", True, {"pixel_decoder", "semantic_decoder"}),
        ("pixel_decoder", False, {"pixel_decoder"}),
        ("semantic_decoder", True, {"semantic_decoder"}),
    ],
)
def test_only_the_wanted_parts_change(
    scene_folder, tiny_evotok_folder, teacher_folder, tmp_path, parts, with_teacher, expected
):
    options = {"teacher": str(teacher_folder), "semantic_weight": 1.0} if with_teacher else {}
    TokenizerTrainer.open(config(scene_folder, tmp_path, tiny_evotok_folder, train_parts=parts, **options)).run()
    before = load_file(f"{tiny_evotok_folder}/model.safetensors")
    assert changed_parts(before, load_file(tmp_path / "model.safetensors")) == expected
    start, end = (EvoTokModel.from_pretrained(folder) for folder in (tiny_evotok_folder, tmp_path))
    assert (start.fingerprint() == end.fingerprint()) == (parts != "all")  # the codes of caches stay valid
    # Without a teacher, the semantic decoder fits only codes that have not changed.
    assert end.config.semantic_decoder_trained == (with_teacher or parts != "all")


def test_decoders_learn_other_depths(scene_folder, tiny_evotok_folder, teacher_folder, tmp_path):
    depths = {"pixel_depth": 2, "semantic_depth": 5, "num_quantizers": 6, "patch_size": 16}  # the last as it is
    options = {"train_parts": "decoders", "model": depths, "teacher": str(teacher_folder), "semantic_weight": 1.0}
    TokenizerTrainer.open(config(scene_folder, tmp_path, tiny_evotok_folder, **options)).run()
    start, end = (EvoTokModel.from_pretrained(folder).eval() for folder in (tiny_evotok_folder, tmp_path))
    assert (end.config.pixel_depth, end.config.semantic_depth, end.config.num_quantizers) == (2, 5, 6)
    images = torch.rand(2, 3, 48, 48) * 2 - 1
    with torch.no_grad():
        assert torch.equal(end.encode(images).codes, start.encode(images).codes[..., :6])


def test_a_run_that_starts_from_a_tokenizer_resumes_exactly(scene_folder, tiny_evotok_folder, tmp_path):
    options = {"train_parts": "pixel_decoder"}
    TokenizerTrainer.open(config(scene_folder, tmp_path / "whole", tiny_evotok_folder, **options)).run()
    first = TokenizerTrainer.open(config(scene_folder, tmp_path / "parts", tiny_evotok_folder, **options))
    original = first.save_checkpoint

    def stop():
        original()
        raise KeyboardInterrupt

    first.save_checkpoint = stop
    with pytest.raises(KeyboardInterrupt):
        first.run()
    TokenizerTrainer.open(config(scene_folder, tmp_path / "parts", tiny_evotok_folder, **options)).run()
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": {"codebook_size": 64}}, r"codebook_size 64 is not that of .* \(32\).*only pixel_depth"),
        ({"model": {"num_quantizers": 9}}, "num_quantizers 9 is more than the 8 levels"),
        ({"model": {"widht": 9}}, "EvoTokConfig has no field widht"),
        ({"model": {"pixel_depth": 9}}, "pixel_depth must be in 1..8"),
        ({"train_parts": "encoder"}, "train_parts must be one of all, decoders, pixel_decoder, semantic_decoder"),
        ({"train_parts": "semantic_decoder"}, "needs a target; pass --teacher"),
        ({"train_parts": "pixel_decoder", "teacher": "t", "semantic_weight": 1.0}, "teacher t has no effect"),
        ({"train_parts": "decoders", "init_from": None}, "train_parts decoders needs trained other parts"),
        ({"init_from": "nowhere"}, "'nowhere' (does not exist|is not a folder)"),
    ],
)
def test_what_does_not_fit_is_rejected(scene_folder, tiny_evotok_folder, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        given = dict(options)
        start = given.pop("init_from", tiny_evotok_folder)
        settings = config(scene_folder, tmp_path, start, **given) if start else None
        if settings is None:
            TokenizerTrainingConfig(data=["x"], output_dir="y", semantic_weight=0, **given)
        TokenizerTrainer.open(settings)
    assert not list(tmp_path.glob("*.safetensors"))
