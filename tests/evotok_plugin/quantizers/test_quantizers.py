"""The interface that all kinds of quantizers share, SimVQ, and finite scalar quantization."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from evotok_plugin import EvoTokConfig
from evotok_plugin.errors import UserError
from evotok_plugin.quantizers.choice import build_quantizer
from evotok_plugin.quantizers.fsq import FiniteScalarQuantizer
from evotok_plugin.quantizers.simvq import SimVQuantizer

KINDS = ("rvq", "simvq", "fsq")
LEARNED = ("simvq", "fsq")


def make(kind, **fields):
    torch.manual_seed(0)
    sizes = {"codebook_dim": 8, "codebook_size": 64, "num_quantizers": 4, "pixel_depth": 4, "semantic_depth": 4}
    return build_quantizer(EvoTokConfig.preset("tiny", **sizes, quantizer=kind, **fields))


def latents(count=400, dim=8, seed=1):
    """Correlated vectors off the origin."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(7))
    return torch.randn(count, dim, generator=generator) @ mix / 2 + 0.3


def naive_codes(kind, quantizer, vectors):
    """Codes by definition in float64: the nearest code vector, or the nearest point of the grid to bounded numbers."""
    residual, codes = vectors.double().numpy(), []
    for level in range(quantizer.num_quantizers):
        codebook = quantizer.codebooks[level].double().numpy()
        points, numbers = codebook, residual
        if kind == "fsq":
            sizes = np.array(quantizer.levels)
            index = np.arange(sizes.prod())[:, None] // np.cumprod([1, *sizes[:-1]]) % sizes
            points = index - sizes // 2
            half, offset = (sizes - 1) * 1.001 / 2, np.where(sizes % 2 == 0, 0.5, 0)
            raw = residual @ quantizer.maps_in[level].detach().double().numpy().T
            numbers = np.tanh(raw + np.arctanh(offset / half)) * half - offset
        codes.append(((numbers[:, None] - points) ** 2).sum(-1).argmin(1))
        residual = residual - codebook[codes[-1]]
    return np.stack(codes, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("initialized", [False, True])
def test_codes_equal_those_of_a_naive_search_in_float64(kind, initialized):
    quantizer, z = make(kind).eval(), latents()
    if initialized:
        quantizer.init_from(latents(seed=2))
    np.testing.assert_array_equal(quantizer(z).codes.numpy(), naive_codes(kind, quantizer, z))
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(quantizer(z).codes.numpy(), naive_codes(kind, quantizer, z))


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_the_sums_of_the_code_vectors(kind):
    quantizer, z = make(kind).eval(), latents(60).view(3, 20, 8)
    result = quantizer(z)
    assert result.codes.shape == (3, 20, 4) and quantizer.codebooks.shape == (4, 64, 8)
    assert quantizer.codebooks.dtype == torch.float32 and not quantizer.codebooks.requires_grad
    losses = []
    for depth in range(1, 5):
        total = quantizer.codes_to_latents(result.codes[..., :depth])
        torch.testing.assert_close(result.latents_at(depth), total, rtol=0, atol=1e-6)
        torch.testing.assert_close(quantizer.level_latents(result.codes)[:, :, :depth].sum(2), total)
        losses.append(F.mse_loss(z, total))
        assert torch.equal(quantizer(z, depth).codes, result.codes[..., :depth])
    torch.testing.assert_close(result.commitment_loss, torch.stack(losses).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_the_sums_are_the_same_with_and_without_gradients(kind):
    quantizer, z = make(kind).eval(), latents(20)
    with torch.no_grad():
        expected = quantizer(z).latents_at(4)
    assert torch.equal(quantizer(z.requires_grad_()).latents_at(4), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_initialization_fits_samples_better_than_random_codebooks(kind):
    quantizer, z = make(kind).eval(), latents()
    before = F.mse_loss(quantizer(z).latents_at(4), z)
    quantizer.init_from(latents(seed=2))
    after = F.mse_loss(quantizer(z).latents_at(4), z)
    assert after < 0.1 * z.var() and after < before / 2


@pytest.mark.parametrize("kind", LEARNED)
def test_the_codebook_loss_lowers_the_error(kind):
    quantizer = make(kind).train()
    quantizer.init_from(latents(seed=2))
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=3e-3)
    held_out = latents(seed=3)
    before = F.mse_loss(quantizer.eval()(held_out).latents_at(4), held_out)
    for step in range(200):
        result = quantizer.train()(latents(200, seed=10 + step))
        result.codebook_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert F.mse_loss(quantizer.eval()(held_out).latents_at(4), held_out) < 0.9 * before


@pytest.mark.parametrize("kind", LEARNED)
def test_the_codebook_loss_is_that_of_the_residuals_and_trains_no_latents(kind):
    quantizer, z = make(kind).train(), latents(50).requires_grad_()
    result = quantizer(z)
    vectors = quantizer.level_latents(result.codes)
    residuals = [z - vectors[:, :level].sum(1) for level in range(4)]
    expected = torch.stack([F.mse_loss(vectors[:, level], residuals[level]) for level in range(4)]).mean()
    torch.testing.assert_close(result.codebook_loss, expected)
    result.codebook_loss.backward()
    assert z.grad is None and all(parameter.grad.any() for parameter in quantizer.parameters())
    assert quantizer.eval()(z).codebook_loss is None
    assert make("rvq").train()(z).codebook_loss is None


def test_the_gradient_of_the_maps_of_simvq_is_that_of_finite_differences():
    quantizer, z = make("simvq").train().double(), latents(30)
    result = quantizer(z)
    result.codebook_loss.backward()
    codes, bases, maps = result.codes, quantizer.bases.double(), quantizer.maps.detach().double()
    sums = quantizer.level_latents(codes).double().cumsum(1)
    residuals = torch.cat([z.double()[:, None], z.double()[:, None] - sums[:, :-1]], 1)

    def loss(maps):
        return torch.stack([F.mse_loss(bases[k][codes[:, k]] @ maps[k], residuals[:, k]) for k in range(4)]).mean()

    for level, row, column in ((0, 0, 0), (1, 3, 5), (3, 7, 2)):
        step = torch.zeros_like(maps)
        step[level, row, column] = 1e-4
        slope = (loss(maps + step) - loss(maps - step)) / 2e-4
        torch.testing.assert_close(quantizer.maps.grad[level, row, column].double(), slope, rtol=1e-3, atol=1e-6)


def test_the_gradient_of_fsq_passes_through_maps_and_bound():
    """One level: the Jacobian is maps_in^T x the slope of the bound x maps_out."""
    torch.manual_seed(0)
    quantizer = FiniteScalarQuantizer(1, 40, 6, levels=[8, 5])
    z, weight = torch.randn(9, 6, requires_grad=True), torch.randn(9, 6)
    (quantizer(z).latents_at(1) * weight).sum().backward()
    raw = (z.detach() @ quantizer.maps_in[0].T).detach().requires_grad_()
    half, offset = torch.tensor([7, 4]) * 1.001 / 2, torch.tensor([0.5, 0])
    bounded = torch.tanh(raw + torch.atanh(offset / half)) * half / torch.tensor([4, 2])
    (slope,) = torch.autograd.grad(bounded.sum(), raw)
    torch.testing.assert_close(z.grad, ((weight @ quantizer.maps_out[0].T) * slope) @ quantizer.maps_in[0])
    digits = torch.stack([quantizer(z).codes[:, 0] % 8 - 4, quantizer(z).codes[:, 0] // 8 - 2], 1)
    points = digits / torch.tensor([4, 2])
    torch.testing.assert_close(quantizer.maps_out.grad[0], points.T @ weight)


@pytest.mark.parametrize("kind", KINDS)
def test_level_dropout_changes_the_input_of_the_decoders_only(kind):
    quantizer, z = (
        make(kind, level_dropout=1.0, ema_decay=1.0, restart_threshold=0.0).train(),
        latents(80).view(8, 10, 8),
    )
    result = quantizer(z)
    assert torch.equal(result.codes, quantizer.eval()(z).codes)
    dropped = result.latents_at(4)
    depths = set()
    for item in range(8):
        sums = [quantizer.codes_to_latents(result.codes[item, :, :depth]) for depth in range(1, 5)]
        (depth,) = [depth for depth, total in enumerate(sums, 1) if torch.allclose(total, dropped[item], atol=1e-5)]
        depths.add(depth)
    assert len(depths) > 1


@pytest.mark.parametrize("kind", LEARNED)
def test_codebooks_are_computed_once_until_a_weight_changes(kind):
    quantizer = make(kind).eval()
    first = quantizer.codebooks
    assert quantizer.codebooks is first
    with torch.no_grad():
        next(quantizer.parameters()).add_(0.0)
        quantizer.maps.mul_(2) if kind == "simvq" else quantizer.maps_out.mul_(2)
    torch.testing.assert_close(quantizer.codebooks, 2 * first)
    state = {
        name: value / 2 if name in ("maps", "maps_out") else value for name, value in quantizer.state_dict().items()
    }
    quantizer.load_state_dict(state)
    torch.testing.assert_close(quantizer.codebooks, first)
    assert torch.equal(copy.deepcopy(quantizer).codebooks, quantizer.codebooks)
    with torch.inference_mode():
        assert torch.equal(make(kind).eval().codebooks, make(kind).eval().codebooks)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fixed", [False, True])
def test_half_precision_keeps_the_codebooks_in_float32(kind, fixed):
    quantizer, z = make(kind).eval(), latents(40)
    expected, state = quantizer(z).codes, copy.deepcopy(quantizer.state_dict())
    if fixed:
        quantizer.fix()
        assert not list(quantizer.parameters())
    quantizer.half().to(torch.bfloat16)
    assert torch.equal(quantizer(z).codes, expected)
    assert quantizer.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in quantizer.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_fixed_quantizer_learns_nothing(kind):
    quantizer, z = make(kind).fix().train(), latents(40).requires_grad_()
    before = quantizer.codebooks.clone()
    result = quantizer(z)
    assert result.codebook_loss is None and torch.equal(quantizer.codebooks, before)
    result.latents_at(4).sum().backward()
    assert z.grad.any()
    assert not make(kind).fix(persistent=False).state_dict()


@pytest.mark.parametrize("kind", LEARNED)
def test_there_is_no_learning_state_to_restore(kind):
    quantizer = make(kind)
    quantizer.load_learning_state(quantizer.learning_state())
    with pytest.raises(UserError, match="counts, steps, which .* does not use"):
        quantizer.load_learning_state(make("rvq").learning_state())


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_that_are_not_finite_do_not_affect_others(kind):
    quantizer, z = make(kind).eval(), latents(20)
    expected = quantizer(z).codes
    broken = z.clone()
    broken[3], broken[7, 2] = torch.nan, torch.inf
    codes = quantizer(broken).codes
    whole = [place for place in range(20) if place not in (3, 7)]
    assert torch.equal(codes[whole], expected[whole]) and ((codes >= 0) & (codes < 64)).all()


# Against vector-quantize-pytorch -----------------------------------------------------------------------------------


def test_one_level_of_simvq_equals_the_library():
    library = pytest.importorskip("vector_quantize_pytorch")
    ours = SimVQuantizer(1, 64, 8, gradient="rotation").train()
    theirs = library.SimVQ(8, 64, rotation_trick=True, input_to_quantize_commit_loss_weight=0.25)
    theirs.frozen_codebook.copy_(ours.bases[0])
    theirs.code_transform.weight.data.copy_(ours.maps[0].detach().T)
    x, y = latents(50).view(2, 25, 8).requires_grad_(), latents(50).view(2, 25, 8).requires_grad_()
    result = ours(x)
    out, codes, loss = theirs(y)
    assert torch.equal(result.codes[..., 0], codes)
    torch.testing.assert_close(result.latents_at(1), out)
    own_loss = result.codebook_loss + 0.25 * result.commitment_loss
    torch.testing.assert_close(own_loss, loss)
    weight = torch.randn(2, 25, 8)
    ((result.latents_at(1) * weight).sum() + own_loss).backward()
    ((out * weight).sum() + loss).backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("levels", [[8, 5], [5, 5, 3], [7]])
def test_one_level_of_fsq_equals_the_library(levels):
    library = pytest.importorskip("vector_quantize_pytorch")
    ours = FiniteScalarQuantizer(1, int(np.prod(levels)), 8, levels=levels)
    theirs = library.FSQ(levels, dim=8, projection_has_bias=False)
    theirs.project_in.weight.data.copy_(ours.maps_in[0].detach())
    theirs.project_out.weight.data.copy_(ours.maps_out[0].detach().T)
    x, y = latents(50).view(2, 25, 8).requires_grad_(), latents(50).view(2, 25, 8).requires_grad_()
    result, (out, codes) = ours(x), theirs(y)
    assert torch.equal(result.codes[..., 0], codes.long())
    torch.testing.assert_close(result.latents_at(1), out)
    torch.testing.assert_close(ours.codebooks[0], theirs.project_out(theirs.implicit_codebook).detach())
    weight = torch.randn(2, 25, 8)
    (result.latents_at(1) * weight).sum().backward()
    (out * weight).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.maps_in.grad[0], theirs.project_in.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.maps_out.grad[0].T, theirs.project_out.weight.grad, rtol=1e-4, atol=1e-4)


def test_levels_of_fsq_quantize_the_residual_one_after_the_other():
    library = pytest.importorskip("vector_quantize_pytorch")
    ours, residual, codes = FiniteScalarQuantizer(3, 40, 8, levels=[8, 5]).eval(), latents(50), []
    ours.init_from(latents(seed=2))
    for level in range(3):
        layer = library.FSQ([8, 5], dim=8, projection_has_bias=False)
        layer.project_in.weight.data.copy_(ours.maps_in[level].detach())
        layer.project_out.weight.data.copy_(ours.maps_out[level].detach().T)
        out, index = layer(residual[None])
        residual = residual - out[0].detach()
        codes.append(index[0].long())
    assert torch.equal(ours(latents(50)).codes, torch.stack(codes, 1))


# Settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantizer": "lfq"}, "quantizer must be one of rvq, simvq, fsq, got 'lfq'"),
        (
            {"quantizer_gradient": "rotate"},
            "quantizer_gradient must be one of straight_through, rotation, got 'rotate'",
        ),
        ({"quantizer": "fsq", "quantizer_gradient": "rotation"}, "rotation is defined for a nearest code"),
        ({"quantizer": "fsq", "codebook_size": 31}, "codebook_size 31 is not a product of numbers from 3 to 8"),
        ({"quantizer": "fsq", "fsq_levels": [8, 8]}, "product is codebook_size 32, got the product 64"),
        ({"quantizer": "fsq", "fsq_levels": 8}, "fsq_levels: expected a list of whole numbers, got 8"),
        ({"quantizer": "fsq", "fsq_levels": [8.0, 4]}, "fsq_levels: expected a list of whole numbers"),
        ({"fsq_levels": [8, 4]}, r"fsq_levels \[8, 4\] has no effect on quantizer rvq"),
        ({"quantizer": "fsq", "codebook_size": 512, "codebook_dim": 2}, "8 x 8 x 8 values has 3 dimensions, more than"),
    ],
)
def test_settings_that_do_not_fit(fields, message):
    with pytest.raises(UserError, match=message):
        EvoTokConfig.preset("tiny", **fields)


def test_settings_reach_the_quantizer():
    fields = {"level_dropout": 0.3, "quantizer_gradient": "rotation"}
    for kind in ("rvq", "simvq"):
        assert (make(kind, **fields).level_dropout, make(kind, **fields).gradient) == (0.3, "rotation")
    assert make("fsq", fsq_levels=[16, 4], level_dropout=0.3).levels == [16, 4]
    assert isinstance(make("simvq"), SimVQuantizer) and isinstance(make("fsq"), FiniteScalarQuantizer)
    with pytest.raises(UserError, match="gradient must be one of"):
        SimVQuantizer(2, 8, 4, gradient="none")
    with pytest.raises(UserError, match="has the gradient straight_through"):
        FiniteScalarQuantizer(2, 8, 4, gradient="rotation")
    with pytest.raises(UserError, match="more than the latents"):
        FiniteScalarQuantizer(2, 512, 2)
