"""Every benchmark at its smallest size: it ends, compares what it should, and writes its tables."""

import json
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[3] / "scripts" / "benchmark"
# By benchmark: the flags of its smallest run, and the names of its tables.
SMALLEST = {
    "best_of": ("--prompts_per_skill 1", ["best-of"]),
    "dialogues": ("--dialogues 4", ["dialogues"]),
    "diversity": ("--skills colors --prompts 1 --images 4", ["diversity"]),
    "encoding": ("--sizes tiny --num_images 6 --batch_size 2 --rounds 1 --workers 1", ["encoding", "encoding-parts"]),
    "evaluation_time": (
        "--llms --prompts 2 --batch_size 3 --best_of 2 --rounds 1 --clock cpu",
        ["evaluation-time", "evaluation-run"],
    ),
    "finetuning": (
        "--scenes 27 --steps 1 --rounds 1 --threads 1 --clock cpu",
        ["finetuning", "finetuning-parts"],
    ),
    "generation": ("--head tiny --backbone tiny --batch 1 --positions 2 --rounds 1 --threads 1", ["drawing"]),
    "guidance": ("--num_prompts 1 -n 1", ["guidance"]),
    "guidance_cost": ("--models tiny included --batch 1 --rounds 1 --threads 1", ["guidance-cost"]),
    "linear_layers": ("--shapes 256x512 256x1024 --rows 1 4 --rounds 1 --threads 1", ["linear-layers"]),
    "out_of_domain": ("--count 2", ["out-of-domain"]),
    "quantizer": (
        "--images 1 2 --positions 16 --levels 2 --codebook_size 2048 --dim 8 --rounds 1 --peer_rounds 0",
        ["quantizer"],
    ),
    "scene_tasks": ("--limit 4", ["scene-tasks"]),
    "serving": ("--clients 1 --seconds 4 --rounds 1", ["serving"]),
    "start_up": ("--rounds 1", ["start-up"]),
    "text": ("--models included --batch 1 --tokens 20 --rounds 1 --threads 1", ["text"]),
    "speculation": (
        "--windows 4 --prompts_per_skill 1 --backbones tiny --head tiny --rounds 1 --threads 1",
        ["speculation", "speculation-cost"],
    ),
    "tokenizer_step": ("--recipes tiny --batch_size 2 --steps 1", ["tokenizer-step"]),
    "train_throughput": ("--sizes tiny --samples 6 --rounds 1 --threads 1 --clock cpu", ["train-throughput"]),
}
# Benchmarks that run in other tests.
ELSEWHERE = {
    "evolution": "tests/test_benchmark_scripts.py",
    "memory": "tests/scripts/benchmark/test_memory.py",
    "quantizers": "tests/test_benchmark_scripts.py",
    "quickstart_seeds": "tests/test_benchmark_scripts.py",
}


@pytest.fixture
def main(monkeypatch):
    """`main(name, flags)` runs a benchmark in this process; returns its exit code."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def run(name, flags):
        monkeypatch.setattr("sys.argv", [str(FOLDER / f"{name}.py"), *flags])
        return runpy.run_path(str(FOLDER / f"{name}.py"))["main"]()

    return run


def test_every_benchmark_is_tested():
    root = FOLDER.parents[1]
    for script in FOLDER.glob("*.py"):
        if "def main(" not in script.read_text():
            continue
        own = root / "tests" / "scripts" / "benchmark" / f"test_{script.stem}.py"
        file = root / ELSEWHERE[script.stem] if script.stem in ELSEWHERE else own
        assert script.stem in SMALLEST or file.is_file(), f"no test runs {script.name}"


@pytest.mark.parametrize("name", SMALLEST)
def test_a_benchmark_runs_and_writes_its_tables(main, name, tmp_path, capsys):
    flags, tables = SMALLEST[name]
    if name == "serving":
        pytest.importorskip("fastapi")
    assert main(name, [*flags.split(), "--json", str(tmp_path / "out.json")]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert list(result["tables"]) == tables and result["machine"]["device"] and result["machine"]["torch"]
    assert result["command"] == f"python scripts/benchmark/{name}.py {flags}"
    for table in result["tables"].values():
        assert table["rows"] and all(len(row) == len(table["header"]) for row in table["rows"])
    output = capsys.readouterr().out
    assert name == "quantizer" or name == "train_throughput" or "| ---" in output


def test_other_codes_fail_the_benchmark_of_the_search(main, monkeypatch, capsys):
    from evotok_plugin import code_search

    monkeypatch.setattr(
        code_search, "_search_float64", lambda vectors, codebook: vectors.new_zeros(len(vectors)).long()
    )
    flags = "--images 1 --positions 8 --levels 1 --codebook_size 64 --dim 4 --rounds 1 --peer_rounds 0"
    assert main("quantizer", flags.split()) == 1
    assert "0 of" not in capsys.readouterr().out


def test_other_tokens_fail_the_benchmark_of_text(main, monkeypatch, tmp_path):
    from llava_ext import EvoTokLlavaForConditionalGeneration as Model

    generate = Model.generate
    monkeypatch.setattr(Model, "generate", lambda self, *inputs, **flags: generate(self, *inputs, **flags) + 1)
    flags = "--models included --batch 1 --tokens 2 --rounds 1 --json"
    assert main("text", [*flags.split(), str(tmp_path / "out.json")]) == 1
    assert json.loads((tmp_path / "out.json").read_text())["results"][0]["same_tokens"] is False


def test_other_products_fail_the_benchmark_of_linear_layers(main, monkeypatch):
    from evotok_plugin.kernels.thin_linear import ThinLinear

    forward = ThinLinear.forward
    monkeypatch.setattr(ThinLinear, "forward", lambda self, x: forward(self, x) + 0.1)
    assert main("linear_layers", "--shapes 256x1024 --rows 4 --rounds 1".split()) == 1


def test_other_codes_fail_the_benchmark_of_speculation(main, monkeypatch, capsys):
    from llava_ext.generation.speculative_steps import SpeculativeSteps

    codes = SpeculativeSteps.__iter__
    monkeypatch.setattr(SpeculativeSteps, "__iter__", lambda self: (one + 1 for one in codes(self)))
    assert main("speculation", "--windows 2 --prompts_per_skill 1 --rounds 1 --backbones".split()) == 1
    assert "| 0 of 6 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("positions", "window", "share"), [(1, 4, 0), (1.5, 2, 0.5), (1.75, 3, 0.5), (2, 2, 1), (2.1, 2, None)]
)
def test_the_share_of_right_drafts_solves_the_geometric_sum(monkeypatch, positions, window, share):
    monkeypatch.syspath_prepend(str(FOLDER))
    needed_share = runpy.run_path(str(FOLDER / "speculation.py"))["needed_share"]
    assert needed_share(positions, window) == (None if share is None else pytest.approx(share))


def test_a_model_in_the_shape_of_another_llm_draws(monkeypatch, tmp_path):
    from llava_ext.model_folder import INCLUDED_MODEL, open_model

    monkeypatch.syspath_prepend(str(FOLDER))
    found = runpy.run_path(str(FOLDER / "evaluation_time.py"))
    small = {"model_type": "llama", "vocab_size": 9, "hidden_size": 48, "intermediate_size": 64}
    found["SHAPES"]["small"] = small | {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    found["save_with_llm"](INCLUDED_MODEL, "small", tmp_path)
    model, included = open_model(str(tmp_path), "cpu"), open_model(str(INCLUDED_MODEL), "cpu")
    assert len(model.model.language_model.layers) == 3 and model.model.config.text_config.hidden_size == 48
    weights = model.model.vision_tower.state_dict()
    assert all(value.equal(weights[name]) for name, value in included.model.vision_tower.state_dict().items())
    *_, codes = model.model.draw_codes(["a photo of a ring"], model.processor, [1])
    assert codes.shape[0] == 1


def test_other_losses_fail_the_benchmark_of_training(main, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    same_losses = runpy.run_path(str(FOLDER / "train_throughput.py"))["same_losses"]
    losses = {
        "ours": {"text_loss": 2.0, "image_loss": 1.0},
        "straightforward": {"text_loss": 2.0001, "image_loss": 1.0},
    }
    assert same_losses(losses, 1e-4) and not same_losses(losses, 1e-5)
    losses["ours"]["image_loss"] = float("nan")
    assert not same_losses(losses, 1e-4)


def test_other_losses_fail_the_benchmark_of_finetuning(main, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    script = runpy.run_path(str(FOLDER / "finetuning.py"))

    def same(**padded):
        packed = {"text_loss": 2.0, "image_loss": 0.0, "num_text_tokens": 7.0}
        return script["same_step"](script["differences"]({"first_step": packed}, {"first_step": packed | padded}))

    assert same() and same(text_loss=2.00001)
    assert not same(text_loss=2.0001) and not same(image_loss=0.1) and not same(num_text_tokens=8.0)
    assert not same(image_loss=float("nan"))


def test_a_failed_training_run_is_an_error_of_the_benchmark(main, capsys):
    assert main("finetuning", "--scenes 9 --steps 1 --model nowhere".split()) == 2
    assert "model folder 'nowhere' does not exist" in capsys.readouterr().err


def test_other_codes_fail_the_benchmark_of_encoding(main, monkeypatch, capsys):
    from evotok_plugin.data.code_cache import CodeCache

    codes = CodeCache.codes
    monkeypatch.setattr(CodeCache, "codes", lambda self, key: codes(self, key) + 1)
    flags = "--sizes tiny --num_images 2 --batch_size 2 --rounds 1 --workers 0"
    assert main("encoding", flags.split()) == 2
    assert "codes in the cache differ" in capsys.readouterr().err


def test_parts_of_encoding_are_measured_for_folders_and_shards(main, tmp_path):
    flags = "--sizes tiny --num_images 6 --batch_size 3 --rounds 1 --clock cpu --picture_size 300 200 --json"
    assert main("encoding", [*flags.split(), str(tmp_path / "out.json")]) == 0
    (parts,) = [one["parts"] for one in json.loads((tmp_path / "out.json").read_text())["results"].values()]
    for spent in parts.values():
        assert all(spent[name] > 0 for name in ("reading", "decoding", "resizing", "model", "writing"))
        assert spent["all"] >= spent["decoding"] + spent["model"]
    assert set(parts) == {"folder", "tar"}
