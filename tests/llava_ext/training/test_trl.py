"""TRL's trainers on the model and its processor: two steps each."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from evotok_plugin.scenes.scene import render, sample_scene
from llava_ext import EvoTokLlavaForConditionalGeneration, EvoTokLlavaProcessor

trl = pytest.importorskip("trl")

QUESTION = {"role": "user", "content": "What is it?"}


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


@pytest.fixture
def images(rng):
    return [[render(sample_scene(rng, "two_object"))] for _ in range(4)]


@pytest.fixture
def parts(model_folder):
    return {
        "model": EvoTokLlavaForConditionalGeneration.from_pretrained(model_folder),
        "processing_class": EvoTokLlavaProcessor.from_pretrained(model_folder),
    }


def settings(folder) -> dict:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "max_length": None,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def losses_of(trainer) -> list[float]:
    """Train; check that a trained parameter has changed, and return the losses of the steps."""
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    trainer.train()
    assert any(not torch.equal(p, old) for p, old in zip(trained, before, strict=True))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    return losses


def sft(parts, folder, rows, **more):
    options = {name: more.pop(name) for name in ("assistant_only_loss",) if name in more}
    config = trl.SFTConfig(**settings(folder), **options)
    return trl.SFTTrainer(**parts, args=config, train_dataset=Dataset.from_list(rows), **more)


def test_sft_on_messages_with_images(parts, images, tmp_path):
    rows = [{"messages": [QUESTION, said("a ring")], "images": one} for one in images]
    trainer = sft(parts, tmp_path, rows)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        model, learned = parts["model"], batch["labels"].clone()
        learned[learned == model.config.image_token_id] = -100
        assert torch.equal(model(**batch).loss, model(**{**batch, "labels": learned}).loss)
    losses = losses_of(trainer)
    assert losses[1] < losses[0]


def test_sft_on_messages_evaluates_with_images(parts, images, tmp_path):
    rows = [{"messages": [QUESTION, said("a ring")], "images": one} for one in images]
    trainer = sft(parts, tmp_path, rows, eval_dataset=Dataset.from_list(rows))
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_sft_on_prompt_and_completion(parts, images, tmp_path):
    rows = [{"prompt": [QUESTION], "completion": [said("a ring")], "images": one} for one in images]
    losses = losses_of(sft(parts, tmp_path, rows))
    assert losses[1] < losses[0]


def test_sft_on_text_alone(parts, tmp_path):
    losses = losses_of(sft(parts, tmp_path, [{"messages": [QUESTION, said("a ring")]}] * 4))
    assert losses[1] < losses[0]


def test_sft_on_answers_alone(parts, images, tmp_path):
    rows = [{"messages": [QUESTION, said("a ring")], "images": one} for one in images]
    trainer = sft(parts, tmp_path, rows, assistant_only_loss=True)
    labels = next(iter(trainer.get_train_dataloader()))["labels"]
    learned = parts["processing_class"].decode(labels[0][labels[0] != -100])
    assert learned.startswith("a ring") and "What" not in learned
    losses_of(trainer)


def test_sft_with_adapters_leaves_the_image_tokenizer_alone(parts, images, tmp_path):
    rows = [{"messages": [QUESTION, said("a ring")], "images": one} for one in images]
    trainer = sft(parts, tmp_path, rows, peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    losses_of(trainer)
    assert not [n for n, p in trainer.model.named_parameters() if p.requires_grad and "vision_tower" in n]


def test_sft_loads_a_folder(model_folder, images, tmp_path):
    rows = [{"messages": [QUESTION, said("a ring")], "images": one} for one in images]
    trainer = sft({"model": str(model_folder)}, tmp_path, rows)
    assert isinstance(trainer.model, EvoTokLlavaForConditionalGeneration)
    losses_of(trainer)


@pytest.mark.parametrize("adapters", [False, True])
def test_dpo(parts, images, tmp_path, adapters):
    """Without adapters, TRL loads the reference model from the folder of the trained one."""
    rows = [
        {"prompt": [QUESTION], "chosen": [said("a ring")], "rejected": [said("a red square")], "images": one}
        for one in images
    ]
    lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM") if adapters else None
    config = trl.DPOConfig(**settings(tmp_path))
    trainer = trl.DPOTrainer(**parts, args=config, train_dataset=Dataset.from_list(rows), peft_config=lora)
    losses = losses_of(trainer)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)  # the trained model is the reference model
    assert losses[1] < losses[0]
