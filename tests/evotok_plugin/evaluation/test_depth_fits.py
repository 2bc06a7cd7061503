"""Linear fits for every depth, against regressions of scikit-learn."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LinearRegression, LogisticRegression

from evotok_plugin import EvoTokConfig, EvoTokModel
from evotok_plugin.errors import UserError
from evotok_plugin.evaluation.depth_fits import DepthFitter
from evotok_plugin.metrics.probes import linear_probe_accuracy, trained_probe_accuracy


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return EvoTokModel(
        EvoTokConfig.preset("tiny", codebook_dim=6, num_quantizers=3, pixel_depth=2, semantic_depth=3)
    ).eval()


def cross_validated(x, y, scale=1.0):
    """Share of explained variance of (n, N, C) -> (n, N, T); each half of the images is predicted by the other half."""
    left = total = 0.0
    for half in (0, 1):
        train, test = ([a[h::2].reshape(-1, a.shape[-1]) for a in (x, y)] for h in (1 - half, half))
        predicted = LinearRegression().fit(*train).predict(test[0])
        left += (np.square(predicted - test[1]) * scale).sum()
        total += (np.square(test[1] - test[1].mean(0)) * scale).sum()
    return 1 - left / total


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_fits_equal_regressions_of_scikit_learn(model, batch_size):
    generator = torch.Generator().manual_seed(1)
    pixels = F.interpolate(torch.rand(40, 3, 6, 6, generator=generator) * 2 - 1, 48, mode="bilinear")
    encoded = model.encode(pixels)
    target = torch.randn(40, 9, 5, generator=generator) + encoded.latents[..., :5] * 2
    target[..., 4] = 3.0  # a constant channel explains nothing and must not count
    labels = [f"class {number % 3}" for number in range(40)]
    fitter = DepthFitter(model)
    for part in torch.arange(40).split(batch_size):
        chosen = part.tolist()
        fitter.update(
            pixels[part], encoded.latents[part], encoded.codes[part], target[part], [labels[i] for i in chosen]
        )
    fits = fitter.result()
    patches = F.unfold(pixels, 16, stride=16).transpose(1, 2).numpy().astype(np.float64)
    teacher = target.numpy().astype(np.float64)
    variances = teacher.reshape(-1, 5).var(0)
    scale = np.divide(1, variances, out=np.zeros(5), where=variances > 1e-6)
    depths = [model.codes_to_latents(encoded.codes[..., :depth]) for depth in (1, 2, 3)] + [encoded.latents]
    for number, latents in enumerate(latents.numpy().astype(np.float64) for latents in depths):
        assert fits.pixel_r2[number] == pytest.approx(cross_validated(latents, patches), abs=2e-3)
        assert fits.teacher_r2[number] == pytest.approx(cross_validated(latents, teacher, scale), abs=2e-3)
        assert fits.probe_accuracy[number] == pytest.approx(linear_probe_accuracy(latents.mean(1), labels), abs=1 / 40)


@torch.no_grad()
def test_without_teacher_and_labels_only_pixels_are_fitted(model):
    pixels = torch.rand(4, 3, 48, 48) * 2 - 1
    encoded = model.encode(pixels)
    fitter = DepthFitter(model)
    fitter.update(pixels, encoded.latents, encoded.codes, None, [None] * 4)
    fits = fitter.result()
    with pytest.raises(UserError, match="at least 2 images, got 0"):
        DepthFitter(model).result()
    assert fits.teacher_r2 is None and fits.probe_accuracy is None and len(fits.pixel_r2) == 4


@torch.no_grad()
def test_fits_to_other_images_are_scored_on_all_given_ones(model):
    generator = torch.Generator().manual_seed(2)
    pixels = F.interpolate(torch.rand(30, 3, 6, 6, generator=generator) * 2 - 1, 48, mode="bilinear")
    encoded = model.encode(pixels)
    labels = [f"class {number % 2}" for number in range(30)]
    labels[:2], labels[28:] = [None, "class 0"], ["of no image to fit", None]
    target = torch.randn(30, 9, 4, generator=generator)
    fitter = DepthFitter(model, separate=True)
    for part, is_fitted in ((slice(0, 20), True), (slice(20, 25), False), (slice(25, 30), False)):
        fitter.update(
            pixels[part], encoded.latents[part], encoded.codes[part], target[part], labels[part], is_fitted=is_fitted
        )
    fits = fitter.result()
    patches = F.unfold(pixels, 16, stride=16).transpose(1, 2).numpy().astype(np.float64)
    depths = [model.codes_to_latents(encoded.codes[..., :depth]) for depth in (1, 2, 3)] + [encoded.latents]
    for number, latents in enumerate(latents.numpy().astype(np.float64) for latents in depths):
        train, test = (
            [a[part].reshape(-1, a.shape[-1]) for a in (latents, patches)] for part in (slice(0, 20), slice(20, 30))
        )
        predicted = LinearRegression().fit(*train).predict(test[0])
        expected = 1 - np.square(predicted - test[1]).sum() / np.square(test[1] - test[1].mean(0)).sum()
        assert fits.pixel_r2[number] == pytest.approx(expected, abs=2e-3)
        pooled = latents.mean(1)
        probe = trained_probe_accuracy(pooled[1:20], labels[1:20], pooled[20:28], labels[20:28])
        assert fits.probe_accuracy[number] == pytest.approx(probe, abs=1 / 8)
    pooled = target.mean(1).numpy()
    assert fits.teacher_probe == trained_probe_accuracy(pooled[1:20], labels[1:20], pooled[20:28], labels[20:28])
    unfitted = DepthFitter(model, separate=True)
    unfitted.update(pixels[:4], encoded.latents[:4], encoded.codes[:4], None, labels[:4])
    with pytest.raises(UserError, match="no images to fit"):
        unfitted.result()


def test_a_probe_of_other_images_is_the_classifier_of_scikit_learn():
    rng = np.random.default_rng(0)
    features, classes = rng.normal(size=(60, 4)), rng.integers(0, 3, 60)
    features[np.arange(60), classes] += 2
    labels = [str(number) for number in classes]
    scaled = (features - features[:40].mean(0)) / features[:40].std(0)
    expected = LogisticRegression(max_iter=200).fit(scaled[:40], classes[:40]).score(scaled[40:], classes[40:])
    assert trained_probe_accuracy(features[:40], labels[:40], features[40:], labels[40:]) == expected > 0.5
    with pytest.raises(ValueError, match="a label per tested image"):
        trained_probe_accuracy(features, labels, features[:0], [])
