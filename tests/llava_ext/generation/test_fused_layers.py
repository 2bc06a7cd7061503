"""Fused decoder layers against those of transformers."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    StaticCache,
)

from evotok_plugin.kernels import thin_linear as kernels
from evotok_plugin.kernels.thin_linear import MAX_ROWS, PACK_AFTER, JoinedLinear, Limits
from llava_ext.generation import fused_layers
from llava_ext.generation.cache import SlotCache
from llava_ext.generation.fused_layers import MAX_STEPS, FusedLayer, can_be_fused
from llava_ext.generation.thin_view import thin_view

SIZES = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
BACKBONES = {
    "qwen2": Qwen2Config(**SIZES),
    "llama": LlamaConfig(**SIZES),
    "llama with biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, head_dim=12),
    "no groups": LlamaConfig(**{**SIZES, "num_key_value_heads": 6}),
    "one group": Qwen2Config(**{**SIZES, "num_key_value_heads": 1}),
    "scaled positions": LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
}


def made(config, model_class=AutoModel):
    torch.manual_seed(0)
    model = model_class.from_config(config).eval()
    for parameter in model.parameters():  # also biases and norms
        nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("cache", ["dynamic", "slots"])
def test_steps_equal_those_of_transformers(name, cache):
    """Rows with padding, over a prompt, single steps, several at once, and single steps again."""
    model = made(BACKBONES[name])
    view = thin_view(model)
    assert all(isinstance(layer, FusedLayer) for layer in view.layers)
    assert all(isinstance(layer, type(own)) for layer, own in zip(view.layers, model.layers, strict=True))
    mask = torch.ones(3, 30, dtype=torch.bool)
    mask[1, :4] = False
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    inputs = torch.randn(3, 30, 48)
    seen = []
    for one in (model, view):
        kept = DynamicCache(config=model.config) if cache == "dynamic" else SlotCache(3, 30)
        outputs, start = [], 0
        for count in [6, *[1] * 10, 4, *[1] * 10]:
            end = start + count
            outputs.append(
                one(
                    inputs_embeds=inputs[:, start:end],
                    attention_mask=mask[:, :end],
                    position_ids=positions[:, start:end],
                    past_key_values=kept,
                    use_cache=True,
                ).last_hidden_state
            )
            start = end
        seen.append(torch.cat(outputs, dim=1)[mask])  # what padding becomes does not matter
    torch.testing.assert_close(*seen, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_texts_equal_those_of_transformers(name):
    model = made(BACKBONES[name], AutoModelForCausalLM)
    ids = torch.randint(3, 64, (4, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for settings in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        settings = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, **settings}
        assert torch.equal(thin_view(model).generate(ids, **settings), model.generate(ids, **settings))


@pytest.fixture
def joined_products(monkeypatch):
    """The numbers of rows of the products of joined layers."""
    calls, compute = [], JoinedLinear.__call__
    monkeypatch.setattr(JoinedLinear, "__call__", lambda self, x: calls.append(len(x)) or compute(self, x))
    return calls


def test_steps_of_a_few_tokens_are_fused_and_others_are_not(joined_products):
    model = made(BACKBONES["qwen2"])
    view = thin_view(model)

    def products(**inputs):
        joined_products.clear()
        view(**{"past_key_values": DynamicCache(config=model.config), "use_cache": True} | inputs)
        return list(joined_products)

    x = torch.randn(2, 1, 48)
    with torch.no_grad():
        assert products(inputs_embeds=x) == products(input_ids=torch.ones(2, 1, dtype=torch.long)) == [2, 2] * 3
        assert products(inputs_embeds=torch.randn(2, MAX_STEPS, 48)) == [2 * MAX_STEPS] * 6
        assert products(inputs_embeds=torch.randn(2, MAX_STEPS + 1, 48)) == []
        assert products(inputs_embeds=torch.randn(MAX_ROWS + 1, 1, 48)) == []
        assert products(inputs_embeds=x, use_cache=False, past_key_values=None) == []
    assert products(inputs_embeds=x) == []  # with gradients
    handle = view.layers[0].mlp.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        assert products(inputs_embeds=x) == [2, 2] * 2  # all layers but the first one
    handle.remove()
    assert not model.layers[0].mlp._forward_hooks


@torch.no_grad()
def test_what_a_step_does_not_compute_is_computed_by_transformers():
    model = made(BACKBONES["llama"])
    view, x = thin_view(model), torch.randn(2, 1, 48)

    def both(**inputs):
        runs = [one(inputs_embeds=x, use_cache=True, **{k: v() for k, v in inputs.items()}) for one in (model, view)]
        torch.testing.assert_close(runs[0].last_hidden_state, runs[1].last_hidden_state, atol=1e-5, rtol=1e-5)

    def cache():
        return DynamicCache(config=model.config)

    both(past_key_values=cache, output_hidden_states=lambda: True)
    both(past_key_values=lambda: StaticCache(config=model.config, max_cache_len=8))
    both(past_key_values=lambda: None)
    both(past_key_values=cache, attention_mask=lambda: torch.zeros(2, 1, 1, 1))
    both(past_key_values=cache, position_ids=lambda: torch.tensor([[700], [3]]))
    as_tuple = view(inputs_embeds=x, past_key_values=cache(), use_cache=True, return_dict=False)
    assert isinstance(as_tuple, tuple)


@torch.no_grad()
def test_a_row_without_any_allowed_slot_does_not_become_nan():
    model = made(BACKBONES["qwen2"])
    mask = torch.tensor([[0, 0, 0], [1, 1, 1]])
    inputs = {"inputs_embeds": torch.randn(2, 3, 48), "attention_mask": mask, "use_cache": True}
    hidden = thin_view(model)(**inputs, past_key_values=DynamicCache(config=model.config)).last_hidden_state
    expected = model(**inputs, past_key_values=DynamicCache(config=model.config)).last_hidden_state
    assert hidden.isfinite().all()
    torch.testing.assert_close(hidden[1], expected[1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_steps_do_not_depend_on_the_default_device():
    model = made(BACKBONES["qwen2"])
    view, x, mask = thin_view(model), torch.randn(2, 3, 48), torch.tensor([[0, 1, 1], [1, 1, 1]])
    expected = model(inputs_embeds=x, attention_mask=mask, past_key_values=DynamicCache(), use_cache=True)
    fused_layers._constant.cache_clear()
    with torch.device("meta"):
        found = view(inputs_embeds=x, attention_mask=mask, past_key_values=DynamicCache(), use_cache=True)
    states = (run.last_hidden_state[mask.bool()] for run in (found, expected))
    torch.testing.assert_close(*states, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("rope_type", ["default", "dynamic", "llama3", "yarn"])
def test_rotary_embeddings_equal_those_of_transformers(rope_type):
    scaling = {"rope_type": rope_type, "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
    if rope_type == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = made(LlamaConfig(**SIZES, rope_parameters=scaling, max_position_embeddings=64))
    view, x = thin_view(model), torch.randn(1, 40, 48)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for step in range(40):
        model_step, view_step = (
            one(inputs_embeds=x[:, step : step + 1], past_key_values=kept, use_cache=True).last_hidden_state
            for one, kept in zip((model, view), caches, strict=True)
        )
        torch.testing.assert_close(view_step, model_step, atol=1e-4, rtol=1e-4)


def test_other_layers_are_left_alone(monkeypatch):
    sliding = made(MistralConfig(**SIZES, sliding_window=4))
    assert thin_view(sliding) is sliding
    eager = made(copy.deepcopy(BACKBONES["qwen2"]))
    eager.set_attn_implementation("eager")
    assert thin_view(eager) is eager
    half = made(BACKBONES["qwen2"]).bfloat16()
    assert not can_be_fused(half.layers[0])
    replaced = made(BACKBONES["qwen2"])
    replaced.layers[0].mlp.up_proj = nn.Sequential(replaced.layers[0].mlp.up_proj)
    assert [isinstance(layer, FusedLayer) for layer in thin_view(replaced).layers] == [False, True, True]
    patched = made(BACKBONES["qwen2"])
    patched.layers[1].self_attn.forward = patched.layers[1].self_attn.forward
    assert [isinstance(layer, FusedLayer) for layer in thin_view(patched).layers] == [True, False, True]


@torch.no_grad()
@pytest.mark.parametrize("is_large", [False, True])
@pytest.mark.parametrize("biases", [(True, True), (False, False), (True, False)])
def test_joined_layers_equal_the_single_ones(monkeypatch, is_large, biases):
    monkeypatch.setattr(kernels, "LIMITS", Limits(1 if is_large else 2**40, 1))
    layers = [nn.Linear(20, 30, bias=biases[0]), nn.Linear(20, 50, bias=biases[1])]
    joined = JoinedLinear(layers)
    for rows in (1, 2, 5):
        for number in range(PACK_AFTER):
            if number == PACK_AFTER - 4:
                layers[1].weight.mul_(1.5)
            x = torch.randn(rows, 20)
            torch.testing.assert_close(joined(x), torch.cat([layer(x) for layer in layers], dim=-1))
    for _ in range(PACK_AFTER):
        torch.testing.assert_close(joined(x), torch.cat([layer(x) for layer in layers], dim=-1))
    assert joined._weight is not None and joined._is_packed == (is_large and kernels._has_kernels(torch.float32))
    monkeypatch.setattr(kernels, "available_memory", lambda: 0)
    monkeypatch.setattr(kernels, "_ALWAYS_FITS", 0)
    kernels.joined_weights.clear()
    poor = JoinedLinear(layers)
    for _ in range(PACK_AFTER):
        torch.testing.assert_close(poor(x), torch.cat([layer(x) for layer in layers], dim=-1))
    assert poor._weight is None
