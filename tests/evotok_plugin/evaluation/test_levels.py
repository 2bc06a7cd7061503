"""`evotok evolve`: scores against naive computations, broken images, and the content of strips and plots."""

import copy
import csv
import dataclasses
import json
import runpy
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SiglipVisionConfig, SiglipVisionModel

from evotok_plugin.cli import main
from evotok_plugin.common.pictures import captioned_rows
from evotok_plugin.data.bad_samples import BadSamples
from evotok_plugin.data.sources import open_source
from evotok_plugin.errors import UserError
from evotok_plugin.evaluation import level_plots
from evotok_plugin.evaluation.level_plots import draw_strips, plot_code_usage, plot_curves
from evotok_plugin.evaluation.levels import measure_evolution
from evotok_plugin.teacher import load_teacher
from evotok_plugin.tokenizer_folder import open_tokenizer

LEVELS, PIXEL_DEPTH = 8, 4


def write_teacher(folder, **changes):
    sizes = {
        "hidden_size": 128, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 48, "patch_size": 16,
    } | changes  # fmt: skip
    torch.manual_seed(5)
    SiglipVisionModel(SiglipVisionConfig(**sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def tokenizer(tiny_evotok_folder):
    return open_tokenizer(str(tiny_evotok_folder), "cpu")


@pytest.fixture(scope="module")
def folder(scene_folder):
    return scene_folder / "val" / "images"


@pytest.fixture(scope="module")
def evolution(tokenizer, folder, teacher_folder):
    return measure_evolution(*tokenizer, open_source(folder), load_teacher(str(teacher_folder)), batch_size=4)


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# Scores ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def naive_scores(tokenizer, folder, tower):
    """All scores (images, L), computed for one image and one depth at a time."""
    model, processor = tokenizer
    table = {"psnr": [], "cosine_own": [], "cosine_teacher": []}
    for path in sorted(folder.iterdir()):
        pixel_values = processor(Image.open(path)).pixel_values
        codes = model.encode(pixel_values).codes
        targets = {
            "cosine_own": model.decode_semantics(codes),
            "cosine_teacher": tower(pixel_values, output_hidden_states=True).hidden_states[-2],
        }
        rows = {name: [] for name in table}
        for depth in range(1, LEVELS + 1):
            error = (model.decode_pixels(codes[..., :depth]).clamp(-1, 1) - pixel_values).square().mean().item()
            rows["psnr"].append(10 * np.log10(4 / error))
            features = model.decode_semantics(codes[..., :depth])[0]
            for name, target in targets.items():
                unit = [value / value.norm(dim=1, keepdim=True) for value in (features, target[0])]
                rows[name].append((unit[0] * unit[1]).sum(dim=1).mean().item())
        for name, row in rows.items():
            table[name].append(row)
    return {name: np.array(rows) for name, rows in table.items()}


def test_scores_equal_those_of_single_images(evolution, tokenizer, folder, teacher_folder):
    expected = naive_scores(tokenizer, folder, SiglipVisionModel.from_pretrained(teacher_folder).eval())
    assert evolution.num_images == 6 and evolution.num_codes == 6 * 9
    for name, scores in expected.items():
        curve = getattr(evolution, name)
        np.testing.assert_allclose(curve.mean, scores.mean(axis=0), atol=1e-4, err_msg=name)
        np.testing.assert_allclose(curve.lower, np.quantile(scores, 0.25, axis=0), atol=1e-4, err_msg=name)
        np.testing.assert_allclose(curve.upper, np.quantile(scores, 0.75, axis=0), atol=1e-4, err_msg=name)


def test_the_cosine_with_own_features_is_1_at_the_semantic_depth(evolution):
    assert evolution.cosine_own.mean[-1] == pytest.approx(1, abs=1e-6)
    assert (evolution.cosine_own.mean[:-1] < 1 - 1e-3).all()


def test_code_usage_counts_the_codes_of_all_images(evolution, tokenizer, folder):
    model, processor = tokenizer
    with torch.no_grad():
        codes = model.encode(processor([Image.open(path) for path in sorted(folder.iterdir())]).pixel_values).codes
    for level in range(LEVELS):
        share = np.bincount(codes[..., level].flatten(), minlength=32) / (6 * 9)
        assert evolution.code_usage[level] == pytest.approx((share > 0).mean())
        entropy = -sum(p * np.log(p) for p in share if p)
        assert evolution.perplexity[level] == pytest.approx(np.exp(entropy))


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_the_batch_size_does_not_matter(evolution, tokenizer, folder, batch_size):
    other = measure_evolution(*tokenizer, open_source(folder), batch_size=batch_size)
    np.testing.assert_allclose(other.psnr.mean, evolution.psnr.mean, atol=1e-4)
    np.testing.assert_allclose(other.cosine_own.mean, evolution.cosine_own.mean, atol=1e-5)
    assert other.code_usage == evolution.code_usage and other.cosine_teacher is None
    assert [strip.name for strip in other.strips] == [strip.name for strip in evolution.strips]


def test_strips_contain_the_first_images_at_every_depth(evolution, tokenizer, folder):
    model, processor = tokenizer
    paths = sorted(folder.iterdir())[:4]
    assert [strip.name for strip in evolution.strips] == [path.name for path in paths]
    for path, strip in zip(paths, evolution.strips, strict=True):
        pixel_values = processor(Image.open(path)).pixel_values
        with torch.no_grad():
            codes = model.encode(pixel_values).codes
            rebuilt = torch.cat([model.decode_pixels(codes[..., :depth]) for depth in range(1, LEVELS + 1)])
        assert torch.equal(strip.original, pixel_values[0])
        torch.testing.assert_close(strip.rebuilt, rebuilt, atol=1e-4, rtol=1e-4)


def test_max_images_selects_evenly_spread_images(tokenizer, folder):
    some = measure_evolution(*tokenizer, open_source(folder), max_images=2)
    names = sorted(path.name for path in folder.iterdir())
    assert some.num_images == 2 and [strip.name for strip in some.strips] == [names[0], names[-1]]


def test_a_model_in_training_mode_is_rejected_unchanged(tokenizer, folder):
    model, processor = tokenizer
    before = model.quantizer.codebooks.clone()
    try:
        with pytest.raises(ValueError, match="training mode .* call model.eval()"):
            measure_evolution(model.train(), processor, open_source(folder))
    finally:
        model.eval()
    assert torch.equal(model.quantizer.codebooks, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, r"expected its width \(semantic_dim\) to be 128, got 64"),
        ({"hidden_size": 256}, r"expected its width \(semantic_dim\) to be 128, got 256"),
    ],
)
def test_a_teacher_with_other_features_is_rejected(tokenizer, folder, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        measure_evolution(*tokenizer, open_source(folder), load_teacher(str(write_teacher(tmp_path, **changes))))


@pytest.mark.parametrize("changes", [{"patch_size": 12}, {"image_size": 64}])
def test_teachers_with_other_patches_or_positions_are_compared_at_the_tokenizer_s_positions(
    tokenizer, folder, tmp_path, changes
):
    teacher = load_teacher(str(write_teacher(tmp_path, **changes)))
    evolution = measure_evolution(*tokenizer, open_source(folder), teacher)
    assert evolution.cosine_teacher is not None and -1 <= evolution.constant_teacher <= 1


def test_a_teacher_can_have_a_margin_of_unused_pixels(tokenizer, folder, tmp_path, evolution):
    odd = load_teacher(str(write_teacher(tmp_path, image_size=55)))  # 3 x 16 + 7, so also 3 x 3 positions
    curve = measure_evolution(*tokenizer, open_source(folder), odd).cosine_teacher
    np.testing.assert_allclose(curve.mean, evolution.cosine_teacher.mean, atol=1e-5)


# Broken images -----------------------------------------------------------------------------------------------


@pytest.fixture
def partly_broken(folder, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for path in folder.iterdir():
        (images / path.name).write_bytes(path.read_bytes())
    (images / "00_broken.png").write_bytes(b"nothing")
    return images


def test_broken_images_are_reported_and_skipped(capsys, partly_broken, tiny_evotok_folder, tmp_path, evolution):
    out = tmp_path / "out"
    code, text, _ = run(
        capsys,
        "evolve",
        partly_broken,
        "-o",
        out,
        "--model",
        tiny_evotok_folder,
        "--max_bad_fraction",
        "0.2",
    )
    assert code == 0 and "6 images" in text and "left out: 00_broken.png" in text
    assert json.loads((out / "bad_images.jsonl").read_text())["sample"] == "00_broken.png"
    scores = [float(row["psnr"]) for row in csv.DictReader((out / "evolution.csv").open())]
    np.testing.assert_allclose(scores, evolution.psnr.mean, atol=1e-4)


def test_too_many_broken_images_stop_the_run(capsys, partly_broken, tiny_evotok_folder, tmp_path):
    out = tmp_path / "out"
    code, _, error = run(capsys, "evolve", partly_broken, "-o", out, "--model", tiny_evotok_folder)
    assert code == 2 and "1 of 7 samples are unusable" in error and "00_broken.png" in error
    assert [path.name for path in out.iterdir()] == ["bad_images.jsonl"]


def test_a_source_of_broken_images_is_rejected(tokenizer, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match="none of the 1 images of .* can be read"):
        measure_evolution(*tokenizer, open_source(tmp_path), bad=BadSamples(None, limit=1.0))


# The command -------------------------------------------------------------------------------------------------


def test_all_files_are_written_and_consistent(capsys, folder, tiny_evotok_folder, teacher_folder, tmp_path, evolution):
    code, text, _ = run(
        capsys, "evolve", folder, "-o", tmp_path, "--model", tiny_evotok_folder, "--teacher", teacher_folder
    )
    assert code == 0
    rows = list(csv.DictReader((tmp_path / "evolution.csv").open()))
    assert list(rows[0])[:2] == ["depth", "psnr"] and set(rows[0]) == set(evolution.columns())
    for name, values in evolution.columns().items():
        np.testing.assert_allclose([float(row[name]) for row in rows], values, atol=1e-4, err_msg=name)
    for row, line in zip(rows, text.splitlines()[2:], strict=False):
        assert line.split()[:2] == [row["depth"], f"{float(row['psnr']):.2f}"]
    written = [tmp_path / name for name in ("evolution.png", "curves.png", "code_usage.png", "evolution.csv")]
    assert text.splitlines()[-4:] == [str(path) for path in written]
    for path in written[:3]:
        assert np.array(Image.open(path)).std() > 1


def test_size_changes_the_image_size(capsys, folder, tiny_evotok_folder, tmp_path):
    arguments = ["evolve", folder, "-o", tmp_path, "--model", tiny_evotok_folder, "--size", 96, "--strips", 2]
    code, text, _ = run(capsys, *arguments)
    assert code == 0 and "6 images of 96x96 pixels" in text
    picture = Image.open(tmp_path / "evolution.png")
    assert picture.width == 9 * 100 - 4 and 2 * 96 < picture.height < 3 * 96


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.png"], "'absent.png' does not exist"),
        (["{folder}", "--teacher", "absent"], "teacher 'absent' cannot be loaded"),
        (["{folder}", "--size", "50"], "--size must be a multiple of the patch size 16, got 50"),
        (["{folder}", "--max_images", "0"], "max_images must be at least 1, got 0"),
    ],
)
def test_user_errors_are_one_line(capsys, folder, teacher_folder, tiny_evotok_folder, tmp_path, arguments, message):
    arguments = [argument.format(folder=folder, teacher=teacher_folder) for argument in arguments]
    code, _, error = run(capsys, "evolve", *arguments, "-o", tmp_path / "out", "--model", tiny_evotok_folder)
    assert code == 2 and error.strip().splitlines()[-1].startswith("error: ") and message in error
    assert not (tmp_path / "out" / "evolution.csv").exists()


def test_without_matplotlib_the_command_says_what_to_install(capsys, folder, tiny_evotok_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, error = run(capsys, "evolve", folder, "-o", tmp_path, "--model", tiny_evotok_folder)
    assert code == 2 and "pip install matplotlib" in error and not any(tmp_path.iterdir())


def test_the_module_of_the_plots_can_be_imported_without_matplotlib(monkeypatch):
    for name in ["matplotlib", *(name for name in sys.modules if name.startswith("matplotlib."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        runpy.run_path(level_plots.__file__)["check_plotting"]()


# Pictures ----------------------------------------------------------------------------------------------------


def test_the_strip_shows_the_pixels_as_they_are(evolution):
    picture = np.array(draw_strips(evolution))
    assert picture.shape[1] == 9 * 100 - 4
    top = next(y for y in range(picture.shape[0]) if (picture[y, :96] != picture[0, 0]).any(axis=-1).all())
    for column, pixels in enumerate((evolution.strips[0].original, *evolution.strips[0].rebuilt)):
        shown = picture[top : top + 96, column * 100 : column * 100 + 96][::2, ::2]
        expected = ((pixels.clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(shown, expected)


def test_captions_are_below_their_images():
    rows = [[Image.new("RGB", (100, 60), color) for color in ("#ff0000", "#00ff00")]] * 2
    blank = np.array(captioned_rows(rows, [["", ""]] * 2, ["", ""]))
    written = np.array(captioned_rows(rows, [["", ""], ["", "caption"]], ["", "b"]))
    images = np.flatnonzero((blank[:, 50] == (255, 0, 0)).all(axis=-1))  # rows of pixels that cross an image
    assert len(images) == 2 * 60
    heights, columns = np.nonzero((blank != written).any(axis=-1))
    assert not set(heights) & set(images) and columns.min() > 104
    assert set(np.digitize(heights, images)) == {0, 120}  # above the first row and under the last


def test_marks_are_above_the_headings():
    rows = [[Image.new("RGB", (100, 60))] * 2]
    pictures = [np.array(captioned_rows(rows, [["", ""]], ["a", "b"], mark)) for mark in ({1: "here"}, None)]
    extra = pictures[0].shape[0] - pictures[1].shape[0]
    assert (pictures[0][:extra, 104:] != 255).any() and (pictures[0][:extra, :104] == 255).all()
    assert (pictures[0][extra:, :104] == pictures[1][:, :104]).all()


@pytest.fixture(scope="module")
def axes(evolution):
    return plot_curves(evolution).axes


def test_the_curves_of_the_plot_equal_the_scores(axes, evolution):
    for axis, curve in zip(axes, (evolution.psnr, evolution.cosine_teacher), strict=True):
        line = axis.get_lines()[0]
        np.testing.assert_array_equal(line.get_xdata(), list(range(1, LEVELS + 1)))
        np.testing.assert_array_equal(line.get_ydata(), curve.mean)
        low, high = axis.get_ylim()
        assert low < curve.lower.min() and curve.upper.max() < high
    assert "PSNR" in axes[0].get_ylabel() and "cosine" in axes[1].get_ylabel() and "depth" in axes[0].get_xlabel()


def test_the_curves_of_the_plot_do_not_cross(axes, evolution):
    heights = [
        (np.concatenate([curve.lower, curve.upper]) - axis.get_ylim()[0]) / np.diff(axis.get_ylim())
        for axis, curve in zip(axes, (evolution.psnr, evolution.cosine_teacher), strict=True)
    ]
    assert heights[0].min() > 0.5 > heights[1].max()


def test_the_plot_marks_both_depths(axes):
    marks = [line.get_xdata()[0] for line in axes[0].get_lines() if len(line.get_xdata()) == 2]
    assert marks == [PIXEL_DEPTH, LEVELS]
    assert [text.get_text() for text in axes[0].texts] == ["pixel depth 4", "semantic depth 8"]


def luminance(color):
    """Relative luminance of WCAG 2."""
    from matplotlib.colors import to_rgb

    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return float(np.dot([0.2126, 0.7152, 0.0722], parts))


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_curves_of_the_plot_are_readable_on_its_background(evolution, dark):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    figure = plot_curves(evolution, dark)
    FigureCanvasAgg(figure).draw()  # creates the tick labels
    background = luminance(figure.get_facecolor())
    assert (background < 0.05) == dark
    assert {luminance(axes.get_facecolor()) for axes in figure.axes} == {background}
    shown = {text.get_text(): text.get_color() for text in figure.findobj(Text) if text.get_text().strip()}
    assert {"depth: levels summed", "PSNR (left)", "pixel depth 4", "1"} <= shown.keys()
    lines = {f"line {line.get_label()}": line.get_color() for axes in figure.axes for line in axes.get_lines()}
    for name, color in (shown | lines).items():
        low, high = sorted((luminance(color), background))
        needed = 3 if name.startswith("line") else 4.5 if dark else 3.5  # the curve's vermilion on white has 3.9
        assert (high + 0.05) / (low + 0.05) > needed, name


def test_without_a_teacher_the_legend_names_the_own_features(tokenizer, folder):
    figure = plot_curves(measure_evolution(*tokenizer, open_source(folder)))
    (legend,) = figure.legends
    assert "cosine to the features of all levels (right)" in [text.get_text() for text in legend.get_texts()]


def test_the_usage_plot_shows_usage_and_perplexity(evolution):
    shares, perplexities = plot_code_usage(evolution).axes
    assert [bar.get_height() for bar in shares.patches] == pytest.approx([100 * u for u in evolution.code_usage])
    assert [bar.get_height() for bar in perplexities.patches] == pytest.approx(evolution.perplexity)


def test_the_usage_plot_shows_the_values_of_uniform_draws(tokenizer, folder):
    """M draws miss each of K codes with probability (1 - 1 / K) ** M."""
    one = measure_evolution(*tokenizer, open_source(sorted(folder.iterdir())[0]))
    many = dataclasses.replace(one, num_codes=100_000)
    for evolution, share in ((one, 1 - (31 / 32) ** 9), (many, 1.0)):
        shares, perplexities = plot_code_usage(evolution).axes
        drawn = shares.get_lines()[0].get_ydata()[0]
        assert drawn == pytest.approx(100 * share, abs=100 * 2 / 32)
        assert perplexities.get_lines()[0].get_ydata()[0] <= drawn / 100 * 32
    assert perplexities.get_lines()[0].get_ydata()[0] == pytest.approx(32, abs=0.1)


def test_without_a_trained_semantic_decoder_only_pixels_are_scored(
    capsys, caplog, folder, tiny_evotok_folder, teacher_folder, tmp_path
):
    model = shutil.copytree(tiny_evotok_folder, tmp_path / "model")
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"semantic_decoder_trained": False}))
    arguments = ["evolve", str(folder), "-o", str(tmp_path / "out"), "--model", str(model)]
    assert main(arguments) == 0
    assert "no semantic curve: the semantic decoder was not trained" in capsys.readouterr().out
    assert main([*arguments, "--teacher", str(teacher_folder)]) == 0
    assert f"--teacher {teacher_folder} is not used" in capsys.readouterr().out
    header = (tmp_path / "out" / "evolution.csv").read_text().splitlines()[0]
    assert "psnr" in header and "cosine" not in header
    command = ["evaluate", str(folder), "--model", str(model), "--num_workers", "0", "--teacher", str(teacher_folder)]
    assert main(command) == 0
    assert "not measured: cosine; the semantic decoder was not trained" in caplog.text
    table, _, missing = capsys.readouterr().out.partition("Not measured:")
    assert "cosine" not in table and "* cosine: the semantic decoder was not trained" in missing
    assert main([*command, "--metrics", "cosine"]) == 2
    assert "semantic decoder of this tokenizer was not trained" in capsys.readouterr().err


def test_the_plot_of_an_untrained_semantic_decoder_shows_only_pixels(evolution):
    config = copy.deepcopy(evolution.config)
    config.semantic_decoder_trained = False
    (axes,) = plot_curves(dataclasses.replace(evolution, config=config, cosine_own=None, cosine_teacher=None)).axes
    texts = [text.get_text() for text in axes.texts]
    assert any("pixel depth" in text for text in texts) and not any("semantic" in text for text in texts)
