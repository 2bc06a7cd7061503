"""Teachers of every family: features as in the original library, layers, sizes, statistics, initial encoders."""

import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from evotok_plugin.configuration_evotok import EvoTokConfig
from evotok_plugin.encoder import EvoTokEncoder
from evotok_plugin.errors import UserError
from evotok_plugin.metrics.cosine import ConstantBaseline
from evotok_plugin.teacher import RECORD, TeacherSettings, load_recorded_teacher, load_teacher, teacher_features
from evotok_plugin.teachers.initial_encoder import init_encoder, required_settings
from evotok_plugin.teachers.layers import TeacherLayers
from evotok_plugin.training.output import fingerprint_of

SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
MLP = {"intermediate_size": 48}
# model class, configuration, and the number of tokens before the positions
FAMILIES = {
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", SMALL | MLP, 0),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", SMALL | MLP, 1),
    "vit": ("ViTModel", "ViTConfig", SMALL | MLP, 1),
    "dinov2": ("Dinov2Model", "Dinov2Config", SMALL | {"mlp_ratio": 2, "layerscale_value": 0.7}, 1),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", SMALL | {"mlp_ratio": 2}, 5),
    "dinov3_vit": ("DINOv3ViTModel", "DINOv3ViTConfig", SMALL | MLP | {"num_register_tokens": 3}, 4),
}
TOKENIZER = {"image_size": 32, "patch_size": 8, "decoder_channel_multipliers": (1, 2, 4, 8), "semantic_dim": 32}


def randomized(model: nn.Module) -> nn.Module:
    """No parameter is left at a constant that hides an error, such as a layer scale of 1 or a class token of 0."""
    torch.manual_seed(0)
    for weight in model.parameters():
        weight.data = weight.data + 0.05 * torch.randn_like(weight)
    return model.eval()


def build(family: str) -> nn.Module:
    model_class, config_class, values, _ = FAMILIES[family]
    return randomized(getattr(transformers, model_class)(getattr(transformers, config_class)(**values)))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """Name, folder and original model of a family; the folder has an image processor of its own."""
    model, folder = build(request.param), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.25, 0.3],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return request.param, str(folder), model


@pytest.fixture(scope="module")
def pixel_values():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def as_expected(pixel_values, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3)):
    mean, std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    return ((pixel_values + 1) / 2 - mean) / std


@torch.no_grad()
def test_features_are_those_of_transformers_without_special_tokens(family, pixel_values):
    name, folder, model = family
    states = model(as_expected(pixel_values), output_hidden_states=True).hidden_states
    special = FAMILIES[name][3]
    for layer in (0, 1, -2):
        teacher = load_teacher(folder, TeacherSettings(layers=str(layer)))
        teacher.fit_to(EvoTokConfig.preset("tiny", **TOKENIZER))
        torch.testing.assert_close(teacher(pixel_values), states[layer][:, special:], atol=1e-5, rtol=1e-5)
    default, summed = load_teacher(folder), load_teacher(folder, TeacherSettings(layers="-2+1"))
    torch.testing.assert_close(teacher_features(default, pixel_values), states[-2][:, special:], atol=1e-5, rtol=1e-5)
    expected = (states[-2] + states[1])[:, special:]
    torch.testing.assert_close(teacher_features(summed, pixel_values), expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_the_last_layer_is_taken_before_the_final_norm(family, pixel_values):
    name, folder, model = family
    states = model(as_expected(pixel_values), output_hidden_states=True)
    features = load_teacher(folder, TeacherSettings(layers="-1"))(pixel_values)
    norm = {"siglip": "post_layernorm", "clip": None, "vit": "layernorm", "dinov3_vit": "norm"}.get(name, "layernorm")
    last = states.last_hidden_state[:, FAMILIES[name][3] :]
    torch.testing.assert_close(model.get_submodule(norm)(features) if norm else features, last, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_teacher_sees_larger_images_if_its_patches_are_larger(family, pixel_values):
    name, folder, model = family
    teacher = load_teacher(folder)
    # 16x16 pixels in patches of 4: 4x4 positions, for which the teacher needs 32x32 pixels.
    teacher.fit_to(
        EvoTokConfig.preset(
            "tiny", **TOKENIZER | {"image_size": 16, "patch_size": 4, "decoder_channel_multipliers": (1, 2, 4)}
        )
    )
    small = F.interpolate(pixel_values, 16, mode="area")
    enlarged = F.interpolate(small, 32, mode="bicubic", antialias=True).clamp(-1, 1)
    expected = model(as_expected(enlarged), output_hidden_states=True).hidden_states[-2][:, FAMILIES[name][3] :]
    torch.testing.assert_close(teacher(small), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_position_embeddings_are_interpolated_for_other_grids(family):
    name, folder, model = family
    teacher = load_teacher(folder)
    teacher.fit_to(EvoTokConfig.preset("tiny", **TOKENIZER | {"image_size": 48}))
    pixel_values = torch.rand(1, 3, 48, 48) * 2 - 1
    options = {"interpolate_pos_encoding": True} if name in ("siglip", "clip", "vit") else {}
    states = model(as_expected(pixel_values), output_hidden_states=True, **options).hidden_states
    torch.testing.assert_close(teacher(pixel_values), states[-2][:, FAMILIES[name][3] :], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_encoder_starts_as_the_teacher_or_says_why_it_cannot(family, pixel_values):
    name, folder, model = family
    tower = load_teacher(folder).tower
    if name == "dinov3_vit":
        with pytest.raises(UserError, match="cannot start from dinov3_vit, only from SigLIP, CLIP, ViT and DINOv2"):
            required_settings(tower)
        return
    config = EvoTokConfig.preset("tiny", **TOKENIZER | required_settings(tower) | {"encoder_num_layers": 3})
    encoder = EvoTokEncoder(config)
    init_encoder(encoder, config, tower)
    states = model(as_expected(pixel_values), output_hidden_states=True).hidden_states
    torch.testing.assert_close(encoder.features(pixel_values), states[3][:, FAMILIES[name][3] :], atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="encoder_hidden_size 128, expected 32.*--model '{.*encoder_hidden_size: 32"):
        init_encoder(encoder, EvoTokConfig.preset("tiny"), tower)
    with pytest.raises(UserError, match="trained with 16 positions, the tokenizer has 36"):
        larger = EvoTokConfig.preset(
            "tiny", **TOKENIZER | required_settings(tower) | {"image_size": 48, "encoder_num_layers": 3}
        )
        init_encoder(EvoTokEncoder(larger), larger, tower)


@torch.no_grad()
def test_siglip2_naflex(tmp_path, pixel_values):
    values = {key: value for key, value in (SMALL | MLP).items() if key != "image_size"} | {"num_patches": 16}
    model = randomized(transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**values)))
    model.save_pretrained(tmp_path)
    processor = transformers.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16, do_resize=False)
    # The original library's processor takes images in 0..255.
    images = [((one + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy() for one in pixel_values]
    inputs = processor(images, return_tensors="pt")
    expected = model(**inputs, output_hidden_states=True).hidden_states
    rounded = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in images]) / 127.5 - 1
    features = teacher_features(load_teacher(str(tmp_path)), rounded)
    torch.testing.assert_close(features, expected[-2], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "layer", "size"), [("resnet10t", -1, 128), ("resnet10t", -2, 64), ("vit_tiny_patch16_224", -2, 64)]
)
def test_timm_networks(tmp_path, name, layer, size, pixel_values):
    timm = pytest.importorskip("timm")
    network = randomized(timm.create_model(name))
    file = tmp_path / "weights.safetensors"
    save_file(network.state_dict(), file)
    width = network.feature_info[layer]["num_chs"]
    teacher = load_teacher(f"timm:{name}:{file}", TeacherSettings(layers=str(layer)))
    teacher.fit_to(EvoTokConfig.preset("tiny", **TOKENIZER | {"semantic_dim": width}))
    pixels = F.interpolate(pixel_values, size, mode="bicubic", antialias=True).clamp(-1, 1)
    pixels = as_expected(pixels, network.pretrained_cfg["mean"], network.pretrained_cfg["std"])
    if name.startswith("vit"):
        network = timm.create_model(name, dynamic_img_size=True).eval()
        network.load_state_dict(load_file(file))
    maps = network.forward_intermediates(pixels, intermediates_only=True)
    expected = maps[layer].flatten(2).transpose(1, 2)
    torch.testing.assert_close(teacher(pixel_values), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_layers_at_several_depths_are_averaged_to_the_positions(tmp_path, pixel_values):
    timm = pytest.importorskip("timm")
    network = randomized(timm.create_model("resnet10t"))
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    spec = f"timm:resnet10t:{tmp_path / 'weights.safetensors'}"
    teacher = load_teacher(spec, TeacherSettings(layers="2:-3, 8:-1"))
    width = network.feature_info[-1]["num_chs"]
    teacher.fit_to(EvoTokConfig.preset("tiny", **TOKENIZER | {"semantic_dim": width}))
    assert teacher.extra_depths == {2: network.feature_info[-3]["num_chs"]}
    targets = teacher.targets(pixel_values)
    pixels = as_expected(
        F.interpolate(pixel_values, 128, mode="bicubic", antialias=True).clamp(-1, 1), *normalization(network)
    )
    maps = network.forward_intermediates(pixels, intermediates_only=True)
    assert list(targets) == [2, 8]
    for depth, expected in ((2, F.avg_pool2d(maps[-3], 4)), (8, maps[-1])):
        torch.testing.assert_close(targets[depth], expected.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)


def normalization(network):
    return network.pretrained_cfg["mean"], network.pretrained_cfg["std"]


@torch.no_grad()
def test_standardized_features_and_their_record(family, tmp_path):
    _, folder, _ = family
    images = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    teacher = load_teacher(folder, TeacherSettings(layers="-3", standardize=True))
    teacher.fit_to(EvoTokConfig.preset("tiny", **TOKENIZER))
    with pytest.raises(UserError, match="means and standard deviations are not known"):
        teacher(images)
    teacher.fit_statistics(images.split(7))
    features = teacher(images).flatten(0, 1)
    torch.testing.assert_close(features.mean(0), torch.zeros(32), atol=1e-4, rtol=0)
    torch.testing.assert_close(features.std(0, unbiased=False), torch.ones(32), atol=1e-3, rtol=0)
    teacher.record(tmp_path)
    again = load_recorded_teacher(folder, tmp_path)
    again.fit_to(EvoTokConfig.preset("tiny", **TOKENIZER))
    assert torch.equal(again(images), teacher(images))
    (tmp_path / RECORD).write_text('{"layers": "-3", "size": null}')
    with pytest.raises(UserError, match="teacher.json is damaged"):
        load_recorded_teacher(folder, tmp_path)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("-2", {16: (-2,)}),
        ("-2+ -6", {16: (-2, -6)}),
        ("16:-2,4:6", {4: (6,), 16: (-2,)}),
        ("4:1+2,16:-1", {4: (1, 2), 16: (-1,)}),
    ],
)
def test_layers_by_depth(text, layers):
    found = TeacherLayers.parse(text).at(semantic_depth=16, num_quantizers=16)
    assert found == layers and list(found)[-1] == 16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("last", "expected a layer such as -2"),
        ("", "expected a layer such as -2"),
        ("4:1,4:2", "expected a layer such as -2"),
        ("1,2", "expected a layer such as -2"),
        ("4:1", "none for semantic_depth 16"),
        ("17:1,16:2", "depth 17 does not exist; the tokenizer has 16 levels"),
    ],
)
def test_malformed_layers_are_rejected(text, message):
    with pytest.raises(UserError, match=message):
        TeacherLayers.parse(text).at(semantic_depth=16, num_quantizers=16)


def test_what_does_not_fit_is_rejected(family, tmp_path):
    _, folder, _ = family
    with pytest.raises(UserError, match="has layers 0 to 4, counted from the end -5 to -1; got 5"):
        load_teacher(folder, TeacherSettings(layers="5"))
    with pytest.raises(UserError, match=r"expected 4x4 positions, got 6x6 .* set teacher_size to 32"):
        load_teacher(folder, TeacherSettings(size=48)).fit_to(EvoTokConfig.preset("tiny", **TOKENIZER))
    with pytest.raises(UserError, match="expected its width \\(semantic_dim\\) to be 128, got 32"):
        load_teacher(folder).fit_to(EvoTokConfig.preset("tiny", **TOKENIZER | {"semantic_dim": 128}))


def test_damaged_teachers_are_rejected(family, tmp_path):
    _, folder, model = family
    state = {name: value for name, value in model.state_dict().items() if "fc1" not in name and "up_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=dict(state))
    with pytest.raises(UserError, match="cannot be loaded.*(missing|lacks)"):
        load_teacher(str(tmp_path))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("timm:no_such_network", "timm cannot create 'no_such_network'"),
        ("timm:resnet10t:missing.safetensors", "missing.safetensors does not exist"),
        ("timm:resnet10t:weights.pth", "expected weights in a safetensors file"),
    ],
)
def test_wrong_timm_specs_are_rejected(spec, message):
    pytest.importorskip("timm")
    with pytest.raises(UserError, match=message):
        load_teacher(spec)


def test_the_baseline_of_a_constant():
    features = torch.randn(100, 4, 8, generator=torch.Generator().manual_seed(3)) + 2
    baseline = ConstantBaseline()
    for part in features.split(33):
        baseline.update(part)
    mean = features.flatten(0, 1).mean(0)
    assert baseline.result() == pytest.approx(float(F.cosine_similarity(features, mean, dim=-1).mean()), abs=1e-6)
    with pytest.raises(ValueError, match="no vectors"):
        ConstantBaseline().result()


def test_the_identity_of_a_teacher_ignores_unused_weights(tmp_path):
    model = build("siglip")
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(("head.", "post_"))}
    model.save_pretrained(tmp_path, state_dict=dict(state))  # the head is random whenever the teacher is loaded
    first, second = (fingerprint_of(load_teacher(str(tmp_path))) for _ in range(2))
    assert first == second
    state["encoder.layers.0.mlp.fc1.bias"] = state["encoder.layers.0.mlp.fc1.bias"] + 1
    model.save_pretrained(tmp_path, state_dict=dict(state))
    assert fingerprint_of(load_teacher(str(tmp_path))) != first
