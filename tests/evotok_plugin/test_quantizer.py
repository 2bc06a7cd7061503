"""Residual quantization, its search and its learning against naive computations, and several processes against one."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from evotok_plugin import EvoTokConfig, EvoTokModel, ResidualVectorQuantizer, code_search
from evotok_plugin.common.processes import Processes
from evotok_plugin.errors import UserError
from evotok_plugin.kernels.half_maxima import HalfMaxima, can_use_bfloat16
from evotok_plugin.metrics.codes import CodeUsage


def make(levels=4, size=64, dim=8, **options):
    torch.manual_seed(0)
    quantizer = ResidualVectorQuantizer(levels, size, dim, **options)
    quantizer.codebooks.mul_(0.7 ** torch.arange(levels)[:, None, None])
    return quantizer.eval()


def naive_rvq(vectors, codebooks):
    """Residual vector quantization by its definition, in float64."""
    residual, codes = np.asarray(vectors, np.float64), []
    for codebook in np.asarray(codebooks, np.float64):
        index = ((residual[:, None] - codebook[None]) ** 2).sum(-1).argmin(1)
        codes.append(index)
        residual = residual - codebook[index]
    return np.stack(codes, 1), residual


def assert_codes_are_exact(codes, vectors, codebooks):
    """Each level's code must be a nearest one, up to float64 rounding, to the residual that the earlier codes leave."""
    residual = vectors.double()
    for level, codebook in enumerate(codebooks.double()):
        chosen = codes[:, level]
        for rows in torch.arange(vectors.shape[0]).split(64):
            distances = (residual[rows, None] - codebook).square().sum(-1)
            taken = distances.gather(1, chosen[rows, None])[:, 0]
            least = distances.amin(dim=1)
            assert (taken <= least * (1 + 1e-12) + 1e-300).all(), f"level {level}: a nearer code was missed"
        residual = residual - codebook[chosen]


@pytest.fixture(params=["float64", "groups", "crowd", "bfloat16"])
def search_path(request, monkeypatch):
    """Select a path of the torch search regardless of codebook size, with small blocks so that there are several."""
    if request.param == "bfloat16" and not can_use_bfloat16(torch.empty(0)):
        pytest.skip("this CPU or PyTorch has no products in bfloat16")
    monkeypatch.setattr(code_search, "can_use_bfloat16", lambda like: request.param == "bfloat16")
    if request.param != "float64":
        monkeypatch.setattr(code_search, "_MANY_GROUPS", 0 if request.param == "crowd" else 10**6)
        for name, value in (("_SMALL_CODEBOOK", 0), ("_BFLOAT16_VECTORS", 0), ("_GROUP", 4), ("_GROUPS_TOGETHER", 3)):
            monkeypatch.setattr(code_search, name, value)
        monkeypatch.setattr(code_search, "_CPU_VECTORS", 7)
        monkeypatch.setattr(code_search, "_CPU_SCORES", 100)
    else:
        monkeypatch.setattr(code_search, "_FLOAT64_SCORES", 300)
    return request.param


def test_codes_and_sums_match_a_naive_search(search_path):
    quantizer, z = make(), torch.randn(50, 8)
    result = quantizer(z)
    codes, residual = naive_rvq(z, quantizer.codebooks)
    np.testing.assert_array_equal(result.codes.numpy(), codes)
    np.testing.assert_allclose(z - result.latents_at(4), residual, atol=1e-5)
    torch.testing.assert_close(quantizer.codes_to_latents(result.codes), result.latents_at(4))
    torch.testing.assert_close(quantizer.level_latents(result.codes)[:, :2].sum(1), result.latents_at(2))


@pytest.mark.parametrize(("num_vectors", "size", "dim"), [(1, 65, 3), (130, 1027, 16), (70, 2500, 32)])
def test_the_grouped_search_equals_a_float64_search(num_vectors, size, dim, monkeypatch):
    monkeypatch.setattr(code_search, "_SMALL_CODEBOOK", 0)
    torch.manual_seed(size)
    z, codebooks = torch.randn(num_vectors, dim), torch.randn(3, size, dim) * torch.tensor([1, 0.5, 0.1])[:, None, None]
    assert_codes_are_exact(code_search.residual_codes(z, codebooks), z, codebooks)


def nearly_tied(size=400, dim=16):
    """Codes that float32 cannot tell apart: a few units in the last place from five centers far from the origin."""
    torch.manual_seed(3)
    centers = torch.randn(5, dim) + 30
    codes = centers[torch.randint(5, (size,))]
    codes = codes * (1 + 2.0**-22 * torch.randint(-4, 5, codes.shape))
    return centers[torch.randint(5, (90,))] + 1e-3 * torch.randn(90, dim), codes[None]


def test_float64_decides_when_float32_cannot(search_path):
    z, codebooks = nearly_tied()
    float32_scores = z @ codebooks[0].T - codebooks[0].square().sum(1) / 2
    with pytest.raises(AssertionError, match="nearer code"):
        assert_codes_are_exact(float32_scores.argmax(1)[:, None], z, codebooks)
    assert_codes_are_exact(code_search.residual_codes(z, codebooks), z, codebooks)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_codes_are_exact_when_vectors_and_codes_are_of_different_scales(scale, search_path):
    torch.manual_seed(4)
    z, codebooks = torch.randn(60, 8), scale * torch.randn(2, 300, 8)
    codebooks[:, ::7] *= 1e3  # distant codes that no vector chooses
    assert_codes_are_exact(code_search.residual_codes(z, codebooks), z, codebooks)


def test_codes_are_exact_where_all_scores_are_negative(search_path):
    """Vectors near the origin, mixed with others."""
    torch.manual_seed(6)
    z, codebooks = torch.randn(60, 8), torch.randn(2, 300, 8) + 3
    z[::2] *= 1e-3
    z[3] = 0
    assert_codes_are_exact(code_search.residual_codes(z, codebooks), z, codebooks)


def test_codes_are_exact_where_bfloat16_cannot_tell_them_apart(search_path):
    torch.manual_seed(7)
    centers = torch.randn(3, 16)
    codebooks = (centers[torch.randint(3, (500,))] * (1 + 1e-4 * torch.randn(500, 16)))[None]
    z = centers[torch.randint(3, (80,))] + 0.01 * torch.randn(80, 16)
    assert_codes_are_exact(code_search.residual_codes(z, codebooks), z, codebooks)


@pytest.mark.parametrize("scales", [(1, 1), (1e-3, 1), (100, 0.3), (1e3, 1e-2)])
def test_maxima_in_bfloat16_reach_the_bound_of_every_nearer_code(scales):
    """The true score of the nearest code minus the slack is a bound for the maximum of its group, often a tight one."""
    if not can_use_bfloat16(torch.empty(0)):
        pytest.skip("this CPU or PyTorch has no products in bfloat16")
    torch.manual_seed(8)
    z, codebook = scales[0] * torch.randn(700, 32, dtype=torch.float64), scales[1] * torch.randn(2000, 32)
    half = HalfMaxima(2000, 32, 63, 32, 64, 16, 700)
    half.signed = True
    half.start(z, codebook)
    maxima, slack = half.of_block(z)
    scores = z @ codebook.double().T - codebook.double().square().sum(dim=1) / 2
    every = torch.nn.functional.pad(scores, (0, 16), value=-torch.inf).unflatten(1, (63, 32)).amax(dim=2).T
    reached = maxima[:63] >= HalfMaxima.bounds((every - slack).float())
    assert reached.all() and (maxima[63:] == -(2**15)).all()
    spread = scores.std(dim=1).mean()
    assert not (maxima[:63] >= HalfMaxima.bounds((every + 0.1 * spread).float())).all(), "a bound above the scores"


def test_codes_do_not_depend_on_the_default_device(search_path):
    torch.manual_seed(9)
    z, codebooks = torch.randn(60, 8), torch.randn(2, 300, 8)
    with torch.device("meta"):
        codes = code_search.residual_codes(z, codebooks)
    assert_codes_are_exact(codes, z, codebooks)


def test_duplicate_codes_are_handled(search_path):
    torch.manual_seed(5)
    z, codes = torch.randn(40, 8), torch.randn(9, 8)
    many = codes[torch.randint(9, (300,))]
    assert_codes_are_exact(code_search.residual_codes(z, many[None]), z, many[None])
    assert (code_search.nearest_codes(z, torch.zeros(300, 8)) < 300).all()


def test_nan_and_infinite_vectors_do_not_affect_other_vectors(search_path):
    z, codebook = torch.randn(20, 8), torch.randn(299, 8)
    expected = code_search.nearest_codes(z, codebook)
    broken = z.clone()
    broken[3], broken[4, 2] = torch.nan, torch.inf
    codes = code_search.nearest_codes(broken, codebook)
    assert ((codes >= 0) & (codes < 299)).all()
    whole = torch.arange(20).sub(3).abs().sub(0.5).abs() > 0.5
    assert torch.equal(codes[whole], expected[whole])
    assert code_search.nearest_codes(z[:0], codebook).shape == (0,)


def test_matmul_precision_does_not_change_codes(search_path):
    z, codebooks = nearly_tied()
    expected = code_search.residual_codes(z, codebooks)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(code_search.residual_codes(z, codebooks), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_search_memory_does_not_grow_with_vectors_times_codes():
    """At the paper's sizes, where all scores would take 256 MiB."""
    z, codebooks = torch.randn(2048, 32), torch.randn(1, 32768, 32)
    with torch.profiler.profile(profile_memory=True) as profile:
        codes = code_search.residual_codes(z, codebooks)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 0 < peak < 32 * 2**20, f"{peak / 2**20:.1f} MiB"
    assert_codes_are_exact(codes[:64], z[:64], codebooks)


def test_a_module_in_half_precision_keeps_float32_codebooks():
    quantizer, z = make(), torch.randn(2, 5, 8)
    expected = quantizer(z).codes
    rounded = make().to(torch.bfloat16)
    assert torch.equal(rounded.codebooks, quantizer.codebooks) and torch.equal(rounded(z).codes, expected)
    assert torch.equal(make().half().double().float()(z).codes, expected)


def test_a_model_loaded_in_half_precision_keeps_float32_codebooks(tiny_evotok_folder):
    whole = EvoTokModel.from_pretrained(tiny_evotok_folder)
    half = EvoTokModel.from_pretrained(tiny_evotok_folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.quantizer.codebooks, whole.quantizer.codebooks)
    output = half(torch.zeros(1, 3, 48, 48, dtype=torch.bfloat16))
    assert output.pixels.dtype == output.features.dtype == torch.bfloat16


def test_the_compiled_search_is_a_single_operator_of_the_graph():
    quantizer, z = make(), torch.randn(2, 5, 8)
    compiled = torch.compile(lambda z: quantizer(z, depth=3).codes, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(z), quantizer(z, depth=3).codes)
    torch.library.opcheck(torch.ops.evotok.residual_codes, (z[0], quantizer.codebooks))


TRITON_CHECK = """
import sys
import types
import torch
package = types.ModuleType("evotok_plugin")  # skips the imports of the package, which take longer than the test
package.__path__ = [sys.argv[1]]
sys.modules["evotok_plugin"] = package
torch.set_num_threads(1)
from evotok_plugin import code_search
from evotok_plugin.kernels import residual_search
residual_search.BLOCK_M, residual_search.BLOCK_K = 32, 16
def check(z, codebooks):
    assert torch.equal(residual_search.residual_codes(z, codebooks), code_search.residual_codes(z, codebooks))
torch.manual_seed(0)
check(torch.randn(33, 5), torch.randn(2, 40, 5) * torch.tensor([1, 0.5])[:, None, None])
check(1e-3 * torch.randn(5, 32), torch.randn(1, 20, 32))
# Every tile holds codes that differ by a few units in the last place, so more than two tiles are candidates.
codebook = (torch.randn(5, 8) + 30)[torch.arange(60) % 5]
codebook = codebook * (1 + 2.0**-22 * torch.randint(-9, 10, codebook.shape))
z = codebook[torch.randint(60, (30,))] + 1e-3 * torch.randn(30, 8)
float32_codes = (z @ codebook.T - codebook.square().sum(1) / 2).argmax(1)
assert not torch.equal(float32_codes, code_search.nearest_codes(z, codebook))
check(z, codebook[None])
codes = residual_search.residual_codes(torch.full((2, 8), torch.nan), codebook[None])
assert ((codes >= 0) & (codes < 60)).all()
"""


def test_the_triton_kernel_gives_the_same_codes_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-c", TRITON_CHECK, os.path.dirname(code_search.__file__)]
    environment = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [True, False])
def test_codes_on_a_gpu_equal_those_on_the_cpu(fused, monkeypatch):
    if fused:
        pytest.importorskip("triton")
    else:
        monkeypatch.setattr(code_search, "_kernel", lambda: None)
    torch.manual_seed(0)
    cases = [(torch.randn(300, 32), torch.randn(4, 4099, 32) * 0.7 ** torch.arange(4)[:, None, None]), nearly_tied()]
    for z, codebooks in cases:
        codes = code_search.residual_codes(z.cuda(), codebooks.cuda())
        assert_codes_are_exact(codes.cpu(), z, codebooks)


def test_codes_at_a_lower_depth_are_a_prefix():
    quantizer, z = make(), torch.randn(2, 9, 8)
    whole, prefix = quantizer(z), quantizer(z, depth=2)
    assert prefix.codes.shape == (2, 9, 2) and torch.equal(prefix.codes, whole.codes[..., :2])
    with pytest.raises(ValueError, match="depth must be in 1..2"):
        prefix.latents_at(3)
    with pytest.raises(UserError, match="1..4"):
        quantizer(z, depth=5)
    with pytest.raises(ValueError, match=r"expected latents \(..., 8\)"):
        quantizer(torch.randn(2, 9, 7))


def test_autocast_does_not_change_codes():
    quantizer, z = make(size=512), torch.randn(400, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer(z).codes, quantizer(z.clone()).codes)
        mixed = quantizer(z).codes
    assert torch.equal(mixed, quantizer(z).codes)


def test_commitment_loss_and_straight_through_gradient():
    quantizer = make()
    z = torch.randn(20, 8, requires_grad=True)
    result = quantizer(z)
    expected = torch.stack([(z.detach() - result.latents_at(d).detach()).square().mean() for d in range(1, 5)]).mean()
    torch.testing.assert_close(result.commitment_loss.detach(), expected)
    result.latents_at(3).sum().backward()
    torch.testing.assert_close(z.grad, torch.ones_like(z))


def test_codes_converge_to_their_cluster_means():
    torch.manual_seed(1)
    centers = torch.tensor([[4.0, 0], [-4, 0], [0, 4]])
    quantizer = make(levels=1, size=3, dim=2, ema_decay=0.8, restart_threshold=0.0)
    quantizer.codebooks[0] = centers * 0.5
    quantizer.train()
    for _ in range(60):
        quantizer(centers.repeat(30, 1) + 0.1 * torch.randn(90, 2))
    torch.testing.assert_close(quantizer.codebooks[0], centers, atol=0.1, rtol=0)


@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_codes_follow_the_moving_averages_of_counts_and_sums(warmup_steps):
    decay, z = 0.9, torch.randn(6, 200, 4)
    quantizer = make(levels=1, size=8, dim=4, ema_decay=decay, restart_threshold=0.0, warmup_steps=warmup_steps)
    code, counts = quantizer.codebooks[0].double().numpy().copy(), np.ones(8)
    sums = code * counts[:, None]
    quantizer.train()
    for step, vectors in enumerate(z):
        quantizer(vectors)
        chosen = ((vectors.double().numpy()[:, None] - code) ** 2).sum(-1).argmin(1)
        new = np.bincount(chosen, minlength=8)
        counts = decay * counts + (1 - decay) * new
        if step < warmup_steps:
            sums = code * counts[:, None]  # the code stays, with its current weight
        else:
            sums *= decay
            np.add.at(sums, chosen, (1 - decay) * vectors.double().numpy())
            code = sums / counts[:, None]
        np.testing.assert_allclose(quantizer.codebooks[0], code, atol=1e-5)


def test_nan_vectors_leave_codebooks_unchanged():
    quantizer = make().train()
    before = quantizer.codebooks.clone()
    z = torch.randn(30, 8)
    z[3, 2] = torch.nan
    assert torch.isnan(quantizer(z).commitment_loss)
    assert torch.equal(quantizer.codebooks, before)


def test_level_dropout_only_affects_the_input_of_decoders():
    z = torch.randn(64, 5, 8)
    whole, dropping = make().train(), make(level_dropout=0.5).train()
    torch.manual_seed(0)
    expected = whole(z)
    torch.manual_seed(0)
    result = dropping(z)
    assert torch.equal(result.codes, expected.codes) and torch.equal(result.commitment_loss, expected.commitment_loss)
    shown, sums = result.latents_at(4), [expected.latents_at(depth) for depth in (1, 2, 3, 4)]
    depths = torch.stack([(shown - total).abs().amax(dim=(1, 2)) < 1e-6 for total in sums])
    assert (depths.sum(0) == 1).all()
    kept = depths.sum(1)
    assert (kept > 0).all() and 25 < kept[3] < 55  # half of the items, and a quarter of the others
    torch.testing.assert_close(result.latents_at(1), expected.latents_at(1))
    dropping.eval()
    torch.testing.assert_close(dropping(z).latents_at(4), dropping.codes_to_latents(dropping(z).codes))
    with pytest.raises(UserError, match="level_dropout must be between 0 and 1, got 1.5"):
        make(level_dropout=1.5)
    with pytest.raises(UserError, match="level_dropout must be between 0 and 1, got -0.1"):
        EvoTokConfig.preset("tiny", level_dropout=-0.1)
    assert EvoTokModel(EvoTokConfig.preset("tiny", level_dropout=0.25)).quantizer.level_dropout == 0.25


def test_warm_up_only_restarts_codes():
    quantizer = make(levels=1, size=4, dim=2, warmup_steps=2, restart_threshold=0.0)
    before = quantizer.codebooks.clone()
    quantizer.train()
    z = torch.randn(40, 2)
    quantizer(z), quantizer(z)
    assert torch.equal(quantizer.codebooks, before)
    quantizer(z)
    assert not torch.equal(quantizer.codebooks, before)


@pytest.mark.parametrize("by_error", [False, True])
def test_dead_codes_move_to_the_data_and_used_ones_stay(by_error):
    quantizer = make(levels=1, size=3, dim=2, ema_decay=0.0, restart_threshold=1.0, restart_by_error=by_error)
    quantizer.codebooks[0] = torch.tensor([[0.0, 0.0], [90.0, 90.0], [95.0, 95.0]])
    z = torch.tensor([[0.5, 0.5], [0.7, 0.3], [0.3, 0.7]])
    quantizer.train()
    quantizer(z)
    torch.testing.assert_close(quantizer.codebooks[0, 0], z.mean(0))  # in use: moved only by its own vectors
    for code in quantizer.codebooks[0, 1:]:
        assert any(torch.equal(code, vector) for vector in z)


@pytest.mark.parametrize("by_error", [False, True])
def test_restarts_draw_uniformly_or_by_error(by_error):
    quantizer = make(levels=1, size=513, dim=2, ema_decay=0.0, restart_by_error=by_error)
    quantizer.codebooks[0] = 90.0
    quantizer.codebooks[0, 0] = 0.0
    z = torch.tensor([[0.1, 0.0], [0.0, 0.1], [0.0, -0.2], [0.0, 0.0]])
    quantizer.train()
    quantizer(z)
    shares = (quantizer.codebooks[0, 1:, None] == z).all(-1).double().mean(0)
    expected = torch.tensor([1, 1, 4, 0]) / 6 if by_error else torch.full((4,), 0.25)
    torch.testing.assert_close(shares, expected.double(), atol=0.08, rtol=0)


def test_learning_state_is_not_part_of_the_model():
    quantizer = make().train()
    keys = set(quantizer.state_dict())
    quantizer(torch.randn(30, 8))
    assert set(quantizer.state_dict()) == keys == {"codebooks"}
    other = make()
    other.load_state_dict(quantizer.state_dict())
    other.load_learning_state(quantizer.learning_state())
    z = torch.randn(30, 8)
    other.train()
    for learner in (quantizer, other):
        torch.manual_seed(5)
        learner(z)
    assert torch.equal(quantizer.codebooks, other.codebooks)
    with pytest.raises(UserError, match=r"counts \(4, 64\).*need \(4, 32\)"):
        make(size=32).load_learning_state(quantizer.learning_state())


def test_k_means_initialization_fits_the_data_better_than_random_codebooks():
    z = torch.randn(500, 8) * torch.linspace(0.1, 3, 8)
    quantizer = make(levels=2, size=32)
    before = quantizer(z).commitment_loss
    torch.manual_seed(0)
    quantizer.init_from(z)
    assert quantizer(z).commitment_loss < 0.5 * before


LEARNERS = {
    "averages": {"restart_threshold": 0.0},
    "restarts": {},
    "by error": {"restart_by_error": True},
    "warm-up": {"warmup_steps": 2},
}


def learn(batches):
    """Codebooks and counts of every kind of learner after the batches."""
    codebooks = {}
    for name, options in LEARNERS.items():
        quantizer = make(size=300, ema_decay=0.8, **options).train()
        torch.manual_seed(100)
        for batch in batches:
            quantizer(batch)
        codebooks[name] = torch.cat([quantizer.codebooks.flatten(), quantizer.learning_state()["counts"].flatten()])
    return codebooks


def _learn_on_rank(rank, port, parts, queue):
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(rank)
    learned = {name: value.numpy() for name, value in learn(parts[rank]).items()}
    usage = CodeUsage(num_levels=1, codebook_size=2)
    usage.update(torch.tensor([[rank]]))
    usage.add_up(Processes.current())
    queue.put((rank, learned, usage.usage()))
    dist.destroy_process_group()


def test_two_processes_equal_one_on_the_joint_batch_bit_for_bit():
    import multiprocessing
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.manual_seed(7)
    z = torch.randn(4, 200, 8)
    parts = [z[:, :120], z[:, 120:]]  # batches of unequal size
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_learn_on_rank, args=(rank, port, parts, queue)) for rank in range(2)]
    for child in children:
        child.start()
    ranks = sorted((queue.get(timeout=900) for _ in children), key=lambda result: result[0])
    for child in children:
        child.join(30)
    alone = learn(z)
    for _, learned, usage in ranks:
        assert usage == [1.0]
        for name, expected in alone.items():
            np.testing.assert_array_equal(learned[name], expected.numpy(), err_msg=name)
    assert len({float(value.sum()) for value in alone.values()}) == len(LEARNERS)  # all learners differ
