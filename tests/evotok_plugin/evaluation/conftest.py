import dataclasses

import pytest
import torch
from evaluation_inputs import DIM, SmallNetwork, digest_of

from evotok_plugin import EvoTokImageProcessor, EvoTokModel
from evotok_plugin.evaluation import evaluate as evaluation
from evotok_plugin.evaluation import meters, statistics_cache
from evotok_plugin.losses import perceptual
from evotok_plugin.metrics import inception
from evotok_plugin.teacher import load_teacher
from evotok_plugin.training.teacher import build_siglip


@pytest.fixture(scope="module")
def model(tiny_evotok_folder):
    return EvoTokModel.from_pretrained(tiny_evotok_folder).eval()


@pytest.fixture(scope="module")
def processor(tiny_evotok_folder):
    return EvoTokImageProcessor.from_pretrained(tiny_evotok_folder)


@pytest.fixture(scope="module")
def tower(model):
    torch.manual_seed(1)
    return build_siglip(model.config, 500, 8).vision_model.eval()


@pytest.fixture(scope="module")
def teacher_folder(tower, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    tower.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(teacher_folder):
    return load_teacher(str(teacher_folder))


@pytest.fixture
def network(monkeypatch):
    """A small network in place of Inception."""
    small = SmallNetwork()
    monkeypatch.setattr(evaluation, "load_inception", lambda weights: small)
    for module in (meters, statistics_cache):
        monkeypatch.setattr(module, "INCEPTION_DIM", DIM)
    return small


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub folder of torch, from which nothing can be downloaded."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    for module, name in ((inception, "INCEPTION"), (perceptual, "VGG16")):
        nowhere = dataclasses.replace(getattr(module, name), url="http://127.0.0.1:9/weights")
        monkeypatch.setattr(module, name, nowhere)
    yield folder
    torch.hub.set_dir(before)


@pytest.fixture
def vgg16(hub, monkeypatch):
    """Random VGG16 weights in the hub folder; the classifier, which LPIPS does not use, is not stored in full."""
    torchvision = pytest.importorskip("torchvision")
    pytest.importorskip("lpips", reason="the package lpips is not installed")
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in torchvision.models.vgg16(weights=None).state_dict().items()}
    state = {
        name: torch.randn(shape) * (2 / max(shape[1:].numel(), 1)) ** 0.5
        if name.startswith("features")
        else torch.zeros(1).expand(shape)
        for name, shape in shapes.items()
    }
    path = hub / perceptual.VGG16.names[0]
    torch.save(state, path)
    monkeypatch.setattr(perceptual, "VGG16", dataclasses.replace(perceptual.VGG16, digest=digest_of(path)))
    return path
