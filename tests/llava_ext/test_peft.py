"""Adapters of peft on the model, made without this project's training code."""

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    get_peft_model,
)
from torch import nn

from evotok_plugin.scenes.scene import render, sample_scene
from llava_ext import EvoTokLlavaForConditionalGeneration


@pytest.fixture
def load(model_folder):
    return lambda: EvoTokLlavaForConditionalGeneration.from_pretrained(model_folder)


@pytest.fixture
def batch(tiny_mllm, rng):
    image = {"type": "image", "image": render(sample_scene(rng, "two_object"))}
    messages = [
        {"role": "user", "content": [image, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "a ring"},
    ]
    batch = tiny_mllm[1].apply_chat_template(messages, tokenize=True)
    return batch | {"labels": batch["input_ids"]}


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj", "fc1"]])
def test_the_image_tokenizer_gets_no_adapters(load, batch, targets, tmp_path):
    model = load()
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    wanted = [
        name
        for name in linear
        if not name.startswith("vision_tower.")
        and name != "lm_head"
        and (targets == "all-linear" or name.split(".")[-1] in targets)
    ]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    found = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in trained}
    assert found == set(wanted) and len(trained) == 2 * len(wanted)

    adapted.train()
    adapted(**batch).loss.backward()
    assert all(p.grad is not None for p in trained.values())
    with torch.no_grad():
        for parameter in trained.values():
            parameter.copy_(torch.randn_like(parameter) / 10)
        expected = adapted.eval()(**batch).logits
        adapted.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(load(), tmp_path).eval()
        torch.testing.assert_close(again(**batch).logits, expected)
        torch.testing.assert_close(again.merge_and_unload()(**batch).logits, expected, atol=1e-4, rtol=1e-4)
        plain = load().eval()
        assert not torch.allclose(plain(**batch).logits, expected)
        plain.load_adapter(str(tmp_path))
        torch.testing.assert_close(plain(**batch).logits, expected)


@pytest.mark.parametrize(
    "settings",
    [
        IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head", "read_projector"]),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices=[1, 2]),
    ],
    ids=["ia3", "prefix", "modules_to_save", "token_indices"],
)
def test_other_adapters_learn_and_generate(load, batch, settings):
    model = get_peft_model(load(), settings)
    model.train()
    model(**batch).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert gradients and all(one is not None and bool(one.isfinite().all()) for one in gradients)
    prompt = {name: value for name, value in batch.items() if name != "labels"}
    ids = model.eval().generate(**prompt, max_new_tokens=2)
    assert ids.shape[1] <= prompt["input_ids"].shape[1] + 2
