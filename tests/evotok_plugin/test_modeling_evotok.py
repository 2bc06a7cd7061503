"""The tokenizer on the path of an image, its configuration and its image processor."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModel

import evotok_plugin
from evotok_plugin import EvoTokConfig, EvoTokImageProcessor, EvoTokModel
from evotok_plugin.errors import UserError


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


def test_the_fingerprint_identifies_a_tokenizer(model):
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
        ({"pixel_depth": 9}, "pixel_depth must be in 1..8"),
        ({"codebook_size": 70000}, "at most 65536"),
        ({"encoder_num_heads": 5}, "not a multiple of 5 heads"),
    ],
)
def test_impossible_sizes_are_rejected(changes, message):
    with pytest.raises(UserError, match=message):
        EvoTokConfig.preset("tiny", **changes)


def test_presets_are_values_of_one_configuration():
    paper = EvoTokConfig.preset("paper")
    assert (paper.num_positions, paper.codebook_size, paper.num_quantizers, paper.pixel_depth) == (256, 32768, 16, 4)
    assert EvoTokConfig.preset("base").encoder_hidden_size == 768
    with pytest.raises(UserError, match="unknown preset 'huge'; expected one of tiny, base, paper"):
        EvoTokConfig.preset("huge")
    with pytest.raises(UserError, match="no field image_sise; it has image_size"):
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
def test_codes_out_of_range_are_rejected(tiny_evotok_folder, decode, code):
    model = EvoTokModel.from_pretrained(tiny_evotok_folder)
    codes = torch.zeros(1, model.config.num_positions, 4, dtype=torch.long)
    codes[0, 3, 1] = code
    with pytest.raises(UserError, match="expected codes from 0 to .*another tokenizer's"):
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


@pytest.mark.parametrize(
    "thing", [None, 3, np.zeros((8, 8, 2)), torch.zeros(5, 5, 5), torch.zeros(1, 1, 3, 4, 4), [], [[]]]
)
def test_inputs_that_are_not_images_are_rejected(thing):
    with pytest.raises(UserError, match="expected"):
        EvoTokImageProcessor(size=16)(thing)


def test_image_processor_accepts_all_kinds_of_images(tmp_path, rng):
    processor = EvoTokImageProcessor(size=16)
    array = rng.integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)
    pictures = [Image.fromarray(one) for one in array]
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    files = [tmp_path / f"{number}.png" for number in range(3)]
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
    expected = processor(pictures).pixel_values
    for images in (
        tuple(pictures),
        [pictures[:1], pictures[1:]],
        [[pictures[:2]], [pictures[2:]]],
        files,
        list(map(str, files)),
        [file.read_bytes() for file in files],
        array,
        list(array),
        tensor,
        list(tensor),
        [tensor[:2], array[2]],
        tensor / 255,
    ):
        assert torch.equal(processor(images).pixel_values, expected)
    with pytest.raises(UserError, match="gone.png' does not exist"):
        processor(tmp_path / "gone.png")
    with pytest.raises(UserError, match="URLs are not fetched"):
        processor("https://example.com/a.png")


def test_a_uint8_tensor_of_medium_gray_is_gray():
    values = EvoTokImageProcessor(size=48)(torch.full((3, 48, 48), 128, dtype=torch.uint8)).pixel_values
    assert float(values.mean()) == pytest.approx(128 / 127.5 - 1, abs=1e-6)


def test_image_processor_keywords_are_honored():
    processor, picture = EvoTokImageProcessor(size=16), Image.new("RGB", (30, 20), (255, 51, 0))
    for size in (24, {"height": 24, "width": 24}, {"shortest_edge": 24}):
        assert processor(picture, size=size).pixel_values.shape == (1, 3, 24, 24)
    assert processor.size == 16
    assert processor(picture, do_resize=False).pixel_values.shape == (1, 3, 20, 30)
    seen = lambda **keywords: processor(picture, **keywords).pixel_values[0, :, 0, 0].tolist()  # noqa: E731
    assert seen() == pytest.approx([1, -0.6, -1])
    assert seen(do_normalize=False) == pytest.approx([1, 0.2, 0])
    assert seen(do_normalize=False, do_rescale=False) == [255, 51, 0]
    floats = np.asarray(picture) / 255
    assert processor(floats, do_rescale=False).pixel_values[0, :, 0, 0].tolist() == pytest.approx([1, -0.6, -1])
    assert processor(picture, return_tensors="np").pixel_values.dtype == np.float32
    different = processor([picture, picture.rotate(90, expand=True)], return_tensors=None, do_resize=False)
    assert [tuple(values.shape) for values in different.pixel_values] == [(3, 20, 30), (3, 30, 20)]
    first = np.zeros((3, 16, 3), np.uint8)
    first[0] = 255
    assert seen(do_convert_rgb=True, do_pad=False, image_mean=(0.5, 0.5, 0.5)) == seen()
    red = processor(first, input_data_format="channels_first").pixel_values[0, :, 8, 8]
    assert red.tolist() == [1, -1, -1]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"nonsense": 1}, "has no setting 'nonsense'; it has size, do_resize"),
        ({"do_pad": True}, "does not support do_pad=True"),
        ({"image_mean": [0.48, 0.46, 0.41]}, "does not support image_mean"),
        ({"crop_size": 20}, "does not support crop_size"),
        ({"size": 0}, "size must be a positive number"),
        ({"size": {"height": 8, "width": 16}}, "size must be a positive number"),
        ({"size": {"longest_edge": 16}}, "size must be a positive number"),
        ({"do_rescale": False}, "do_rescale=False"),
        ({"do_resize": False}, "images of one size"),
        ({"input_data_format": "last"}, "input_data_format"),
    ],
)
def test_image_processor_keywords_are_never_ignored(keywords, message):
    pictures = [Image.new("RGB", (30, 20)), Image.new("RGB", (20, 30))]
    with pytest.raises(UserError, match=message):
        EvoTokImageProcessor(size=16)(pictures, **keywords)


def test_image_processor_settings_are_saved_and_checked(tmp_path):
    EvoTokImageProcessor(size=16).save_pretrained(tmp_path)
    assert EvoTokImageProcessor.from_pretrained(tmp_path).do_normalize is True
    changed = EvoTokImageProcessor.from_pretrained(tmp_path, size=24, do_normalize=False)
    changed.save_pretrained(tmp_path / "changed")
    again = EvoTokImageProcessor.from_pretrained(tmp_path / "changed")
    assert again.size == 24 and again(Image.new("RGB", (9, 9))).pixel_values.min() == 0
    with pytest.raises(UserError, match="'nonsense'"):
        EvoTokImageProcessor(size=16, nonsense=1)


@pytest.mark.parametrize("factor", [2, 3, 6, 11])
def test_an_exact_enlargement_is_reduced_exactly(factor, rng):
    processor = EvoTokImageProcessor(size=16)
    pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    large = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
    assert torch.equal(processor(Image.fromarray(large)).pixel_values, processor(Image.fromarray(pixels)).pixel_values)
    for row, column in ((0, 1), (-1, -1)):  # any other picture is filtered
        other = large.copy()
        other[row, column] ^= 255
        bicubic = ImageOps.fit(Image.fromarray(other), (16, 16), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(np.asarray(processor.crop(Image.fromarray(other))), np.asarray(bicubic))


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1), (30_000, 5)])
def test_extreme_aspect_ratios_are_cropped_before_resizing(size):
    picture = Image.new("RGB", size, (10, 20, 30))
    values = EvoTokImageProcessor(size=16)(picture).pixel_values
    assert values.shape == (1, 3, 16, 16) and torch.equal(values, values[..., :1, :1].expand_as(values))
