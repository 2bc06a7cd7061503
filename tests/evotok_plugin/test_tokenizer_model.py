import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

import evotok_plugin
from evotok_plugin import EvoTokConfig, EvoTokImageProcessor, EvoTokModel


@pytest.fixture(scope="module")
def model(tiny_evotok_folder):
    return EvoTokModel.from_pretrained(tiny_evotok_folder).eval()


@pytest.fixture(scope="module")
def pixel_values():
    torch.manual_seed(0)
    return torch.rand(3, 3, 48, 48) * 2 - 1


@torch.no_grad()
def test_the_path_of_an_image(model, pixel_values):
    output, encoded = model(pixel_values), model.encode(pixel_values)
    assert encoded.latents.shape == (3, 9, 16) and encoded.codes.shape == (3, 9, 8)
    assert torch.equal(output.codes, encoded.codes)
    assert torch.equal(model.encode(pixel_values, depth=4).codes, encoded.codes[..., :4])
    torch.testing.assert_close(model.decode_pixels(encoded.codes[..., :4]), output.pixels, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.decode_semantics(encoded.codes), output.features, atol=1e-4, rtol=1e-4)
    assert output.pixels.shape == pixel_values.shape and output.features.shape == (3, 9, 128)
    torch.testing.assert_close(
        model.level_latents(encoded.codes).sum(2), model.codes_to_latents(encoded.codes), atol=1e-5, rtol=1e-5
    )


def test_every_parameter_learns(pixel_values):
    model = EvoTokModel(EvoTokConfig.preset("tiny")).train()
    output = model(pixel_values)
    (output.pixels.square().mean() + output.features.square().mean() + output.commitment_loss).backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert dead == []


def test_save_and_load_are_bitwise(model, pixel_values, tmp_path):
    model.save_pretrained(tmp_path)
    EvoTokImageProcessor(size=48).save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    settings = [{k: v for k, v in m.config.to_dict().items() if k != "_name_or_path"} for m in (model, loaded)]
    assert isinstance(loaded, EvoTokModel) and settings[0] == settings[1]
    for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    with torch.no_grad():
        assert torch.equal(model.encode(pixel_values).codes, loaded.encode(pixel_values).codes)
    assert AutoImageProcessor.from_pretrained(tmp_path).size == 48


def test_fingerprint_tells_tokenizers_apart(model):
    other = EvoTokModel(model.config)
    other.load_state_dict(model.state_dict())
    assert other.fingerprint() == model.fingerprint()
    other.quantizer.codebooks[3, 5, 2] += 1e-3
    assert other.fingerprint() != model.fingerprint()


def test_wrong_shapes_are_explained(model):
    with pytest.raises(ValueError, match=r"multiples of the patch size \d+, got \(1, 3, 50, 48\)"):
        model.encode(torch.zeros(1, 3, 50, 48))
    with pytest.raises(ValueError, match="1 <= l <= 8"):
        model.decode_pixels(torch.zeros(1, 9, 9, dtype=torch.long))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 50}, "not a multiple of patch_size"),
        ({"decoder_channel_multipliers": (1, 2)}, "log2"),
        ({"pixel_depth": 9}, "pixel_depth must lie in 1..8"),
        ({"codebook_size": 70000}, "at most 65536"),
        ({"encoder_num_heads": 5}, "not a multiple of 5 heads"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        EvoTokConfig.preset("tiny", **changes)


def test_presets_are_values_of_one_configuration():
    paper = EvoTokConfig.preset("paper")
    assert (paper.num_positions, paper.codebook_size, paper.num_quantizers, paper.pixel_depth) == (256, 32768, 16, 4)
    assert EvoTokConfig.preset("base").encoder_hidden_size == 768
    with pytest.raises(ValueError, match="unknown preset 'huge'; expected one of tiny, base, paper"):
        EvoTokConfig.preset("huge")
    with pytest.raises(ValueError, match="no field image_sise; it has image_size"):
        EvoTokConfig.preset("tiny", image_sise=64)


def test_every_config_field_is_read():
    source = Path(evotok_plugin.__file__).parent
    own = ast.parse((source / "configuration_evotok.py").read_text())
    cls = next(node for node in own.body if isinstance(node, ast.ClassDef))
    fields = {node.target.id for node in cls.body if isinstance(node, ast.AnnAssign)}
    read = {
        node.attr
        for path in source.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    assert fields - read == set()


@pytest.mark.parametrize("decode", ["decode_pixels", "decode_semantics"])
@pytest.mark.parametrize("code", [-1, 10**6])
def test_codes_out_of_range_are_refused(tiny_evotok_folder, decode, code):
    model = EvoTokModel.from_pretrained(tiny_evotok_folder)
    codes = torch.zeros(1, model.config.num_positions, 4, dtype=torch.long)
    codes[0, 3, 1] = code
    with pytest.raises(ValueError, match="expected codes from 0 to .*another tokenizer's"):
        getattr(model, decode)(codes)


def test_image_processor_round_trip_and_crop(rng):
    processor = EvoTokImageProcessor(size=16)
    picture = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    pixel_values = processor(picture).pixel_values
    assert pixel_values.shape == (1, 3, 16, 16) and pixel_values.abs().max() <= 1
    np.testing.assert_array_equal(np.array(processor.to_pil(pixel_values)[0]), np.array(picture))
    assert processor([picture.resize((40, 20)), picture.convert("L")]).pixel_values.shape == (2, 3, 16, 16)
    tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    torch.testing.assert_close(processor(tensor).pixel_values, pixel_values)


@pytest.mark.parametrize("thing", ["a.png", np.zeros((4, 4)), torch.zeros(4, 3, 3), []])
def test_what_is_no_image_is_refused(thing):
    with pytest.raises(ValueError, match="expected"):
        EvoTokImageProcessor(size=16)(thing)
