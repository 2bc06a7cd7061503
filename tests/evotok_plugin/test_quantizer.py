import numpy as np
import pytest
import torch

from evotok_plugin import ResidualVectorQuantizer
from evotok_plugin import quantizer as quantizer_module


def make(levels=4, size=64, dim=8, **options):
    torch.manual_seed(0)
    quantizer = ResidualVectorQuantizer(levels, size, dim, **options)
    quantizer.codebooks.mul_(0.7 ** torch.arange(levels)[:, None, None])
    return quantizer.eval()


def naive_rvq(vectors, codebooks):
    """Residual vector quantization as the definition has it, in float64."""
    residual, codes = np.asarray(vectors, np.float64), []
    for codebook in np.asarray(codebooks, np.float64):
        index = ((residual[:, None] - codebook[None]) ** 2).sum(-1).argmin(1)
        codes.append(index)
        residual = residual - codebook[index]
    return np.stack(codes, 1), residual


@pytest.mark.parametrize("blocks", [(1024, 4096), (7, 10)])
def test_codes_and_sums_are_those_of_the_definition(blocks, monkeypatch):
    quantizer, z = make(), torch.randn(50, 8)
    result = quantizer(z)
    codes, residual = naive_rvq(z, quantizer.codebooks)
    np.testing.assert_array_equal(result.codes.numpy(), codes)
    np.testing.assert_allclose(z - result.latents_at(4), residual, atol=1e-5)
    torch.testing.assert_close(quantizer.codes_to_latents(result.codes), result.latents_at(4))
    torch.testing.assert_close(quantizer.level_latents(result.codes)[:, :2].sum(1), result.latents_at(2))


def test_fewer_levels_are_a_prefix():
    quantizer, z = make(), torch.randn(2, 9, 8)
    whole, prefix = quantizer(z), quantizer(z, depth=2)
    assert prefix.codes.shape == (2, 9, 2) and torch.equal(prefix.codes, whole.codes[..., :2])
    with pytest.raises(ValueError, match="depth must lie in 1..2"):
        prefix.latents_at(3)
    with pytest.raises(ValueError, match="1..4"):
        quantizer(z, depth=5)


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


def test_ema_brings_codes_to_the_means_of_their_clusters():
    torch.manual_seed(1)
    centres = torch.tensor([[4.0, 0], [-4, 0], [0, 4]])
    quantizer = make(levels=1, size=3, dim=2, ema_decay=0.8, restart_threshold=0.0)
    quantizer.codebooks[0] = centres * 0.5
    quantizer.train()
    for _ in range(60):
        quantizer(centres.repeat(30, 1) + 0.1 * torch.randn(90, 2))
    torch.testing.assert_close(quantizer.codebooks[0], centres, atol=0.1, rtol=0)


def test_warm_up_only_restarts():
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
    torch.testing.assert_close(quantizer.codebooks[0, 0], z.mean(0))  # used: moved by its own vectors alone
    for code in quantizer.codebooks[0, 1:]:
        assert any(torch.equal(code, vector) for vector in z)


def test_learning_state_is_no_part_of_the_model():
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


def test_k_means_start_fits_the_data_better_than_chance():
    z = torch.randn(500, 8) * torch.linspace(0.1, 3, 8)
    quantizer = make(levels=2, size=32)
    before = quantizer(z).commitment_loss
    torch.manual_seed(0)
    quantizer.init_from(z)
    assert quantizer(z).commitment_loss < 0.5 * before


def _learn_on_ranks(rank, world_size, port, z, queue):
    import os

    import torch.distributed as dist

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    quantizer, restarting = make(restart_threshold=0.0).train(), make(restart_threshold=0.5).train()
    torch.manual_seed(100 + rank)
    for step in z.chunk(3):
        quantizer(step.chunk(world_size)[rank])
        restarting(step.chunk(world_size)[rank])
    queue.put((rank, quantizer.codebooks.numpy(), restarting.codebooks.numpy()))
    dist.destroy_process_group()


def test_two_processes_agree_and_equal_one_on_the_joint_batch():
    import multiprocessing
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    z = torch.randn(3 * 400, 8)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_learn_on_ranks, args=(rank, 2, port, z, queue)) for rank in range(2)]
    for child in children:
        child.start()
    results = sorted((queue.get(timeout=120) for _ in children), key=lambda result: result[0])
    for child in children:
        child.join(30)
    (_, first, first_restarting), (_, second, second_restarting) = results
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first_restarting, second_restarting)
    alone = make(restart_threshold=0.0).train()  # nothing random is left: the joint batch decides
    for step in z.chunk(3):
        alone(step)
    np.testing.assert_allclose(first, alone.codebooks.numpy(), atol=1e-5)
