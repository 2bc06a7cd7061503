"""`evotok-eval text` on random tiny models: answers and losses of a model and its base, and wrong inputs."""

import json
import math

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval_tasks.cli import main
from eval_tasks.text.measure import read_prompts, read_texts
from eval_tasks.text.models import recorded_base
from evotok_plugin.errors import UserError
from llava_ext.model_folder import load_model, save_model

PROMPTS = "a red ring\nhow many rings?\n"
TEXT = "a red ring and a blue square\n\na green disc\n"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tiny_mllm, tiny_backbone_folder):
    """A model as stage 1 leaves it: the backbone is unchanged."""
    folder = tmp_path_factory.mktemp("stage") / "model"
    model, processor = tiny_mllm
    save_model(model, folder)
    processor.save_pretrained(folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"model_name_or_path": str(tiny_backbone_folder)}))
    return folder


@pytest.fixture
def inputs(tmp_path):
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    (tmp_path / "texts.txt").write_text(TEXT)
    return ["--prompts", str(tmp_path / "prompts.txt"), "--texts", str(tmp_path / "texts.txt"), "--device", "cpu"]


def measured(model, inputs, tmp_path, *more) -> dict:
    file = tmp_path / "text.json"
    assert main(["text", str(model), *inputs, "--max_new_tokens", "6", "-o", str(file), *more]) == 0
    return json.loads(file.read_text())


def test_a_model_with_the_weights_of_its_base_has_identical_answers(
    model_folder, tiny_backbone_folder, inputs, tmp_path, capsys
):
    found = measured(model_folder, inputs, tmp_path)
    assert found["num_identical"] == found["num_prompts"] == 2 and found["base"] == str(tiny_backbone_folder)
    assert all(answer["base"] == answer["model"] for answer in found["answers"])
    assert "2 of 2" in capsys.readouterr().out


def test_the_loss_is_that_of_the_tokens_after_the_first(model_folder, tiny_backbone_folder, inputs, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_backbone_folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_backbone_folder)
    total, count = 0.0, 0
    for text in TEXT.split("\n\n"):
        ids = tokenizer(text.strip(), add_special_tokens=False, return_tensors="pt")["input_ids"]
        logs = model(input_ids=ids).logits.detach().log_softmax(dim=-1)
        total -= sum(float(logs[0, place, ids[0, place + 1]]) for place in range(ids.shape[1] - 1))
        count += ids.shape[1] - 1
    found = measured(model_folder, inputs, tmp_path)
    assert found["num_tokens"] == count and math.isclose(found["base_loss"], total / count, rel_tol=1e-5)
    # Three rows for image tokens take a little of the probability of text.
    assert 0 < found["model_loss"] - found["base_loss"] < 0.01 and found["loss_ratio"] > 1


def test_a_changed_backbone_is_noticed(model_folder, inputs, tmp_path, capsys):
    model, processor = load_model(model_folder)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.language_model.layers.parameters():
            weight.add_(0.5 * torch.randn_like(weight))
    save_model(model, tmp_path / "changed")
    processor.save_pretrained(tmp_path / "changed")
    found = measured(tmp_path / "changed", inputs, tmp_path, "--base", str(model_folder))
    assert found["num_identical"] < 2 and abs(found["loss_ratio"] - 1) > 1e-3
    shown = capsys.readouterr().out
    different = next(answer for answer in found["answers"] if not answer["identical"])
    assert different["prompt"] in shown and "  base:" in shown and "  model:" in shown


def test_the_base_is_that_of_the_first_stage(model_folder, tiny_backbone_folder, tmp_path):
    second = tmp_path / "second"
    second.mkdir()
    (second / "recipe.yaml").write_text(yaml.safe_dump({"model_name_or_path": str(model_folder)}))
    assert recorded_base(second) == str(tiny_backbone_folder)


def test_the_workspace_of_a_recorded_path_is_replaced(tiny_backbone_folder, tmp_path):
    recipe = {"model_name_or_path": "{workspace}/backbone", "workspace": str(tmp_path / "work")}
    (tmp_path / "work").mkdir()
    (tmp_path / "work/backbone").symlink_to(tiny_backbone_folder)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert recorded_base(tmp_path) == str(tmp_path / "work/backbone")


def test_a_folder_without_a_recorded_base_needs_one(tmp_path):
    with pytest.raises(UserError, match="no recipe.yaml .* pass --base"):
        recorded_base(tmp_path)
    (tmp_path / "recipe.yaml").write_text("max_steps: 3\n")
    with pytest.raises(UserError, match="does not record a model_name_or_path; pass --base"):
        recorded_base(tmp_path)
    (tmp_path / "recipe.yaml").write_text(f"model_name_or_path: {tmp_path}/gone\n")
    with pytest.raises(UserError, match="gone', which does not exist here; pass --base"):
        recorded_base(tmp_path)
    (tmp_path / "recipe.yaml").write_text("model_name_or_path: HuggingFaceTB/SmolLM2-135M-Instruct\n")
    assert recorded_base(tmp_path) == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_a_base_with_other_tokens_is_rejected(model_folder, tiny_backbone_folder, inputs, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(tiny_backbone_folder)
    tokenizer.chat_template = tokenizer.chat_template.replace("user", "human").replace("add_generation_prompt", "false")
    tokenizer.chat_template = "{{ 'x' }}" + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "other")
    AutoModelForCausalLM.from_pretrained(tiny_backbone_folder).save_pretrained(tmp_path / "other")
    assert main(["text", str(model_folder), *inputs, "--base", str(tmp_path / "other")]) == 2
    assert "have other tokens in the base" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_new_tokens", "0"], "--max_new_tokens must be at least 1"),
        (["--batch_size", "0"], "--batch_size must be at least 1"),
        (["--prompts", "missing.txt"], "missing.txt cannot be read as text"),
        (["-o", "text.csv"], "text.csv"),
    ],
)
def test_wrong_flags_are_named(model_folder, flags, message, capsys):
    assert main(["text", str(model_folder), *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_causal_lm_is_not_a_model_of_a_stage(tiny_backbone_folder, capsys):
    assert main(["text", str(tiny_backbone_folder)]) == 2
    assert "expected evotok_llava" in capsys.readouterr().err


def test_the_packaged_prompts_and_texts(tmp_path):
    prompts = read_prompts(None)
    assert len(prompts) == len(set(prompts)) == 20
    assert len(read_texts(None)) == 10 and all(len(text.split()) > 40 for text in read_texts(None))
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(UserError, match="expected at least one prompt"):
        read_prompts(tmp_path / "empty.txt")
    with pytest.raises(UserError, match="expected at least one paragraph"):
        read_texts(tmp_path / "empty.txt")
