"""Probes of how well features separate image classes: k nearest neighbors, and a linear classifier.

n images, D dimensions.
"""

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from evotok_plugin.errors import UserError

MAX_IMAGES = 50_000
NUM_NEIGHBORS = 20
TEMPERATURE = 0.07
MAX_ITERATIONS = 200


def probed_images(num_images: int) -> range:
    """Indices of the images to probe: all, or every k-th image if there are more than 50,000."""
    return range(0, num_images, max(1, -(-num_images // MAX_IMAGES)))


def in_classes(labels: Sequence[str | None]) -> np.ndarray:
    """Mask (n,) of the images that can be probed: those that share their label with another image.

    All False if there are not at least two such classes.
    """
    counts = Counter(label for label in labels if label is not None)
    classes = {label for label, count in counts.items() if count >= 2}
    return np.array([len(classes) >= 2 and label in classes for label in labels], dtype=bool)


def knn_accuracy(features: np.ndarray, labels: Sequence[str]) -> float:
    """Share of images whose class is predicted correctly by their nearest neighbors.

    Leave-one-out: each image gets the votes of its 20 nearest other images (all, if there are fewer) by cosine distance
    d, weighted by exp((1 - d) / 0.07), as in Caron et al. 2021.

    Args:
        features: (n, D).
        labels: the class of every image.

    Raises:
        UserError: scikit-learn is not installed.
        ValueError: fewer than two images, or another number of labels.
    """
    _check(features, labels)
    from sklearn.neighbors import NearestNeighbors

    classes = np.unique(labels, return_inverse=True)[1]
    search = NearestNeighbors(n_neighbors=min(NUM_NEIGHBORS, len(classes) - 1), metric="cosine", algorithm="brute")
    distances, neighbors = search.fit(features).kneighbors()  # (n, k) both; an image is never its own neighbor
    weights, voted = np.exp((1 - distances) / TEMPERATURE), classes[neighbors]
    votes = (weights[:, None, :] * (voted[:, None, :] == voted[:, :, None])).sum(axis=2)  # for each neighbor's class
    predicted = voted[np.arange(len(classes)), votes.argmax(axis=1)]
    return float((predicted == classes).mean())


def linear_probe_accuracy(features: np.ndarray, labels: Sequence[str]) -> float:
    """Share of images whose class is predicted correctly by a linear classifier trained on the other half.

    The images are split into two stratified halves (scikit-learn's `StratifiedKFold`, seed 0); a logistic regression
    (L2, C = 1, at most 200 steps of L-BFGS) on standardized features is trained on one half and tested on the other,
    and vice versa.

    Args:
        features: (n, D).
        labels: the class of every image.

    Raises:
        UserError: scikit-learn is not installed.
        ValueError: fewer than two images, or another number of labels.
    """
    _check(features, labels)
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    classes = np.unique(labels, return_inverse=True)[1]
    halves = StratifiedKFold(n_splits=2, shuffle=True, random_state=0)
    with _steps_may_run_out():
        predicted = cross_val_predict(_classifier(), features, classes, cv=halves)
    return float((predicted == classes).mean())


def trained_probe_accuracy(
    features: np.ndarray, labels: Sequence[str], tested: np.ndarray, tested_labels: Sequence[str]
) -> float:
    """Share of the tested images whose class is predicted correctly by a linear classifier of other images.

    The classifier is that of `linear_probe_accuracy`.

    Args:
        features, tested: (n, D), of the images to train and to test on.
        labels, tested_labels: the class of every image.

    Raises:
        UserError: scikit-learn is not installed.
        ValueError: fewer than two images to train on, none to test on, or another number of labels.
    """
    _check(features, labels)
    if not len(tested) or len(tested) != len(tested_labels):
        raise ValueError(f"expected a label per tested image, got {len(tested)} images and {len(tested_labels)} labels")
    with _steps_may_run_out():
        probe = _classifier().fit(features, np.asarray(labels, dtype=str))
    return float((probe.predict(tested) == np.asarray(tested_labels, dtype=str)).mean())


@contextlib.contextmanager
def _steps_may_run_out() -> Iterator[None]:
    """No warning if the classifier has not converged: the number of steps is part of the protocol."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def _classifier() -> Any:
    """A logistic regression (L2, C = 1, at most 200 steps of L-BFGS) on standardized features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=MAX_ITERATIONS))


def check_installed() -> None:
    """Check that scikit-learn is installed.

    Raises:
        UserError: it is not.
    """
    if find_spec("sklearn") is None:
        raise UserError("probes need scikit-learn: `pip install scikit-learn`, or evaluate without probes in --metrics")


def _check(features: np.ndarray, labels: Sequence[str]) -> None:
    check_installed()
    if len(features) != len(labels) or len(labels) < 2:
        raise ValueError(
            f"expected one label per feature vector and at least two of them, got {len(features)} feature vectors and "
            f"{len(labels)} labels"
        )
