"""The benchmark of guidance: its prompts and its settings."""

import importlib
import json
from collections import Counter
from pathlib import Path

import pytest

from eval_tasks.tasks.geneval_scenes import task as geneval_scenes
from evotok_plugin.scenes.scene import SKILLS
from llava_ext.data.prompt_files import read_prompts
from llava_ext.generation import DrawingOptions

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts/benchmark"))
    return importlib.import_module("guidance")


def test_prompts_are_not_those_of_geneval_scenes(benchmark, tmp_path):
    prompts = benchmark.held_out_prompts(12, seed=0)
    rows = (Path(geneval_scenes.__file__).parent / "skills.jsonl").read_text().splitlines()
    documents = geneval_scenes.make_documents([json.loads(row) for row in rows], json.loads(rows[0])["seed"])
    texts = {prompt.text for prompt in prompts}
    assert len(texts) == len(prompts) and not texts & {document["prompt"] for document in documents}
    assert Counter(prompt.tag for prompt in prompts) == dict.fromkeys(SKILLS, 12)
    assert benchmark.held_out_prompts(12, seed=1) != prompts
    benchmark.save_prompts(prompts, tmp_path / "prompts.jsonl")
    assert read_prompts([tmp_path / "prompts.jsonl"]) == prompts


@pytest.mark.parametrize("num_levels", [1, 3, 4])
def test_settings_are_valid_and_different(benchmark, num_levels):
    settings = benchmark.settings_of(num_levels)
    options = {name: DrawingOptions(**{**benchmark.SAMPLING, **values}) for name, values in settings.items()}
    scales = [one.guidance_scale for one in options.values() if isinstance(one.guidance_scale, tuple)]
    assert len(scales) == 2 and all(len(scale) == num_levels for scale in scales)
    assert len(set(options.values())) == len(options)
