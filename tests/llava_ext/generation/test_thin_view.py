"""Views with thin linear layers: the same results, and a model that is left as it was."""

import copy

import pytest
import torch
from torch import nn

from evotok_plugin import SamplingOptions
from evotok_plugin.kernels import thin_linear as kernels
from evotok_plugin.kernels.thin_linear import Limits, ThinLinear
from llava_ext.generation import DrawingOptions
from llava_ext.generation.thin_view import thin_view

pytestmark = pytest.mark.skipif(not kernels._has_kernels(torch.float32), reason="this PyTorch has no oneDNN")
PROMPTS = ["a photo of a ring", "a photo of a red circle above a blue square"]


@pytest.fixture
def thin_everywhere(monkeypatch):
    """Make every plain layer thin, whatever its size, and pack after two products; returns the layers that packed."""
    monkeypatch.setattr(kernels, "LIMITS", Limits(1, 1))
    monkeypatch.setattr(kernels, "PACK_AFTER", 2)
    packed, compute = [], ThinLinear.forward

    def forward(self, x):
        output = compute(self, x)
        packed.append(self) if self._packed is not None else None
        return output

    monkeypatch.setattr(ThinLinear, "forward", forward)
    return packed


@pytest.mark.parametrize("options", [DrawingOptions(1.0), DrawingOptions(3.0)], ids=["plain", "guided"])
@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "sampled"])
def test_drawings_are_the_same(any_mllm, thin_everywhere, monkeypatch, options, greedy):
    model, processor = any_mllm
    if greedy:
        options = DrawingOptions(options.guidance_scale, sampling=SamplingOptions(temperature=0))
    *_, codes = model.draw_codes(PROMPTS, processor, [1, 2], options)
    assert thin_everywhere
    monkeypatch.setattr(kernels, "LIMITS", Limits(2**60, 1))
    *_, expected = model.draw_codes(PROMPTS, processor, [1, 2], options)
    assert torch.equal(codes, expected)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"do_sample": True, "temperature": 0.5}])
def test_texts_are_the_same(tiny_mllm, thin_everywhere, monkeypatch, settings):
    model, processor = tiny_mllm
    inputs = processor.user_turns(PROMPTS)

    def texts():
        torch.manual_seed(0)
        return model.generate(**inputs, max_new_tokens=8, **settings)

    ids = texts()
    assert thin_everywhere
    monkeypatch.setattr(kernels, "LIMITS", Limits(2**60, 1))
    assert torch.equal(ids, texts())


def test_answers_are_the_same(tiny_mllm, thin_everywhere, monkeypatch):
    model, processor = tiny_mllm
    inputs = processor.user_turns(PROMPTS)
    ids = model.generate(**inputs, modalities="auto", processor=processor, max_new_tokens=8)
    assert thin_everywhere
    monkeypatch.setattr(kernels, "LIMITS", Limits(2**60, 1))
    assert torch.equal(ids, model.generate(**inputs, modalities="auto", processor=processor, max_new_tokens=8))


def test_the_model_is_left_as_it_was(tiny_mllm, thin_everywhere, tmp_path):
    model = copy.deepcopy(tiny_mllm[0])
    drawing = model.draw_codes(PROMPTS[:1], tiny_mllm[1], [1])
    for _ in range(4):
        next(drawing)
    assert thin_everywhere  # in the middle of a drawing
    assert not any(isinstance(module, ThinLinear) for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())
    model.save_pretrained(tmp_path)
    again, same = type(model).from_pretrained(tmp_path).state_dict(), copy.deepcopy(model).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(again[name], value) and torch.equal(same[name], value)


def test_the_view_shares_the_parameters_and_what_does_not_gain(tiny_mllm, monkeypatch):
    model, _ = tiny_mllm
    monkeypatch.setattr(kernels, "LIMITS", Limits(1, 1))
    view = thin_view(model)
    assert view is not model and view.training == model.training
    assert isinstance(view.language_model.layers[0].mlp.up_proj, ThinLinear)
    assert view.vision_tower.quantizer is model.vision_tower.quantizer
    own = dict(model.named_parameters())
    assert all(own[name] is value for name, value in view.named_parameters())


def test_parts_that_another_library_has_bound_are_shared(monkeypatch):
    monkeypatch.setattr(kernels, "LIMITS", Limits(1, 1))
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))
    model[0].forward = model[0].forward
    view = thin_view(model)
    assert view[0] is model[0] and isinstance(view[1], ThinLinear)


def test_adapters_work_and_can_be_merged(tiny_mllm, thin_everywhere, monkeypatch):
    peft = pytest.importorskip("peft")
    model, processor = copy.deepcopy(tiny_mllm[0]), tiny_mllm[1]
    config = peft.LoraConfig(r=2, target_modules=r"language_model\..*q_proj", init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config).eval()
    greedy = DrawingOptions(1.0, sampling=SamplingOptions(temperature=0))
    *_, codes = wrapped.base_model.model.draw_codes(PROMPTS, processor, [1, 2], greedy)
    assert thin_everywhere
    monkeypatch.setattr(kernels, "LIMITS", Limits(2**60, 1))
    *_, expected = wrapped.base_model.model.draw_codes(PROMPTS, processor, [1, 2], greedy)
    assert torch.equal(codes, expected)
    *_, merged = wrapped.merge_and_unload().draw_codes(PROMPTS, processor, [1, 2], greedy)
    assert torch.equal(merged, expected)
