"""Probes on features of known classes, and the conditions under which they are measured."""

import numpy as np
import pytest
from evaluation_inputs import Pictures, options

from evotok_plugin.errors import UserError
from evotok_plugin.evaluation.evaluate import evaluate
from evotok_plugin.evaluation.metric_choice import chosen_metrics
from evotok_plugin.metrics.probes import in_classes, knn_accuracy, linear_probe_accuracy


def test_knn_accuracy_equals_a_plain_loop(rng):
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


def test_probes_find_only_classes_that_exist(rng):
    labels = ["a", "b"] * 50
    apart = rng.normal(size=(100, 8)) + np.array([[3.0], [-3.0]] * 50)
    alike = rng.normal(size=(100, 8))
    for accuracy in (knn_accuracy, linear_probe_accuracy):
        assert accuracy(apart, labels) == 1.0
        assert 0.3 < accuracy(alike, labels) < 0.7


def test_a_linear_probe_is_evaluated_on_other_images_than_it_is_trained_on(rng):
    labels = [str(label) for label in rng.integers(0, 2, 60)]
    features = rng.normal(size=(60, 200))  # more dimensions than images: any labels can be memorized
    assert linear_probe_accuracy(features, labels) < 0.75


def test_classes_of_one_image_are_not_probed():
    assert in_classes(["a", "b", "a", None, "b", "c"]).tolist() == [True, True, True, False, True, False]
    assert not in_classes(["a", "a", "b"]).any()


def test_probes_are_measured_if_there_are_labels(model):
    assert "probes" in chosen_metrics(options(), Pictures())
    assert "probes" not in chosen_metrics(options(metrics=["all"]), Pictures(labeled=False))
    with pytest.raises(UserError, match="probes cannot be measured: 'pictures' needs at least 2 classes"):
        chosen_metrics(options(metrics=["psnr", "probes"]), Pictures(labeled=False))


def test_probes_are_skipped_if_broken_images_leave_no_classes(model, processor):
    source = Pictures(8, broken=(4, 5, 6))  # leaves a single image in three of the classes
    values = evaluate(model, processor, source, options(max_bad_fraction=0.5)).values
    assert values["images"] == 5 and "knn_accuracy" not in values
