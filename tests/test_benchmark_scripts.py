"""The parts of the benchmark scripts that compute figures."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from evotok_plugin.scenes.captions import prompt_record
from evotok_plugin.scenes.scene import Scene, place, render, sample_scene

FOLDER = Path(__file__).resolve().parents[1] / "scripts" / "benchmark"


@pytest.fixture
def script(monkeypatch):
    """`script(name)` returns the names that a script defines."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return lambda name: runpy.run_path(str(FOLDER / f"{name}.py"))


def test_a_detected_scene_has_the_objects_of_the_rendered_one(script, rng):
    detected_scene = script("drawn_scenes")["detected_scene"]
    for _ in range(20):
        scene = sample_scene(rng, "counting")
        found = detected_scene(render(scene))
        assert sorted((i.kind, i.cell) for i in found.objects) == sorted((i.kind, i.cell) for i in scene.objects)
        assert all(0.22 < item.size < 0.34 for item in found.objects)
    assert detected_scene(render(Scene(()))) is None


def test_questions_of_dialogues_have_the_wanted_kind(script, rng):
    dialogues = script("dialogues")
    scene = sample_scene(rng, "position")
    for kind, categories in dialogues["KINDS"].items():
        question = dialogues["question_about"](scene, kind, rng)
        assert question.category in categories and question.answer in dialogues["ANSWERS"]
    same = Scene(tuple(place(rng, "ring", "red", cell) for cell in (0, 4)))
    assert dialogues["question_about"](same, "color", rng) is None
    five = Scene(tuple(place(rng, "ring", "red", cell) for cell in range(5)))
    assert dialogues["question_about"](five, "number", rng) is None


def test_entropy_is_summed_over_variables(script):
    entropy = script("diversity")["entropy"]
    measured = entropy([{"cell": [k % 4], "color": ["red"], "size": [k % 2]} for k in range(8)])
    assert measured.plain == pytest.approx(2 + 0 + 1)
    assert measured.corrected == pytest.approx(3 + (3 + 1) / (2 * 8 * np.log(2)))


@pytest.mark.parametrize(
    ("skill", "names"),
    [
        ("single_object", {"cell 0", "size 0", "color 0"}),
        ("colors", {"cell 0", "size 0"}),
        ("color_attr", {"cell 0", "size 0", "cell 1", "size 1", "relation"}),
        ("position", {"cell 0", "size 0", "color 0", "cell 1", "size 1", "color 1"}),
    ],
)
def test_variables_are_what_a_prompt_leaves_open(script, rng, skill, names):
    open_variables = script("diversity")["open_variables"]
    scene = sample_scene(rng, skill)
    record = prompt_record(scene, skill)
    assert set(open_variables(scene, record)) == names
    extra = Scene((*scene.objects, scene.objects[0]))
    assert open_variables(extra, record) is None


def test_the_summary_of_seeds_has_a_row_per_figure(script):
    seeds = script("quickstart_seeds")
    runs = [seeds["figures"]({"psnr": value, "drawing": {"overall": value / 2, "note": "x"}}) for value in (1, 2, 3)]
    assert seeds["summary"](runs) == [
        ["psnr", "3", "2.000", "1.000", "1.000", "3.000"],
        ["drawing/overall", "3", "1.000", "0.500", "0.500", "1.500"],
    ]
    assert seeds["summary"](runs[:1])[0][3] == "-"


def test_only_finished_runs_of_the_same_kind_are_skipped(script, tmp_path):
    is_finished = script("quickstart_seeds")["is_finished"]
    assert not is_finished(tmp_path, fast=False)
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "run.json").write_text('{"fast": false, "seconds": {}, "finished": true}')
    assert is_finished(tmp_path, fast=False) and not is_finished(tmp_path, fast=True)


def test_the_evolution_is_trained_measured_and_plotted(script, tmp_path, monkeypatch, capsys, rng):
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    save_file(timm.create_model("tf_efficientnet_lite0").state_dict(), tmp_path / "weights.safetensors")
    for number in range(12):
        place_of = tmp_path / "photos" / "ab"[number % 2]
        place_of.mkdir(parents=True, exist_ok=True)
        render(sample_scene(rng, "position"), 64).save(place_of / f"{number}.png")
    photos, weights = str(tmp_path / "photos"), tmp_path / "weights.safetensors"
    command = ["evolution.py", "--train", photos, "--eval", photos, "-o", str(tmp_path / "out"), "--max_steps", "1"]
    command += ["--teacher", f"timm:tf_efficientnet_lite0:{weights}", "--seeds", "0", "--variants", "recipe", "pixels"]
    command += ["--json", str(tmp_path / "stored.json")]
    monkeypatch.setattr("sys.argv", command)
    main = script("evolution")["main"]
    assert main() == 0
    output = capsys.readouterr().out
    assert "| R2 of the pixels | depth 1 | depth 2 |" in output and output.count("| pixels |") == 5
    results = json.loads((tmp_path / "out/evolution.json").read_text())
    assert len(results["recipe"][0]["probe_accuracy"]) == 16
    stored = json.loads((tmp_path / "stored.json").read_text())
    assert "evolution-pixel_r2" in stored["tables"] and len(stored["tables"]) == 5
    assert "--teacher timm:tf_efficientnet_lite0:weights.safetensors" in stored["command"]
    assert str(tmp_path) not in json.dumps(stored)
    written = (tmp_path / "out/recipe_seed0/model.safetensors").stat().st_mtime_ns
    assert main() == 0  # only reads the finished runs
    assert (tmp_path / "out/recipe_seed0/model.safetensors").stat().st_mtime_ns == written


def test_the_table_of_seeds_is_made_from_finished_runs(script, tmp_path, monkeypatch, capsys):
    for seed in (0, 1):
        folder = tmp_path / f"seed_{seed}"
        folder.mkdir()
        task = {"overall": 0.9 + seed / 100, "chance": 0.25, "color": 1.0} | ({"shape": 0.5} if seed else {})
        results = {"reconstruction": {"psnr": 30.0 + seed}, "mmbench_scenes": task}
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "reinforce").mkdir()
        logged = [{"step": 0, "heldout/reward": 0.5}, {"step": 1, "loss": 2.0}, {"step": 50, "heldout/reward": 0.75}]
        lines = [json.dumps(one) for one in logged[: 3 if seed else 2]]
        (folder / "reinforce/metrics.jsonl").write_text("\n".join(lines))
        (folder / "run.json").write_text('{"fast": false, "seconds": {}, "finished": true}')
    out = tmp_path / "seeds.json"
    monkeypatch.setattr("sys.argv", ["x", "--seeds", "0", "1", "-o", str(tmp_path), "--json", str(out)])
    assert script("quickstart_seeds")["main"]() == 0
    assert "| reconstruction/psnr | 2 | 30.500 | 0.707 | 30.000 | 31.000 |" in capsys.readouterr().out
    tables = json.loads(out.read_text())["tables"]
    assert tables["quickstart"]["rows"] == [
        ["`mmbench_scenes`, accuracy (chance 0.250)", "0.905 ± 0.007", "0.900 to 0.910"],
        ["- color", "1.000 ± 0.000", "1.000 to 1.000"],
        ["PSNR of reconstructions, dB", "30.50 ± 0.71", "30.00 to 31.00"],
    ]
    assert tables["quickstart-heldout"] == {
        "header": ["step", "0", "50"],
        "rows": [["seed 0", "0.500", ""], ["seed 1", "0.500", "0.750"]],
    }


def run_quantizers(script, monkeypatch, *flags):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("sys.argv", ["quantizers.py", "--max_steps", "2", *flags])
    return script("quantizers")["main"]()


def test_quantizers_are_compared_on_embedded_scenes(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--seeds", "0", "--variants", "fsq", "-o", "out", "--json", "stored.json"]
    assert run_quantizers(script, monkeypatch, *flags) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows[0].startswith("| quantizer | bits | PSNR, dB | SSIM | pixels, depth 1 |") and "teacher" not in rows[0]
    assert [row.split(" | ")[:2] for row in rows[2:]] == [["| fsq", "40"]]
    stored = json.loads((tmp_path / "stored.json").read_text())
    assert [f"| {' | '.join(row)} |" for row in stored["tables"]["quantizers-scenes"]["rows"]] == rows[2:]
    assert stored["machine"]["threads"] == "1" and stored["results"]["fsq"][0]["settings"] == {"quantizer": "fsq"}
    report = json.loads((tmp_path / "out/quantizers.json").read_text())
    assert report["machine"] == stored["machine"] and report["runs"].keys() == {"fsq"}
    (run,) = report["runs"]["fsq"]
    assert run["settings"]["model"] == {"quantizer": "fsq"} and len(run["depths"]["probe_accuracy"]) == 8
    assert f"{run['metrics']['psnr']:.2f}" in rows[2]
    written = (tmp_path / "out/fsq_seed0/model.safetensors").stat().st_mtime_ns
    assert run_quantizers(script, monkeypatch, *flags) == 0  # only reads the finished runs
    assert (tmp_path / "out/fsq_seed0/model.safetensors").stat().st_mtime_ns == written
    assert run_quantizers(script, monkeypatch, *flags, "--codebook_size", "64") == 2
    assert "holds a run with other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--train", "photos"], "belong together"), (["--teacher", "timm:x"], "no effect on embedded")],
)
def test_flags_of_the_comparison_that_do_not_fit(script, monkeypatch, tmp_path, capsys, flags, message):
    assert run_quantizers(script, monkeypatch, *flags, "-o", str(tmp_path)) == 2
    assert message in capsys.readouterr().err
