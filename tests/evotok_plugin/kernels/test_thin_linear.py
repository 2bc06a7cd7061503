"""Linear layers over few rows against the layer itself."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

from evotok_plugin.kernels import thin_linear as kernels
from evotok_plugin.kernels.thin_linear import (
    MAX_ROWS,
    PACK_AFTER,
    JoinedLinear,
    Limits,
    ThinLinear,
    available_memory,
    can_be_thin,
    thin_linear,
)

pytestmark = pytest.mark.skipif(not kernels._has_kernels(torch.float32), reason="this PyTorch has no oneDNN")
SHAPES = [(1, 700), (2, 700), (3, 700), (5, 1, 700), (2, 3, 700), (128, 700)]


@pytest.fixture(autouse=True, params=[Limits(2**18, 1), Limits(2**18, 4)], ids=["any rows", "from 4 rows"])
def limits(request, monkeypatch):
    """Those of both kinds of CPU."""
    monkeypatch.setattr(kernels, "LIMITS", request.param)
    return request.param


def large(bias=True):
    """A layer whose weight is large enough for oneDNN."""
    return nn.Linear(700, 400, bias=bias)


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_the_result_equals_that_of_the_layer(shape, bias):
    layer, x = large(bias), torch.randn(*shape)
    torch.testing.assert_close(thin_linear(layer, x), layer(x), atol=1e-5, rtol=1e-5)
    thin = ThinLinear.of(layer)
    for _ in range(PACK_AFTER + 2):
        torch.testing.assert_close(thin(x), layer(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_layer_that_is_used_often_packs_its_weight():
    layer, x = large(), torch.randn(4, 700)
    thin = ThinLinear.of(layer)
    for _ in range(PACK_AFTER):
        thin(x)
    assert thin._packed is None
    thin(x)
    assert thin._packed is not None and thin._packed.layout == torch._mkldnn
    assert thin.weight is layer.weight and type(layer) is nn.Linear and "_packed" not in vars(layer)


@torch.no_grad()
def test_a_weight_is_not_packed_if_it_would_leave_too_little_memory(monkeypatch):
    monkeypatch.setattr(kernels, "available_memory", lambda: 2.0**30 + 700 * 400 * 4 - 1)
    layer, x = large(), torch.randn(4, 700)
    thin = ThinLinear.of(layer)
    for _ in range(PACK_AFTER + 2):
        torch.testing.assert_close(thin(x), layer(x), atol=1e-5, rtol=1e-5)
    assert thin._packed is None


def test_the_available_memory_is_plausible():
    assert 2**20 < available_memory() <= float("inf")


@torch.no_grad()
def test_rows_that_are_not_contiguous():
    layer, x = large(), torch.randn(700, 6).T
    thin = ThinLinear.of(layer)
    torch.testing.assert_close(thin_linear(layer, x), layer(x), atol=1e-5, rtol=1e-5)
    for _ in range(PACK_AFTER + 1):
        torch.testing.assert_close(thin(x), layer(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("change", ["in place", "new data"])
def test_changes_of_the_weight_take_effect(change):
    layer, x = large(), torch.randn(4, 700)
    thin = ThinLinear.of(layer)
    for _ in range(2):
        for _ in range(PACK_AFTER + 1):
            thin(x)
        if change == "in place":
            layer.weight.mul_(2)
        else:
            layer.weight.data = layer.weight.data.clone() * 2
        torch.testing.assert_close(thin(x), layer(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(thin_linear(layer, x), layer(x), atol=1e-5, rtol=1e-5)


def test_an_optimizers_step_takes_effect():
    layer, x = large(), torch.randn(4, 700)
    thin, optimizer = ThinLinear.of(layer), torch.optim.AdamW(layer.parameters(), lr=0.1)
    with torch.no_grad():
        for _ in range(PACK_AFTER + 1):
            thin(x)
    layer(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(thin(x), layer(x), atol=1e-4, rtol=1e-5)


def test_the_layer_itself_is_called_with_gradients():
    layer = large()
    thin_linear(layer, torch.randn(2, 700)).sum().backward()
    assert layer.weight.grad is not None
    thin = ThinLinear.of(layer)
    assert torch.equal(thin(torch.ones(2, 700)), layer(torch.ones(2, 700))) and thin._num_products == 0


@torch.no_grad()
def test_many_rows_and_none_are_computed_by_the_layer():
    layer = large()
    for rows in (0, MAX_ROWS + 1):
        x = torch.randn(rows, 700)
        assert torch.equal(ThinLinear.of(layer)(x), layer(x)) and torch.equal(thin_linear(layer, x), layer(x))


@torch.no_grad()
def test_fewer_rows_than_the_limit_are_computed_by_the_layers(packings, monkeypatch):
    monkeypatch.setattr(kernels, "LIMITS", Limits(2**18, 4))
    layer, other = large(), large()
    thin, joined, few = ThinLinear.of(layer), JoinedLinear([layer, other]), torch.randn(3, 700)
    both = torch.cat([layer(few), other(few)], dim=-1)
    for _ in range(PACK_AFTER + 1):
        assert torch.equal(thin(few), layer(few)) and torch.equal(thin_linear(layer, few), layer(few))
        assert torch.equal(joined(few), both)
    assert not packings
    used_often(thin, torch.randn(4, 700))
    used_often(joined, torch.randn(4, 700))
    assert packings == [700 * 400, 2 * 700 * 400]
    assert torch.equal(thin(few), layer(few)) and torch.equal(joined(few), both)


@torch.no_grad()
def test_layers_between_the_limits_are_not_joined(monkeypatch):
    monkeypatch.setattr(kernels, "LIMITS", Limits(1_000_000, 4))
    layers, x = [large(), nn.Linear(700, 100)], torch.randn(8, 700)
    joined = JoinedLinear(layers)
    assert torch.equal(joined(x), torch.cat([one(x) for one in layers], dim=-1)) and joined._weight is None


def test_the_cpu_is_recognized(tmp_path, monkeypatch):
    for vendor, expected in (("GenuineIntel", True), ("AuthenticAMD", False)):
        file = tmp_path / vendor
        file.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: é\n", encoding="utf-8")
        assert kernels._is_intel(file) == expected
    for name, expected in (("Intel64 Family 6 Model 143 Stepping 8, GenuineIntel", True), ("arm", False)):
        monkeypatch.setattr("platform.processor", lambda name=name: name)
        assert kernels._is_intel(tmp_path / "missing") == expected


@torch.no_grad()
def test_half_precision_and_autocast_keep_their_dtype():
    half, x = large().bfloat16(), torch.randn(4, 700)
    for run in (ThinLinear.of(half), lambda x: thin_linear(half, x)):
        assert run(x.bfloat16()).dtype == torch.bfloat16
        torch.testing.assert_close(run(x.bfloat16()), half(x.bfloat16()), atol=0.03, rtol=0.03)
    layer = large()
    with torch.autocast("cpu", torch.bfloat16):
        assert ThinLinear.of(layer)(x).dtype == thin_linear(layer, x).dtype == torch.bfloat16


@torch.no_grad()
def test_small_layers_subclasses_and_layers_with_hooks_are_called_themselves():
    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    hooked, replaced, x = large(), large(), torch.randn(2, 700)
    hooked.register_forward_hook(lambda module, inputs, output: output + 1)
    replaced.forward = lambda x: x
    for layer in (Twice(700, 400), hooked, replaced, nn.Linear(700, 100), nn.Linear(700, 400, dtype=torch.float64)):
        own = x.to(layer.weight.dtype)
        assert not can_be_thin(layer) and torch.equal(thin_linear(layer, own), layer(own))
    assert can_be_thin(large())


@torch.no_grad()
def test_the_original_can_be_copied_and_pickled_while_the_weight_is_packed():
    layer, x = large(), torch.randn(4, 700)
    thin = ThinLinear.of(layer)
    for _ in range(PACK_AFTER + 1):
        thin(x)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(copied) is nn.Linear and torch.equal(copied(x), layer(x))
    assert set(layer.state_dict()) == {"weight", "bias"}


@pytest.fixture
def packings(monkeypatch):
    """The number of elements of every weight that was packed."""
    made, pack = [], kernels._pack

    def record(weight):
        made.append(weight.numel())
        return pack(weight)

    monkeypatch.setattr(kernels, "_pack", record)
    return made


def used_often(layer, x):
    for _ in range(PACK_AFTER + 1):
        y = layer(x)
    return y


@torch.no_grad()
def test_packed_weights_are_kept_for_the_next_view(packings):
    layer, x = large(), torch.randn(4, 700)
    used_often(ThinLinear.of(layer), x)
    again = ThinLinear.of(layer)
    torch.testing.assert_close(again(x), layer(x), atol=1e-5, rtol=1e-5)
    assert again._packed is not None and packings == [700 * 400]
    used_often(ThinLinear.of(copy.deepcopy(layer)), x)
    assert len(packings) == 2


@torch.no_grad()
@pytest.mark.parametrize("change", ["factor", "row", "columns"])
def test_writes_to_the_data_between_two_views_take_effect(packings, change):
    """PyTorch does not count them: `_version` stays."""
    layer, x = large(), torch.randn(4, 700)
    used_often(ThinLinear.of(layer), x)
    version, data = layer.weight._version, layer.weight.data
    if change == "factor":
        data.mul_(2)
    elif change == "row":
        data[3].add_(1e-3)
    else:
        data[:, :2] = data[:, [1, 0]]
    assert layer.weight._version == version
    again = ThinLinear.of(layer)
    torch.testing.assert_close(again(x), layer(x), atol=1e-5, rtol=1e-5)
    assert again._packed is None
    torch.testing.assert_close(used_often(again, x), layer(x), atol=1e-5, rtol=1e-5)
    assert len(packings) == 2


@torch.no_grad()
def test_joined_weights_are_kept_and_their_changes_take_effect(packings):
    layers, x = [large(), large()], torch.randn(4, 700)

    def check(joined):
        torch.testing.assert_close(joined(x), torch.cat([one(x) for one in layers], dim=-1), atol=1e-5, rtol=1e-5)
        return joined

    first = JoinedLinear(layers)
    used_often(lambda _: check(first), x)
    assert packings == [2 * 700 * 400]
    check(JoinedLinear(layers))
    layers[1].bias.add_(1)
    check(first)
    layers[0].bias.data.add_(1)
    check(JoinedLinear(layers))
    assert len(packings) == 1
    layers[1].weight.data.mul_(2)
    check(JoinedLinear(layers))
    layers[1] = large()
    check(JoinedLinear(layers))
    assert len(packings) == 1


@torch.no_grad()
def test_packed_weights_are_not_kept_if_they_take_much_of_the_memory(monkeypatch, packings):
    layer, x = large(), torch.randn(4, 700)
    monkeypatch.setattr(kernels, "single_weights", kernels.KeptWeights())
    monkeypatch.setattr(kernels, "_RESERVE", 0)
    monkeypatch.setattr(kernels, "available_memory", lambda: 2.5 * layer.weight.nbytes)
    used_often(ThinLinear.of(layer), x)
    assert packings and ThinLinear.of(layer)(x) is not None and not kernels.single_weights._kept
    monkeypatch.setattr(kernels, "available_memory", lambda: 3.5 * layer.weight.nbytes)
    used_often(ThinLinear.of(layer), x)
    assert len(kernels.single_weights._kept) == 1
    monkeypatch.setattr(kernels, "available_memory", lambda: 0)
    used_often(ThinLinear.of(large()), x)
    assert not kernels.single_weights._kept


@torch.no_grad()
def test_threads_can_keep_and_find_packed_weights_at_the_same_time():
    kept, errors = kernels.KeptWeights(), []
    weights = [nn.Parameter(torch.randn(8, 16)) for _ in range(200)]

    def work(part):
        try:
            for weight in part:
                kept.put([weight], kernels.PackedWeights.of([weight]))
                assert kept.find([weight]) is not None
                weight.data.add_(1)
                assert kept.find([weight]) is None
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(weights[start::4],)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and not kept._kept


@torch.no_grad()
def test_packed_weights_are_freed_with_the_model():
    layer, x = large(), torch.randn(4, 700)
    before = len(kernels.single_weights._kept)
    used_often(ThinLinear.of(layer), x)
    assert len(kernels.single_weights._kept) == before + 1
    del layer
    assert len(kernels.single_weights._kept) == before
