"""Weights of Inception and VGG16: found, downloaded, checked and rejected."""

import dataclasses
import functools
import hashlib
import http.server
import io
import threading

import numpy as np
import pytest
import torch
from evaluation_inputs import Pictures, digest_of, options, reconstruct
from torch import nn

from evotok_plugin.common.hub_files import HubFile
from evotok_plugin.errors import UserError
from evotok_plugin.evaluation.evaluate import evaluate
from evotok_plugin.losses import perceptual
from evotok_plugin.metrics import inception


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory):
    """torch-fidelity's network with random weights, and the file that contains them."""
    package = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason="no torch-fidelity")

    class Random(package.FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            assert state == {}

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    torch.manual_seed(0)
    network = Random("random", ["2048"], feature_extractor_weights_path=empty)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)  # otherwise all images would have nearly equal features
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(network.state_dict(), path)
    return network, path


@pytest.fixture
def accepted(random_inception, monkeypatch):
    """The network and file of `random_inception`, whose digest is accepted."""
    network, path = random_inception
    monkeypatch.setattr(inception, "INCEPTION", dataclasses.replace(inception.INCEPTION, digest=digest_of(path)))
    return network, path


def test_inception_equals_torch_fidelity_s_network(accepted, rng):
    network, path = accepted
    images = torch.from_numpy(rng.integers(0, 256, (2, 3, 48, 48), dtype=np.uint8))
    loaded = inception.load_inception(path)
    (features,) = loaded(images)
    assert features.shape == (2, inception.INCEPTION_DIM) and torch.equal(features, network(images)[0])
    assert not loaded.training and not any(weight.requires_grad for weight in loaded.parameters())


@pytest.mark.parametrize("name", inception.INCEPTION.names)
def test_inception_is_found_in_the_hub_folder_under_either_name(accepted, hub, name):
    (hub / name).hardlink_to(accepted[1])
    assert inception.INCEPTION.fetch("...") == hub / name


def test_rfid_of_the_real_network(accepted, model, processor, tmp_path):
    given = options(metrics=["rfid"], inception_weights=accepted[1], stats_cache=tmp_path)
    source = Pictures(3)
    value = evaluate(model, processor, source, given).values["rfid"]
    means, parts = [], []
    for images in reconstruct(model, processor, source)[:2]:
        saved = np.stack([np.array(picture) for picture in processor.to_pil(images)])
        features = accepted[0](torch.from_numpy(saved).permute(0, 3, 1, 2))[0].double().numpy()
        means.append(features.mean(axis=0))
        parts.append((features - means[-1]) / np.sqrt(len(features) - 1))  # covariance = part^T part
    shared = np.linalg.norm(parts[0] @ parts[1].T, "nuc")
    expected = ((means[0] - means[1]) ** 2).sum() + sum((part**2).sum() for part in parts) - 2 * shared
    assert value == pytest.approx(expected, rel=1e-4) and value > 0.1


def test_other_weights_are_rejected(hub, tmp_path, random_inception):
    with pytest.raises(UserError, match=r"sha256 begins with [0-9a-f]{8}, expected 6726825d; the right one comes from"):
        inception.load_inception(random_inception[1])
    (hub / perceptual.VGG16.names[0]).write_bytes(b"something else")
    with pytest.raises(UserError, match="expected 397923af"):
        perceptual.load_lpips()
    with pytest.raises(UserError, match="absent.pth' cannot be read"):
        inception.load_inception(tmp_path / "absent.pth")


def test_the_errors_for_missing_weights_suggest_a_remedy(hub):
    with pytest.raises(UserError, match="does not exist and http.* cannot be fetched .*--inception_weights FILE"):
        inception.load_inception()
    with pytest.raises(UserError, match="does not exist and http.* cannot be fetched .*without lpips"):
        perceptual.load_lpips()
    assert not list(hub.iterdir())


@pytest.fixture
def server(tmp_path):
    """URL of an HTTP server with one file, `weights.pth`."""
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "weights.pth").write_bytes(b"weights")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_missing_weights_are_downloaded_once_and_checked(hub, server):
    file = HubFile(("w.pth",), f"{server}/weights.pth", hashlib.sha256(b"weights").hexdigest())
    assert file.fetch("...").read_bytes() == b"weights"
    assert dataclasses.replace(file, url="http://127.0.0.1:9/").fetch("...") == hub / "w.pth"
    for other in (
        dataclasses.replace(file, names=("x.pth",), digest="0" * 64),
        dataclasses.replace(file, names=("x.pth",), url=f"{server}/nothing"),
    ):
        with pytest.raises(UserError, match="cannot be fetched"):
            other.fetch("...")
    assert [path.name for path in hub.iterdir()] == ["w.pth"]
