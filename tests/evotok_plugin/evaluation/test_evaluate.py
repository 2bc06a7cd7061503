"""`evotok evaluate`: every figure against a plain computation, what is refused, several processes against one."""

import dataclasses
import functools
import hashlib
import http.server
import io
import json
import multiprocessing
import os
import socket
import threading
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from evotok_plugin import EvoTokImageProcessor, EvoTokModel
from evotok_plugin.cli import main
from evotok_plugin.common.hub_files import HubFile
from evotok_plugin.common.processes import Processes
from evotok_plugin.errors import UserError
from evotok_plugin.evaluation import evaluate as evaluation
from evotok_plugin.evaluation import meters
from evotok_plugin.evaluation.evaluate import EvaluationOptions, chosen_metrics, evaluate
from evotok_plugin.losses import perceptual
from evotok_plugin.metrics import inception
from evotok_plugin.metrics.frechet import FeatureStatistics
from evotok_plugin.metrics.image import psnr, ssim
from evotok_plugin.metrics.probes import in_classes, knn_accuracy, linear_probe_accuracy
from evotok_plugin.teacher import load_teacher
from evotok_plugin.training.teacher import build_siglip

DIM = 12  # of the small network that stands for Inception where only the way to it is tested


class Pictures:
    """Images of noise in four colours, which are their classes; counts how often each is decoded."""

    name = "pictures"

    def __init__(self, count=20, broken=(), labelled=True, seed=0):
        rng = np.random.default_rng(seed)
        colors = rng.integers(0, 256, (4, 3))
        noise = rng.integers(-40, 40, (count, 60, 52, 3))
        self.arrays = [(colors[i % 4] + noise[i]).clip(0, 255).astype(np.uint8) for i in range(count)]
        self.broken, self.labelled, self.decoded = set(broken), labelled, [0] * count

    def __len__(self):
        return len(self.arrays)

    def key(self, index):
        return f"{index}.png"

    def picture(self, index):
        self.decoded[index] += 1
        if index in self.broken:
            raise UserError(f"{index} is broken")
        return Image.fromarray(self.arrays[index])

    def label(self, index):
        return "abcd"[index % 4] if self.labelled else None

    def groups(self):
        return None


class SmallNetwork(nn.Module):
    """uint8 images to DIM features; counts the images it has seen."""

    def __init__(self):
        super().__init__()
        self.seen = 0
        self.weight = torch.randn(3 * 6 * 6, DIM, generator=torch.Generator().manual_seed(0))

    def forward(self, images):
        assert images.dtype == torch.uint8
        self.seen += len(images)
        return (F.adaptive_avg_pool2d(images.float() / 64, 6).flatten(1) @ self.weight,)


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
    """A small network in Inception's place."""
    small = SmallNetwork()
    monkeypatch.setattr(evaluation, "load_inception", lambda weights: small)
    for module in (meters, inception):
        monkeypatch.setattr(module, "INCEPTION_DIM", DIM)
    return small


def options(**given):
    return EvaluationOptions(batch_size=8, num_workers=0, **given)


@torch.no_grad()
def through(model, processor, source, skipped=()):
    """Pixel values, reconstructions and codes of all images, the plain way."""
    pictures = [Image.fromarray(a) for i, a in enumerate(source.arrays) if i not in skipped]
    pixel_values = processor(pictures).pixel_values
    codes = model.encode(pixel_values).codes
    return pixel_values, model.decode_pixels(codes[..., : model.config.pixel_depth]), codes


# Figures ------------------------------------------------------------------------------------------------------------


def test_psnr_and_ssim_are_means_over_images(model, processor):
    source = Pictures()
    values = evaluate(model, processor, source, options()).values
    pixel_values, pixels, _ = through(model, processor, source)
    assert values["psnr"] == pytest.approx(float(psnr(pixels, pixel_values).double().mean()), rel=1e-5)
    assert values["ssim"] == pytest.approx(float(ssim(pixels, pixel_values).double().mean()), rel=1e-4)
    assert values["images"] == 20 and values["bad_images"] == 0


def test_usage_and_perplexity_are_those_of_all_codes(model, processor):
    values = evaluate(model, processor, Pictures(), options(metrics=("usage",))).values
    codes = through(model, processor, Pictures())[2].flatten(0, 1)
    for level, column in enumerate(codes.unbind(1)):
        share = column.bincount(minlength=model.config.codebook_size) / len(column)
        assert values["code_usage"][level] == pytest.approx(float((share > 0).float().mean()))
        assert np.log(values["perplexity"][level]) == pytest.approx(float(torch.special.entr(share).sum()), rel=1e-5)


def test_teacher_cosine_is_measured_at_every_depth(model, processor, teacher, tower):
    source = Pictures(10)
    values = evaluate(model, processor, source, options(teacher=teacher)).values
    pixel_values, _, codes = through(model, processor, source)
    with torch.no_grad():
        target = tower(pixel_values, output_hidden_states=True).hidden_states[-2]
        expected = [
            float(F.cosine_similarity(model.decode_semantics(codes[..., :depth]), target, dim=-1).mean())
            for depth in range(1, 9)
        ]
    assert values["semantic_cosine"] == pytest.approx(expected, abs=1e-6) and len(set(expected)) == 8


def test_rfid_is_scipy_s_distance_of_the_features_of_saved_images(model, processor, network, tmp_path):
    linalg = pytest.importorskip("scipy.linalg", reason="scipy, the reference, is not installed")
    source = Pictures(40)
    values = evaluate(model, processor, source, options(metrics=("rfid",), stats_cache=tmp_path)).values
    features = []
    for images in through(model, processor, source)[:2]:
        saved = np.stack([np.array(picture) for picture in processor.to_pil(images)])
        features.append(network(torch.from_numpy(saved).permute(0, 3, 1, 2))[0].double().numpy())
    covariances = [np.cov(part, rowvar=False) for part in features]
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((features[0].mean(0) - features[1].mean(0)) ** 2).sum() + np.trace(sum(covariances) - 2 * root)
    assert values["rfid"] == pytest.approx(expected, rel=1e-5)


def test_probes_see_mean_pooled_features_at_semantic_depth(model, processor):
    source = Pictures(24)
    values = evaluate(model, processor, source, options()).values
    codes = through(model, processor, source)[2][..., : model.config.semantic_depth]
    with torch.no_grad():
        features = model.decode_semantics(codes).mean(dim=1).numpy()
    labels = [source.label(index) for index in range(24)]
    assert values["knn_accuracy"] == knn_accuracy(features, labels)
    assert values["linear_probe_accuracy"] == linear_probe_accuracy(features, labels)
    assert (values["probe_images"], values["probe_classes"]) == (24, 4)


def test_lpips_is_the_mean_of_the_package_s(model, processor, vgg16):
    source = Pictures(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = evaluate(model, processor, source, options(metrics=("lpips",))).values
    pixel_values, pixels, _ = through(model, processor, source)
    lpips = perceptual.load_lpips()
    with torch.no_grad():
        expected = float(lpips(pixels.clamp(-1, 1), pixel_values).mean())
        assert float(lpips(pixel_values, pixel_values).abs().max()) == 0
    assert values["lpips"] == pytest.approx(expected, rel=1e-4) and expected > 0


# Probes -------------------------------------------------------------------------------------------------------------


def test_neighbours_vote_as_in_a_plain_loop(rng):
    labels = [str(label) for label in rng.integers(0, 5, 60)]
    features = rng.normal(size=(60, 6)) + 0.8 * rng.normal(size=(5, 6))[np.array(labels, int)]
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    right = 0
    for i in range(60):
        cosines = {j: float(unit[i] @ unit[j]) for j in range(60) if j != i}
        votes = dict.fromkeys(labels, 0.0)
        for j in sorted(cosines, key=cosines.get)[-20:]:
            votes[labels[j]] += np.exp(cosines[j] / 0.07)
        right += max(votes, key=votes.get) == labels[i]
    assert 0.3 < right / 60 < 0.95 and knn_accuracy(features, labels) == right / 60


def test_probes_find_classes_that_are_there_and_no_others(rng):
    labels = ["a", "b"] * 50
    apart = rng.normal(size=(100, 8)) + np.array([[3.0], [-3.0]] * 50)
    alike = rng.normal(size=(100, 8))
    for accuracy in (knn_accuracy, linear_probe_accuracy):
        assert accuracy(apart, labels) == 1.0
        assert 0.3 < accuracy(alike, labels) < 0.7


def test_a_linear_probe_is_tested_on_images_it_was_not_trained_on(rng):
    labels = [str(label) for label in rng.integers(0, 2, 60)]
    features = rng.normal(size=(60, 200))  # more dimensions than images: any labelling of them can be learnt by heart
    assert linear_probe_accuracy(features, labels) < 0.75


def test_classes_of_one_image_are_not_probed():
    assert in_classes(["a", "b", "a", None, "b", "c"]).tolist() == [True, True, True, False, True, False]
    assert not in_classes(["a", "a", "b"]).any()


def test_probes_are_measured_where_there_are_labels(model):
    assert "probes" in chosen_metrics(options(), Pictures())
    assert "probes" not in chosen_metrics(options(metrics=["all"]), Pictures(labelled=False))
    with pytest.raises(ValueError, match="probes cannot be measured: 'pictures' has no 2 classes"):
        chosen_metrics(options(metrics=["psnr", "probes"]), Pictures(labelled=False))


def test_probes_are_left_out_when_broken_images_leave_no_classes(model, processor):
    source = Pictures(8, broken=(4, 5, 6))  # of three classes one image is left
    values = evaluate(model, processor, source, options(max_bad_fraction=0.5)).values
    assert values["images"] == 5 and "knn_accuracy" not in values


# Images -------------------------------------------------------------------------------------------------------------


def test_every_image_is_decoded_once(model, processor):
    source = Pictures(18, broken=[3])
    evaluate(model, processor, source, options(max_bad_fraction=0.1))
    assert source.decoded == [1] * 18


def test_images_decoded_in_the_background_give_the_same_figures(model, processor):
    source = Pictures(18, broken=[3])
    there = evaluate(model, processor, source, EvaluationOptions(batch_size=8, num_workers=2, max_bad_fraction=0.1))
    assert there.values == evaluate(model, processor, source, options(max_bad_fraction=0.1)).values
    assert sum(source.decoded) == 18  # in this process, by the second run alone


def test_broken_images_are_named_and_left_out(model, processor, tmp_path, caplog):
    source, report = Pictures(20, broken=(2, 9)), tmp_path / "bad_samples.jsonl"
    values = evaluate(model, processor, source, options(max_bad_fraction=0.1, report=report)).values
    pixel_values, pixels, _ = through(model, processor, source, skipped=(2, 9))
    assert values["psnr"] == pytest.approx(float(psnr(pixels, pixel_values).double().mean()), rel=1e-5)
    assert (values["images"], values["bad_images"]) == (18, 2)
    assert [json.loads(line)["sample"] for line in report.read_text().splitlines()] == ["2.png", "9.png"]
    assert "2.png (2 is broken), 9.png (9 is broken)" in caplog.text


def test_too_many_broken_images_stop_the_run_at_once(model, processor):
    source = Pictures(40, broken=range(8))
    with pytest.raises(ValueError, match=r"8 of 40 samples are unusable, over the limit of 10.00%"):
        evaluate(model, processor, source, options(max_bad_fraction=0.1))
    assert sum(source.decoded) == 8
    with pytest.raises(ValueError, match="none of the 3 images of 'pictures' can be read"):
        evaluate(model, processor, Pictures(3, broken=range(3)), options(max_bad_fraction=1.0))


def test_a_model_that_would_learn_is_refused(model, processor):
    learning = EvoTokModel(model.config).train()
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        evaluate(learning, processor, Pictures(4), options())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"metrics": ["psnr", "fid"]}, "unknown metric 'fid'; expected all, or some of psnr"),
        ({"metrics": ["cosine"]}, "give --teacher FOLDER"),
    ],
)
def test_metrics_that_cannot_be_had_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        chosen_metrics(options(**given), Pictures())
    with pytest.raises(ValueError, match="rfid cannot be measured: it needs at least 2 images"):
        chosen_metrics(options(metrics=["rfid"]), Pictures(1))


def test_a_teacher_of_other_images_is_refused(model, teacher):
    with pytest.raises(ValueError, match="its positions a side is 3, 6 is needed"):
        evaluate(model, EvoTokImageProcessor(size=96), Pictures(2), options(teacher=teacher))


# Several processes --------------------------------------------------------------------------------------------------


def _evaluate_on_rank(rank, port, work, queue):
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    queue.put((rank, work(processes=Processes(rank, 2, torch.device("cpu")))))
    dist.destroy_process_group()


def test_two_processes_find_what_one_finds(model, processor, teacher, network, tmp_path):
    source = Pictures(21, broken=(4, 15))
    wanted = [metric for metric in evaluation.METRICS if metric != "lpips"]
    given = {"metrics": wanted, "teacher": teacher, "max_bad_fraction": 0.2, "report": tmp_path / "bad.jsonl"}
    work = functools.partial(evaluate, model, processor, source)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    shared = functools.partial(work, options(**given, stats_cache=tmp_path / "two"))
    children = [context.Process(target=_evaluate_on_rank, args=(rank, port, shared, queue)) for rank in range(2)]
    for child in children:
        child.start()
    found = dict(queue.get(timeout=900) for _ in children)
    for child in children:
        child.join(30)
    alone = work(options(**given, stats_cache=tmp_path / "one"))
    assert found[1] is None and found[0].values.keys() == alone.values.keys()
    for name, value in alone.values.items():
        assert found[0].values[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-6)), name
    assert found[0].grid().tobytes() == alone.grid().tobytes()


# Originals' statistics ----------------------------------------------------------------------------------------------


def test_the_originals_statistics_are_made_once(model, processor, network, tmp_path):
    given = options(metrics=("rfid",), stats_cache=tmp_path)
    first = evaluate(model, processor, Pictures(10), given).values
    assert network.seen == 20
    assert evaluate(model, processor, Pictures(10), given).values == first
    assert network.seen == 30 and len(list(tmp_path.iterdir())) == 1


def test_other_images_under_the_same_names_have_statistics_of_their_own(model, processor, network, tmp_path):
    given = options(metrics=("rfid",), stats_cache=tmp_path)
    for processed, source in ((processor, Pictures(10)), (processor, Pictures(10, seed=1)), (96, Pictures(10))):
        processed = EvoTokImageProcessor(size=96) if processed == 96 else processed
        evaluate(model, processed, source, given)
    assert network.seen == 60 and len(list(tmp_path.iterdir())) == 3


def test_statistics_that_lack_an_image_are_not_kept_and_spoiled_ones_are_made_again(
    model, processor, network, tmp_path
):
    given = options(metrics=("rfid",), stats_cache=tmp_path, max_bad_fraction=0.2)
    evaluate(model, processor, Pictures(10, broken=[1]), given)
    assert not list(tmp_path.iterdir())
    value = evaluate(model, processor, Pictures(10), given).values["rfid"]
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(b"cut off")
    assert evaluate(model, processor, Pictures(10), given).values["rfid"] == value
    assert FeatureStatistics.load(kept, DIM).count == 10


# Weights ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub folder of torch's; nothing can be fetched to it."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    for module, name in ((inception, "INCEPTION"), (perceptual, "VGG16")):
        nowhere = dataclasses.replace(getattr(module, name), url="http://127.0.0.1:9/weights")
        monkeypatch.setattr(module, name, nowhere)
    yield folder
    torch.hub.set_dir(before)


def digest_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def vgg16(hub, monkeypatch):
    """Random VGG16 weights in the hub folder; the classifier, which LPIPS does not use, takes no space."""
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


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory):
    """torch-fidelity's network with random weights, and a file of them."""
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
            nn.init.kaiming_normal_(module.weight)  # else all images would look alike to it
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(network.state_dict(), path)
    return network, path


@pytest.fixture
def accepted(random_inception, monkeypatch):
    """The random weights count as the right ones."""
    network, path = random_inception
    monkeypatch.setattr(inception, "INCEPTION", dataclasses.replace(inception.INCEPTION, digest=digest_of(path)))
    return network, path


def test_inception_is_torch_fidelity_s_with_the_weights_of_the_file(accepted, rng):
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
    for images in through(model, processor, source)[:2]:
        saved = np.stack([np.array(picture) for picture in processor.to_pil(images)])
        features = accepted[0](torch.from_numpy(saved).permute(0, 3, 1, 2))[0].double().numpy()
        means.append(features.mean(axis=0))
        parts.append((features - means[-1]) / np.sqrt(len(features) - 1))  # covariance = part^T part
    shared = np.linalg.norm(parts[0] @ parts[1].T, "nuc")
    expected = ((means[0] - means[1]) ** 2).sum() + sum((part**2).sum() for part in parts) - 2 * shared
    assert value == pytest.approx(expected, rel=1e-4) and value > 0.1


def test_other_weights_are_refused(hub, tmp_path, random_inception):
    with pytest.raises(
        ValueError, match=r"sha256 begins with [0-9a-f]{8}, expected 6726825d; the right one comes from"
    ):
        inception.load_inception(random_inception[1])
    (hub / perceptual.VGG16.names[0]).write_bytes(b"something else")
    with pytest.raises(ValueError, match="expected 397923af"):
        perceptual.load_lpips()
    with pytest.raises(ValueError, match="absent.pth' cannot be read"):
        inception.load_inception(tmp_path / "absent.pth")


def test_absent_weights_are_refused_with_the_way_out(hub):
    with pytest.raises(ValueError, match="does not exist and http.* cannot be fetched .*--inception_weights FILE"):
        inception.load_inception()
    with pytest.raises(ValueError, match="does not exist and http.* cannot be fetched .*without lpips"):
        perceptual.load_lpips()
    assert not list(hub.iterdir())


@pytest.fixture
def server(tmp_path):
    """An HTTP server of one file, `weights.pth`."""
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


def test_absent_weights_are_fetched_once_and_checked(hub, server):
    file = HubFile(("w.pth",), f"{server}/weights.pth", hashlib.sha256(b"weights").hexdigest())
    assert file.fetch("...").read_bytes() == b"weights"
    assert dataclasses.replace(file, url="http://127.0.0.1:9/").fetch("...") == hub / "w.pth"
    for other in (
        dataclasses.replace(file, names=("x.pth",), digest="0" * 64),
        dataclasses.replace(file, names=("x.pth",), url=f"{server}/nothing"),
    ):
        with pytest.raises(ValueError, match="cannot be fetched"):
            other.fetch("...")
    assert [path.name for path in hub.iterdir()] == ["w.pth"]


# The command --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Two folders of images, which are two classes."""
    for index, array in enumerate(Pictures(12).arrays):
        path = tmp_path / "images" / "ab"[index % 2] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
    return tmp_path / "images"


def run(capsys, *arguments):
    code = main(["evaluate", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_folder_gets_figures_table_and_grid(capsys, folder, tiny_evotok_folder, teacher_folder, tmp_path):
    out = tmp_path / "new" / "out"
    code, text, _ = run(
        capsys, folder, "--model", tiny_evotok_folder, "-o", out, "--teacher", teacher_folder, "--num_workers", 0
    )
    values = json.loads((out / "metrics.json").read_text())
    assert code == 0 and {path.name for path in out.iterdir()} == {"metrics.json", "metrics.md", "grid.png"}
    assert (out / "metrics.md").read_text() in text and f"{values['psnr']:.2f} dB" in text
    assert f"{values['knn_accuracy']:.1%}" in text and f"{values['semantic_cosine'][7]:.4f}" in text
    assert values["model"] == str(tiny_evotok_folder) and values["images"] == 12 and values["probe_classes"] == 2
    assert Image.open(out / "grid.png").size == (12 * 100 - 4, 2 * 100 - 4)


def test_a_json_path_gets_the_figures_alone(capsys, folder, tiny_evotok_folder, tmp_path):
    out = tmp_path / "some" / "e.json"
    assert run(capsys, folder, "--model", tiny_evotok_folder, "-o", out, "--metrics", "psnr", "--size", 96)[0] == 0
    values = json.loads(out.read_text())
    assert values["image_size"] == 96 and "psnr" in values and "ssim" not in values
    assert [path.name for path in out.parent.iterdir()] == ["e.json"]


def test_the_grid_has_each_original_over_its_reconstruction(model, processor):
    source = Pictures(14)
    grid = np.array(evaluate(model, processor, source, options(num_pictures=14)).grid())
    pixel_values, pixels, _ = through(model, processor, source)
    for index in (0, 11, 12):
        row, column = 2 * (index // 12), index % 12
        for below, images in enumerate((pixel_values, pixels)):
            cell = grid[(row + below) * 100 :, column * 100 :][:96:2, :96:2]
            np.testing.assert_allclose(cell, processor.to_pil(images[index : index + 1])[0], atol=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metrics", "rfid", "--inception_weights", "{folder}/a/00.png"], "expected 6726825d"),
        (["--metrics", "fid"], "unknown metric 'fid'"),
        (["--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["-o", "{folder}/a/00.png"], "expected a folder or NAME.json"),
        (["--size", "50"], "--size must be a multiple of the patch size"),
    ],
)
def test_user_errors_are_one_line(capsys, folder, tiny_evotok_folder, arguments, message):
    arguments = [argument.format(folder=folder) for argument in arguments]
    code, _, error = run(capsys, folder, "--model", tiny_evotok_folder, *arguments)
    assert code == 2 and error.strip().splitlines()[-1].startswith("error: ") and message in error
