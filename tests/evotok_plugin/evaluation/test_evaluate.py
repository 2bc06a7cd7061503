"""Metrics against plain computations, broken images, several processes against one, and cached statistics."""

import functools
import json
import multiprocessing
import os
import socket
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluation_inputs import DIM, Pictures, options, reconstruct

from evotok_plugin import EvoTokImageProcessor, EvoTokModel
from evotok_plugin.common.processes import Processes
from evotok_plugin.errors import UserError
from evotok_plugin.evaluation.evaluate import evaluate
from evotok_plugin.evaluation.metric_choice import METRICS, chosen_metrics
from evotok_plugin.evaluation.options import EvaluationOptions
from evotok_plugin.losses import perceptual
from evotok_plugin.metrics.frechet import FeatureStatistics
from evotok_plugin.metrics.image import psnr, ssim
from evotok_plugin.metrics.probes import knn_accuracy, linear_probe_accuracy
from evotok_plugin.teacher import load_teacher

# Metrics ------------------------------------------------------------------------------------------------------------


def test_psnr_and_ssim_are_means_over_images(model, processor):
    source = Pictures()
    values = evaluate(model, processor, source, options()).values
    pixel_values, pixels, _ = reconstruct(model, processor, source)
    assert values["psnr"] == pytest.approx(float(psnr(pixels, pixel_values).double().mean()), rel=1e-5)
    assert values["ssim"] == pytest.approx(float(ssim(pixels, pixel_values).double().mean()), rel=1e-4)
    assert values["images"] == 20 and values["bad_images"] == 0


def test_usage_and_perplexity_count_all_codes(model, processor):
    values = evaluate(model, processor, Pictures(), options(metrics=("usage",))).values
    codes = reconstruct(model, processor, Pictures())[2].flatten(0, 1)
    for level, column in enumerate(codes.unbind(1)):
        share = column.bincount(minlength=model.config.codebook_size) / len(column)
        assert values["code_usage"][level] == pytest.approx(float((share > 0).float().mean()))
        assert np.log(values["perplexity"][level]) == pytest.approx(float(torch.special.entr(share).sum()), rel=1e-5)


def test_teacher_cosine_is_measured_at_every_depth(model, processor, teacher, tower):
    source = Pictures(10)
    values = evaluate(model, processor, source, options(teacher=teacher)).values
    pixel_values, _, codes = reconstruct(model, processor, source)
    with torch.no_grad():
        target = tower(pixel_values, output_hidden_states=True).hidden_states[-2]
        expected = [
            float(F.cosine_similarity(model.decode_semantics(codes[..., :depth]), target, dim=-1).mean())
            for depth in range(1, 9)
        ]
    assert values["semantic_cosine"] == pytest.approx(expected, abs=1e-6) and len(set(expected)) == 8


def test_rfid_equals_scipy_s_distance_between_features_of_saved_images(model, processor, network, tmp_path):
    linalg = pytest.importorskip("scipy.linalg", reason="scipy, the reference, is not installed")
    source = Pictures(40)
    values = evaluate(model, processor, source, options(metrics=("rfid",), stats_cache=tmp_path)).values
    features = []
    for images in reconstruct(model, processor, source)[:2]:
        saved = np.stack([np.array(picture) for picture in processor.to_pil(images)])
        features.append(network(torch.from_numpy(saved).permute(0, 3, 1, 2))[0].double().numpy())
    covariances = [np.cov(part, rowvar=False) for part in features]
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((features[0].mean(0) - features[1].mean(0)) ** 2).sum() + np.trace(sum(covariances) - 2 * root)
    assert values["rfid"] == pytest.approx(expected, rel=1e-5)


def test_probes_use_mean_pooled_features_at_semantic_depth(model, processor):
    source = Pictures(24)
    values = evaluate(model, processor, source, options()).values
    codes = reconstruct(model, processor, source)[2][..., : model.config.semantic_depth]
    with torch.no_grad():
        features = model.decode_semantics(codes).mean(dim=1).numpy()
    labels = [source.label(index) for index in range(24)]
    assert values["knn_accuracy"] == knn_accuracy(features, labels)
    assert values["linear_probe_accuracy"] == linear_probe_accuracy(features, labels)
    assert (values["probe_images"], values["probe_classes"]) == (24, 4)


def test_lpips_equals_the_mean_of_the_package(model, processor, vgg16):
    source = Pictures(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = evaluate(model, processor, source, options(metrics=("lpips",))).values
    pixel_values, pixels, _ = reconstruct(model, processor, source)
    lpips = perceptual.load_lpips()
    with torch.no_grad():
        expected = float(lpips(pixels.clamp(-1, 1), pixel_values).mean())
        assert float(lpips(pixel_values, pixel_values).abs().max()) == 0
    assert values["lpips"] == pytest.approx(expected, rel=1e-4) and expected > 0


# Images -------------------------------------------------------------------------------------------------------------


def test_every_image_is_decoded_once(model, processor):
    source = Pictures(18, broken=[3])
    evaluate(model, processor, source, options(max_bad_fraction=0.1))
    assert source.decoded == [1] * 18


def test_decoding_in_the_background_gives_the_same_results(model, processor):
    source = Pictures(18, broken=[3])
    there = evaluate(model, processor, source, EvaluationOptions(batch_size=8, num_workers=2, max_bad_fraction=0.1))
    assert there.values == evaluate(model, processor, source, options(max_bad_fraction=0.1)).values
    assert sum(source.decoded) == 18  # in this process only by the second run


def test_broken_images_are_reported_and_skipped(model, processor, tmp_path, caplog):
    source, report = Pictures(20, broken=(2, 9)), tmp_path / "bad_samples.jsonl"
    values = evaluate(model, processor, source, options(max_bad_fraction=0.1, report=report)).values
    pixel_values, pixels, _ = reconstruct(model, processor, source, skipped=(2, 9))
    assert values["psnr"] == pytest.approx(float(psnr(pixels, pixel_values).double().mean()), rel=1e-5)
    assert (values["images"], values["bad_images"]) == (18, 2)
    assert [json.loads(line)["sample"] for line in report.read_text().splitlines()] == ["2.png", "9.png"]
    assert "2.png (2 is broken), 9.png (9 is broken)" in caplog.text


def test_too_many_broken_images_stop_the_run_immediately(model, processor):
    source = Pictures(40, broken=range(8))
    with pytest.raises(UserError, match=r"8 of 40 samples are unusable, over the limit of 10.00%"):
        evaluate(model, processor, source, options(max_bad_fraction=0.1))
    assert sum(source.decoded) == 8
    with pytest.raises(UserError, match="none of the 3 images of 'pictures' can be read"):
        evaluate(model, processor, Pictures(3, broken=range(3)), options(max_bad_fraction=1.0))


def test_a_model_in_training_mode_is_rejected(model, processor):
    learning = EvoTokModel(model.config).train()
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        evaluate(learning, processor, Pictures(4), options())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"metrics": ["psnr", "fid"]}, "unknown metric 'fid'; expected all, or some of psnr"),
        ({"metrics": ["cosine"]}, "pass --teacher FOLDER"),
    ],
)
def test_metrics_that_cannot_be_measured_are_rejected(given, message):
    with pytest.raises(UserError, match=message):
        chosen_metrics(options(**given), Pictures())
    with pytest.raises(UserError, match="rfid cannot be measured: it needs at least 2 images"):
        chosen_metrics(options(metrics=["rfid"]), Pictures(1))


def test_a_teacher_s_positions_are_interpolated_for_another_image_size(model, teacher_folder, caplog):
    teacher = load_teacher(str(teacher_folder))
    with caplog.at_level("INFO"):
        values = evaluate(model, EvoTokImageProcessor(size=96), Pictures(2), options(teacher=teacher)).values
    assert "interpolated from 3x3 to 6x6" in caplog.text and len(values["semantic_cosine"]) == 8
    assert -1 <= values["semantic_cosine_constant"] <= 1


# Several processes --------------------------------------------------------------------------------------------------


def _evaluate_on_rank(rank, port, work, queue):
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    queue.put((rank, work(processes=Processes(rank, 2, torch.device("cpu")))))
    dist.destroy_process_group()


def test_two_processes_give_the_results_of_one(model, processor, teacher, network, tmp_path):
    source = Pictures(21, broken=(4, 15))
    wanted = [metric for metric in METRICS if metric not in ("lpips", "zero_shot")]
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
        expected = value if isinstance(value, str | dict) else pytest.approx(value, rel=1e-6)
        assert found[0].values[name] == expected, name
    assert found[0].grid().tobytes() == alone.grid().tobytes()


# Statistics of the originals ----------------------------------------------------------------------------------------


def test_statistics_of_the_originals_are_computed_once(model, processor, network, tmp_path):
    given = options(metrics=("rfid",), stats_cache=tmp_path)
    first = evaluate(model, processor, Pictures(10), given).values
    assert network.seen == 20
    assert evaluate(model, processor, Pictures(10), given).values == first
    assert network.seen == 30 and len(list(tmp_path.iterdir())) == 1


def test_different_images_with_equal_names_have_separate_statistics(model, processor, network, tmp_path):
    given = options(metrics=("rfid",), stats_cache=tmp_path)
    for processed, source in ((processor, Pictures(10)), (processor, Pictures(10, seed=1)), (96, Pictures(10))):
        processed = EvoTokImageProcessor(size=96) if processed == 96 else processed
        evaluate(model, processed, source, given)
    assert network.seen == 60 and len(list(tmp_path.iterdir())) == 3


def test_incomplete_statistics_are_not_stored_and_damaged_ones_recomputed(model, processor, network, tmp_path):
    given = options(metrics=("rfid",), stats_cache=tmp_path, max_bad_fraction=0.2)
    evaluate(model, processor, Pictures(10, broken=[1]), given)
    assert not list(tmp_path.iterdir())
    value = evaluate(model, processor, Pictures(10), given).values["rfid"]
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(b"cut off")
    assert evaluate(model, processor, Pictures(10), given).values["rfid"] == value
    assert FeatureStatistics.load(kept, DIM).count == 10
