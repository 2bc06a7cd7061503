"""Encoders with a CNN beside a pixel stem: principal components, weights of the teacher, training, cache, limits."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from evotok_plugin.backbone_encoder import BackboneEncoder, build_encoder
from evotok_plugin.cli import main
from evotok_plugin.configuration_evotok import EvoTokConfig
from evotok_plugin.encoder import EvoTokEncoder
from evotok_plugin.errors import UserError
from evotok_plugin.modeling_evotok import EvoTokModel
from evotok_plugin.plugins.vision_tower import EvoTokVisionModel
from evotok_plugin.training.config import TokenizerTrainingConfig
from evotok_plugin.training.feature_cache import FeatureCache
from evotok_plugin.training.trainer import TokenizerTrainer

timm = pytest.importorskip("timm")
NAME, STAGE = "resnet10t", 2  # 128 channels at a stride of 8
FIELDS = {
    "image_size": 32, "patch_size": 8, "decoder_channel_multipliers": (1, 2, 2, 2), "encoder_backbone": NAME,
    "encoder_backbone_stage": STAGE, "codebook_dim": 12, "codebook_size": 16, "num_quantizers": 4, "pixel_depth": 2,
    "semantic_depth": 4, "semantic_dim": 128,
}  # fmt: skip


@pytest.fixture(scope="module")
def config():
    return EvoTokConfig.preset("tiny", **FIELDS)


@pytest.fixture(scope="module")
def images():
    """Smooth random images (24, 3, 32, 32) in [-1, 1]."""
    noise = torch.rand(24, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return F.interpolate(noise, 32, mode="bicubic").clamp(-1, 1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_file(timm.create_model(NAME).state_dict(), file)
    return file


@pytest.fixture(scope="module")
def photos(images, tmp_path_factory):
    """24 images in two folders, which are their labels."""
    folder = tmp_path_factory.mktemp("photos")
    for number, image in enumerate(images):
        place = folder / "ab"[number % 2]
        place.mkdir(exist_ok=True)
        pixels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(place / f"{number:02d}.png")
    return folder


@torch.no_grad()
def test_latents_are_the_principal_components_of_pixels_and_features(config, images):
    torch.manual_seed(1)
    encoder = build_encoder(config)
    assert isinstance(encoder, BackboneEncoder)
    share = 0.6
    encoder.init_from_images(images.split(7), share)
    latents = encoder(images).flatten(0, 1).double().numpy()
    # The naive way: standardize, weight, and decompose the whole matrix.
    pixels = F.unfold(images, 8, stride=8).transpose(1, 2).flatten(0, 1).double().numpy()
    features = encoder.backbone(images).flatten(0, 1).double().numpy()
    pixels = (pixels - pixels.mean(0)) / np.sqrt(pixels.var(0).sum())
    std = features.std(0)
    std[std < 1e-6 * std.max()] = 1  # channels that are 0 everywhere
    features = (features - features.mean(0)) / std * share / np.sqrt(features.shape[1])
    joint = np.concatenate([pixels, features], axis=1)
    left, sizes, _ = np.linalg.svd(joint - joint.mean(0), full_matrices=False)
    expected = (left * sizes)[:, :12]
    expected /= expected.std()
    # Signs of components are arbitrary.
    np.testing.assert_allclose(np.abs(latents), np.abs(expected), atol=2e-3)
    assert abs(latents.var(0).mean() - 1) < 1e-3


@torch.no_grad()
def test_without_a_semantic_share_the_latents_depend_on_pixels_only(config, images):
    encoder = build_encoder(config)
    encoder.init_from_images([images], 0.0)
    assert not encoder.from_features.weight.any()
    with pytest.raises(UserError, match="more than 12 positions of images; raise kmeans_images"):
        encoder.init_from_images([], 0.5)


def test_the_backbone_stays_as_it_is_in_training_mode(config, images):
    model = EvoTokModel(config).train()
    before = {name: value.clone() for name, value in model.encoder.backbone.state_dict().items()}
    model(images).pixels.sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.encoder.backbone.state_dict().items())
    assert all(weight.grad is None for weight in model.encoder.backbone.parameters())
    assert model.encoder.stem.weight.grad is not None and model.encoder.from_features.weight.grad is not None


@torch.no_grad()
def test_a_tokenizer_with_a_backbone_is_saved_and_loaded(config, images, tmp_path):
    model = EvoTokModel(config).eval()
    model.encoder.init_from_images([images], 0.5)
    model.save_pretrained(tmp_path)
    again = EvoTokModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again.encode(images).codes, model.encode(images).codes)
    tower = EvoTokVisionModel.from_pretrained(tmp_path).eval()
    features = model.decode_semantics(model.encode(images).codes)
    torch.testing.assert_close(tower(images).last_hidden_state, features, atol=1e-5, rtol=1e-5)


def training(photos, weights, output, **options):
    values = dict(
        data=[str(photos)], output_dir=str(output), preset="tiny", model=dict(FIELDS), max_steps=4, batch_size=4,
        learning_rate=1e-3, lpips_weight=0, gan_weight=0, semantic_weight=0.1, kmeans_images=24, augment=False,
        val_fraction=0.2, val_every=4, save_every=2, log_every=1, teacher=f"timm:{NAME}:{weights}",
        teacher_layer=str(STAGE), teacher_standardize=True, freeze_encoder=True,
    )  # fmt: skip
    return TokenizerTrainingConfig(**values | options)


def test_training_with_cached_features_equals_training_without(photos, weights, tmp_path):
    TokenizerTrainer.open(training(photos, weights, tmp_path / "plain")).run()
    trainer = TokenizerTrainer.open(training(photos, weights, tmp_path / "cached", feature_cache=True))
    trainer.run()
    assert len(trainer.objective.teacher.remember) > 0 and len(trainer.model.encoder.backbone.remember) > 0
    plain, cached = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "cached"))
    for name, value in plain.items():
        torch.testing.assert_close(cached[name], value, atol=1e-4, rtol=1e-3, msg=name)
    source = load_file(weights)
    network = "encoder.backbone.network."
    copied = [name for name in plain if name.startswith(network)]
    assert copied and all(torch.equal(plain[name], source[name.removeprefix(network)]) for name in copied)


def test_a_frozen_encoder_does_not_move_and_a_trained_one_does(photos, weights, tmp_path):
    for frozen in (True, False):
        trainer = TokenizerTrainer.open(training(photos, weights, tmp_path / str(frozen), freeze_encoder=frozen))
        trainer.objective.teacher.fit_statistics([torch.rand(4, 3, 32, 32) * 2 - 1])
        before = trainer.model.encoder.stem.weight.clone()
        trainer.train_step(torch.rand(4, 3, 32, 32) * 2 - 1)
        trainer._output.close()
        assert torch.equal(trainer.model.encoder.stem.weight, before) == frozen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"teacher": None, "semantic_weight": 0, "teacher_layer": None, "teacher_standardize": False},
            "stay at random",
        ),
        ({"init_encoder": False}, "encoder_backbone resnet10t would stay at random weights"),
        ({"model": {}}, "freeze_encoder needs an encoder with an encoder_backbone"),
        ({"feature_cache": True, "augment": True}, "feature_cache has no effect with augment"),
        (
            {"model": {}, "freeze_encoder": False, "semantic_share": 0.3},
            "semantic_share 0.3 has no effect without encoder_backbone",
        ),
        ({"model": FIELDS | {"encoder_backbone": "resnet18"}}, "starts from a teacher of the same kind, timm:resnet18"),
        ({"model": FIELDS | {"encoder_backbone": "nothing"}}, "timm cannot create 'nothing'"),
        ({"model": FIELDS | {"encoder_backbone_stage": 9}}, "has stages 0 to 4, or from the end -5 to -1; got 9"),
    ],
)
def test_settings_that_do_not_fit_are_rejected(photos, weights, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        TokenizerTrainer.open(training(photos, weights, tmp_path, **options))


def test_the_tower_for_other_hosts_says_that_it_lacks_the_backbone(config):
    with pytest.raises(UserError, match="this tokenizer's encoder is timm's resnet10t"):
        EvoTokEncoder(config)


def test_the_cache_computes_each_image_once_and_keeps_to_its_limit():
    computed = []

    def compute(images):
        computed.append(len(images))
        return [images * 2, images.sum(dim=1)]

    images = torch.arange(12.0).view(4, 3)
    cache = FeatureCache()
    for _ in range(2):
        double, total = cache(images[[0, 1, 0]], compute)
        assert torch.equal(double, images[[0, 1, 0]] * 2) and torch.equal(total, images[[0, 1, 0]].sum(dim=1))
    double, _ = cache(images, compute)
    assert torch.equal(double, images * 2) and computed == [2, 2] and len(cache) == 4
    small = FeatureCache(limit=20)  # one image needs 16 bytes
    for _ in range(2):
        assert torch.equal(small(images, compute)[0], images * 2)
    assert len(small) == 1 and computed == [2, 2, 4, 3]


def test_the_evolve_command_fits_every_depth(photos, weights, tmp_path, capsys):
    teacher = f"timm:{NAME}:{weights}"
    TokenizerTrainer.open(training(photos, weights, tmp_path / "model", max_steps=1, save_every=1)).run()
    given = [
        "evolve",
        str(photos),
        "--model",
        str(tmp_path / "model"),
        "--teacher",
        teacher,
        "--fit",
        "-o",
        str(tmp_path / "out"),
    ]
    assert main(given) == 0
    output = capsys.readouterr().out
    assert "R2 pixels" in output and "R2 teacher" in output and "latents before quantization" in output
    with Image.open(tmp_path / "out/fits.png") as picture:
        assert picture.width > 500
    header = (tmp_path / "out/evolution.csv").read_text().splitlines()[0].split(",")
    assert {"pixel_r2", "teacher_r2", "probe_accuracy"} <= set(header)
    record = json.loads((tmp_path / "model/teacher.json").read_text())
    assert record["layers"] == str(STAGE) and list(record["statistics"]) == ["4"]
