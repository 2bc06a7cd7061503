"""Mixture: the order of records of one or several sources."""

import numpy as np
import pytest

from evotok_plugin.errors import UserError
from llava_ext.data.mixture import Mixture


def test_without_weights_an_epoch_is_every_record_once():
    mixture = Mixture([5, 20], seed=3)
    first, second = mixture.order(0), mixture.order(1)
    assert sorted(first) == sorted(second) == list(range(25)) and first.tolist() != second.tolist()
    assert first.tolist() == Mixture([5, 20], seed=3).order(0).tolist()
    assert first.tolist() != Mixture([5, 20], seed=4).order(0).tolist()


def test_weights_are_exact_shares_of_every_block():
    mixture = Mixture([3_000, 100], [1, 3], seed=0)
    order = np.concatenate([mixture.order(epoch) for epoch in range(3)])
    assert len(order) == 3 * len(mixture) == 9_300
    for start in range(0, len(order) - 1024, 1024):
        assert (order[start : start + 1024] >= 3_000).sum() == 768


def test_a_weighted_source_repeats_no_record_before_all_were_seen():
    """Across epochs, and in a new order every time."""
    mixture = Mixture([70, 30], [1, 1], seed=0)
    order = np.concatenate([mixture.order(epoch) for epoch in range(30)])
    for first, size in ((0, 70), (70, 30)):
        mine = order[(order >= first) & (order < first + size)]
        rounds = mine[: len(mine) // size * size].reshape(-1, size)
        assert len(rounds) > 10 and all(sorted(one) == list(range(first, first + size)) for one in rounds)
        assert rounds[0].tolist() != rounds[1].tolist()


def test_an_epoch_does_not_depend_on_earlier_calls():
    mixture = Mixture([700, 900], [2, 1], seed=5)
    in_turn = [mixture.order(epoch).tolist() for epoch in range(4)]
    assert in_turn[3] == Mixture([700, 900], [2, 1], seed=5).order(3).tolist()


@pytest.mark.parametrize(
    ("sizes", "weights", "message"),
    [
        ([5, 5], [1.0], "expected 2 above 0"),
        ([5, 5], [1.0, 0.0], "expected 2 above 0"),
        ([5, 5], [1.0, 1e-6], "entry 1 of data_path would get less than 1 of 1024"),
        ([5, 0], [1.0, 1.0], "entry 1 of data_path has no usable records"),
    ],
)
def test_invalid_weights_are_rejected(sizes, weights, message):
    with pytest.raises(UserError, match=message):
        Mixture(sizes, weights)
