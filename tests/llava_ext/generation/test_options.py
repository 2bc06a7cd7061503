"""Image generation settings in generation_config.json: saved with every model and used wherever images are drawn."""

import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig

from evotok_plugin import SamplingOptions
from evotok_plugin.errors import UserError
from llava_ext import EvoTokLlavaForConditionalGeneration
from llava_ext.export.portable import export_model
from llava_ext.generation import AnswerOptions, DrawingOptions
from llava_ext.generation.events import ImageDrawn
from llava_ext.model_folder import load_model

OWN = {
    "guidance_scale": 1.5, "guidance_schedule": "linear", "guidance_interval": [0.0, 0.75], "guidance_rescale": 0.5,
    "temperature": [0.2, 0.4, 0.6, 0.8], "top_k": 7, "top_p": 0.9, "min_p": 0.05,
}  # fmt: skip
GUIDANCE = {"guidance_interval": (0.0, 0.75), "guidance_rescale": 0.5}
AS_OPTIONS = DrawingOptions(1.5, "linear", "", SamplingOptions((0.2, 0.4, 0.6, 0.8), 7, 0.9, 0.05), **GUIDANCE)
LIBRARY = {
    "guidance_scale": 3.0, "guidance_schedule": "constant", "guidance_interval": [0.0, 1.0], "guidance_rescale": 0.0,
    "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0,
}  # fmt: skip
LIBRARY_SETTINGS = {**LIBRARY, "guidance_interval": (0.0, 1.0), "negative_prompt": ""}


def settings_in(folder):
    return json.loads((folder / "generation_config.json").read_text()).get("image_generation")


def rewrite(folder, **entries):
    path = folder / "generation_config.json"
    values = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


@pytest.fixture
def own_folder(model_folder, tmp_path):
    """A model folder with its own settings."""
    folder = tmp_path / "own"
    shutil.copytree(model_folder, folder)
    rewrite(folder, image_generation=OWN)
    return folder


def codes_of(model, processor, options=None, **settings):
    return list(model.draw_codes(["a ring"], processor, [3], options, **settings))[-1]


def test_settings_are_saved_with_every_model_and_kept(model_folder, own_folder, tmp_path):
    assert settings_in(model_folder) == LIBRARY  # assembled and saved
    model, processor = load_model(own_folder)
    model.save_pretrained(tmp_path / "saved")
    export_model(own_folder, tmp_path / "exported")
    assert settings_in(tmp_path / "saved") == settings_in(tmp_path / "exported") == OWN
    assert "temperature (0.2, 0.4, 0.6, 0.8)" in (tmp_path / "exported/README.md").read_text()
    assert DrawingOptions().for_model(model) == AS_OPTIONS


def test_models_without_settings_use_the_documented_defaults(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "old")
    rewrite(tmp_path / "old", image_generation=None)
    model, processor = load_model(tmp_path / "old")
    assert DrawingOptions().for_model(model).settings() == LIBRARY_SETTINGS
    assert torch.equal(codes_of(model, processor), codes_of(model, processor, DrawingOptions(3.0, "constant", "")))
    rewrite(tmp_path / "old", image_generation={"guidance_scale": 2})
    model, _ = load_model(tmp_path / "old")
    assert DrawingOptions().for_model(model).settings() == {**LIBRARY_SETTINGS, "guidance_scale": 2.0}


def test_settings_that_a_file_leaves_out_are_off(own_folder):
    """Files of earlier versions have neither an interval nor a rescale of guidance."""
    older = {name: value for name, value in OWN.items() if name not in GUIDANCE}
    rewrite(own_folder, image_generation=older)
    settings = DrawingOptions().for_model(load_model(own_folder)[0]).settings()
    assert (settings["guidance_interval"], settings["guidance_rescale"]) == ((0.0, 1.0), 0.0)


def test_settings_are_read_from_files_marked_as_from_a_model_config(own_folder):
    """transformers drops unknown entries of such files, which older model folders have."""
    rewrite(own_folder, _from_model_config=True)
    assert DrawingOptions().for_model(load_model(own_folder)[0]) == AS_OPTIONS


def test_every_way_to_draw_uses_the_models_own_settings(own_folder, tiny_mllm):
    (model, processor), (other, _) = load_model(own_folder), tiny_mllm
    model.eval()
    expected = codes_of(other, processor, AS_OPTIONS)
    assert not torch.equal(expected, codes_of(other, processor))
    assert torch.equal(codes_of(model, processor), expected)
    assert torch.equal(codes_of(model, processor, DrawingOptions(top_k=7)), expected)
    inputs = processor.user_turns("a ring")
    answers = {
        "stream": next(
            event.codes[None]
            for event in model.stream(inputs, processor, AnswerOptions(image_first=True), seed=3)
            if isinstance(event, ImageDrawn)
        ),
        "explicit": next(
            event.codes[None]
            for event in other.stream(inputs, processor, AnswerOptions(image_first=True, drawing=AS_OPTIONS), seed=3)
            if isinstance(event, ImageDrawn)
        ),
    }
    assert torch.equal(answers["stream"], expected) and torch.equal(answers["explicit"], expected)
    ids = model.generate(**inputs, modalities="image", processor=processor, seed=3)
    config = GenerationConfig(image_generation=OWN)
    passed = other.generate(**inputs, modalities="image", processor=processor, seed=3, generation_config=config)
    residual = processor.vocabulary.to_ids(expected).flatten().tolist()
    for sequence in (ids, passed):
        assert sequence[0][processor.vocabulary.is_residual(sequence[0])].tolist() == residual
    image = model.generate_images("a ring", processor, seed=3)[0]
    assert image.tobytes() == processor.image_processor.to_pil(model.vision_tower.decode_pixels(expected))[0].tobytes()


def test_explicit_values_take_precedence_even_if_they_are_defaults(own_folder):
    model, processor = load_model(own_folder)
    model.eval()
    plain = SamplingOptions()
    for given, options in (
        ({"guidance_scale": 3.0}, replace(AS_OPTIONS, guidance_scale=3.0)),
        ({"guidance_schedule": "constant"}, replace(AS_OPTIONS, guidance_schedule="constant")),
        ({"guidance_interval": (0, 1)}, replace(AS_OPTIONS, guidance_interval=(0, 1))),
        ({"guidance_rescale": 0}, replace(AS_OPTIONS, guidance_rescale=0)),
        ({"temperature": 1.0}, replace(AS_OPTIONS, sampling=SamplingOptions(1.0, 7, 0.9, 0.05))),
        (
            {"top_k": 0, "top_p": 1.0},
            replace(AS_OPTIONS, sampling=SamplingOptions(OWN["temperature"], 0, 1, 0.05)),
        ),
        ({"sampling": plain, "negative_prompt": None}, replace(AS_OPTIONS, sampling=plain)),
    ):
        assert DrawingOptions(**given).for_model(model) == options
    (drawn,) = model.generate_images("a ring", processor, temperature=0, guidance_scale=1.0, negative_prompt=None)
    options = DrawingOptions(guidance_scale=1.0, temperature=0, negative_prompt="")
    (codes,) = list(model.draw_codes(["a ring"], processor, [0], options))[-1:]
    assert drawn.tobytes() == processor.image_processor.to_pil(model.vision_tower.decode_pixels(codes))[0].tobytes()


def test_settings_of_text_are_independent(own_folder):
    """Text is sampled with transformers' settings, independently of the settings of drawing."""
    model, processor = load_model(own_folder)
    inputs, settings = processor.user_turns("a ring"), {"do_sample": True, "max_new_tokens": 5}
    model.generation_config.temperature = 1e-6
    greedy = model.generate(**inputs, do_sample=False, max_new_tokens=5)
    assert torch.equal(model.generate(**inputs, **settings), greedy)
    assert torch.equal(model.generate(**inputs, **settings, temperature=5.0, top_k=1), greedy)
    assert DrawingOptions().for_model(model) == AS_OPTIONS


def test_settings_of_guidance_are_reported_where_guidance_is_off(own_folder):
    model, _ = load_model(own_folder)
    with pytest.warns(UserWarning, match="guidance_interval, negative_prompt without effect: guidance_scale is 1"):
        DrawingOptions(1, guidance_interval=(0, 0.5), negative_prompt="a square").for_model(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DrawingOptions(1, guidance_interval=(0, 0.75), guidance_schedule="linear").for_model(model)  # the model's own
        DrawingOptions(1, negative_prompt="").for_model(model)
        DrawingOptions(2, guidance_interval=(0, 0.5), negative_prompt="a square").for_model(model)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_p": 2}, "expected 0 < top_p <= 1, got top_p=2"),
        ({"temperatur": 1}, "unknown setting 'temperatur'; did you mean 'temperature'"),
        ({"temperature": "hot"}, "expected one number or one per level, got temperature='hot'"),
        ({"temperature": [1.0, 0.5]}, "temperature has 2 values, but 4 levels are drawn"),
        ({"top_k": True}, "top_k=True"),
        ({"guidance_scale": "3"}, "guidance_scale must be at least 1"),
        ({"guidance_scale": [3.0, 1.0]}, "guidance_scale has 2 values, but 4 levels are drawn"),
        ({"guidance_scale": []}, "guidance_scale must be at least 1"),
        ({"guidance_schedule": "steep"}, "guidance_schedule: expected constant, linear, cosine"),
        ({"guidance_interval": [0.5, 0.5]}, "guidance_interval: expected two fractions of the positions"),
        ({"guidance_interval": [0, 1.5]}, "guidance_interval: .*0 <= start < end <= 1, got .*1.5"),
        ({"guidance_interval": 0.5}, "guidance_interval: .*got 0.5"),
        ({"guidance_rescale": -0.1}, "guidance_rescale must be from 0 to 1, got -0.1"),
        ({"guidance_rescale": "off"}, "guidance_rescale must be from 0 to 1, got 'off'"),
        ({"min_p": None}, "min_p has no value"),
        ("fast", "expected a mapping"),
        ([], "expected a mapping"),
    ],
)
def test_invalid_settings_in_a_file_are_reported(own_folder, values, message):
    rewrite(own_folder, image_generation=values)
    with pytest.raises(UserError, match="generation_config.json: .*" + message):
        load_model(own_folder)
    with pytest.raises(UserError, match=message):
        EvoTokLlavaForConditionalGeneration.from_pretrained(own_folder)


def test_a_model_is_saved_despite_questionable_settings_of_its_backbone(
    tiny_backbone_folder, tiny_evotok_folder, tmp_path
):
    """Many published folders have a temperature without do_sample; transformers saves it only if nothing changed."""
    from llava_ext.assembly import assemble

    shutil.copytree(tiny_backbone_folder, tmp_path / "backbone")
    rewrite(tmp_path / "backbone", temperature=0.7, top_p=0.6, _from_model_config=None)
    model, _ = assemble(tmp_path / "backbone", tiny_evotok_folder, 32, 2, 2)
    model.save_pretrained(tmp_path / "model")
    saved = json.loads((tmp_path / "model/generation_config.json").read_text())
    assert saved["temperature"] == 0.7 and saved["image_generation"] == LIBRARY
    model.generation_config.temperature = 0.8
    with pytest.raises(UserError, match="generation settings of the model cannot be saved: .*temperature"):
        model.save_pretrained(tmp_path / "changed")


def test_commands_use_the_models_settings_as_defaults(own_folder, tmp_path, capsys):
    from llava_ext.cli import main

    folder = str(own_folder)
    assert main(["draw", "a ring", "--model", folder, "-o", str(tmp_path / "plain")]) == 0
    assert (
        main(["draw", "a ring", "--model", folder, "-o", str(tmp_path / "some"), "--top_p", "1", "--top_k", "0"]) == 0
    )
    plain, some = (
        json.loads(Image.open(next((tmp_path / name).glob("*.png"))).text["settings"]) for name in ("plain", "some")
    )
    assert plain == {**OWN, "negative_prompt": ""}
    assert some == {**plain, "top_p": 1.0, "top_k": 0}


def test_commands_take_every_setting_of_guidance(own_folder, tmp_path):
    from llava_ext.cli import main

    given = ["--guidance_scale", "3,2,1,1", "--guidance_interval", "0,0.5", "--guidance_rescale", "0.25"]
    assert main(["draw", "a ring", "--model", str(own_folder), "-o", str(tmp_path), *given]) == 0
    settings = json.loads(Image.open(next(tmp_path.glob("*.png"))).text["settings"])
    expected = {"guidance_scale": [3.0, 2.0, 1.0, 1.0], "guidance_interval": [0.0, 0.5], "guidance_rescale": 0.25}
    assert settings == {**OWN, **expected, "negative_prompt": ""}
