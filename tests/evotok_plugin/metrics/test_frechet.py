"""The Fréchet distance against scipy, its statistics against numpy, and several processes against one."""

import multiprocessing
import os
import socket

import numpy as np
import pytest
import torch

from evotok_plugin.common.processes import Processes
from evotok_plugin.errors import UserError
from evotok_plugin.metrics.frechet import FeatureStatistics, frechet_distance

linalg = pytest.importorskip("scipy.linalg", reason="scipy, the reference, is not installed")


def statistics(features, batch_size=None):
    gathered = FeatureStatistics(features.shape[1])
    for batch in torch.from_numpy(features).split(batch_size or len(features)):
        gathered.update(batch)
    return gathered


def naive_distance(one, other):
    covariances = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    return ((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)


@pytest.fixture
def features(rng):
    """Two sets of 500 vectors in 24 correlated dimensions, whose scales differ by a factor of up to a thousand."""
    mix = rng.normal(size=(24, 24)) * np.logspace(-2, 1, 24)
    return rng.normal(size=(500, 24)) @ mix, rng.normal(size=(500, 24)) @ (mix + 0.3) + 0.2


def test_distance_agrees_with_scipy(features):
    assert frechet_distance(*map(statistics, features)) == pytest.approx(naive_distance(*features), rel=1e-6)


def test_fewer_vectors_than_dimensions_are_measured_in_their_span(rng):
    inner = rng.normal(size=(12, 8)), rng.normal(size=(15, 8)) + 0.5
    embedding = np.linalg.qr(rng.normal(size=(300, 8)))[0].T  # preserves lengths and angles
    outer = [statistics(vectors @ embedding) for vectors in inner]
    assert frechet_distance(*outer) == pytest.approx(naive_distance(*inner), rel=1e-6)


def test_the_distance_to_itself_is_zero_and_to_a_shifted_copy_the_squared_shift(features):
    one, shifted = statistics(features[0]), statistics(features[0] + 3)
    scale = float(one.covariance().trace())
    assert frechet_distance(one, one) < 1e-9 * scale
    assert frechet_distance(one, shifted) == pytest.approx(24 * 9, rel=1e-6)


def test_constant_vectors_have_a_distance():
    assert frechet_distance(statistics(np.zeros((3, 4))), statistics(np.ones((5, 4)))) == pytest.approx(4)


def test_statistics_equal_those_of_numpy_for_any_batch_size(features):
    gathered = statistics(features[0].astype(np.float32), batch_size=7)
    exact = features[0].astype(np.float32).astype(np.float64)
    np.testing.assert_allclose(gathered.mean(), exact.mean(0), rtol=1e-12)
    np.testing.assert_allclose(gathered.covariance(), np.cov(exact, rowvar=False), rtol=1e-9, atol=1e-12)


def _distance_on_rank(rank, port, features, queue):
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    parts = [statistics(vectors[rank::2][: 250 - 30 * rank]) for vectors in features]
    for part in parts:
        part.add_up(Processes(rank, 2, torch.device("cpu")))
    queue.put((frechet_distance(*parts), int(parts[0].count)))
    dist.destroy_process_group()


def test_two_processes_equal_one(features):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_distance_on_rank, args=(rank, port, features, queue)) for rank in range(2)]
    for child in children:
        child.start()
    found = [queue.get(timeout=900) for _ in children]
    for child in children:
        child.join(30)
    joint = [np.concatenate([vectors[0::2], vectors[1::2][:220]]) for vectors in features]
    alone = frechet_distance(*map(statistics, joint))
    for distance, count in found:
        assert distance == pytest.approx(alone, rel=1e-9) and count == 470


def test_statistics_are_saved_and_loaded(features, tmp_path):
    written = statistics(features[0])
    written.save(tmp_path / "s.safetensors")
    read = FeatureStatistics.load(tmp_path / "s.safetensors", 24)
    assert all(torch.equal(getattr(read, name), value) for name, value in vars(written).items())
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]
    with pytest.raises(UserError, match="does not hold feature statistics of width 25"):
        FeatureStatistics.load(tmp_path / "s.safetensors", 25)
    (tmp_path / "s.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match="cannot be read"):
        FeatureStatistics.load(tmp_path / "s.safetensors", 24)
    with pytest.raises(UserError, match="cannot be written"):
        written.save(tmp_path / "absent" / "s.safetensors")


def test_features_without_a_distance_are_rejected(features):
    one = statistics(features[0])
    with pytest.raises(ValueError, match="features of equal width, got 24 and 3"):
        frechet_distance(one, statistics(np.ones((4, 3))))
    with pytest.raises(UserError, match="at least 2 feature vectors, got 1"):
        frechet_distance(one, statistics(features[1][:1]))
    with pytest.raises(ValueError, match=r"expected features \(B, 24\), got \(2, 3\)"):
        one.update(torch.ones(2, 3))
    with pytest.raises(UserError, match="not finite"):
        one.update(torch.full((1, 24), torch.nan))
