"""Samplers that group samples by kind and length."""

import numpy as np

from llava_ext.data.samplers import ModalityGroupedSampler


def test_grouped_batches_hold_one_kind_and_every_sample_once():
    kinds = ["read"] * 10 + ["draw"] * 7 + ["text"] * 4
    sampler = ModalityGroupedSampler(kinds, batch_size=3, seed=1, epoch_of=lambda: 0)
    order = list(sampler)
    assert sorted(order) == list(range(21)) and order == list(sampler)
    for start in range(0, 18, 3):
        assert len({kinds[i] for i in order[start : start + 3]}) == 1
    assert order != list(ModalityGroupedSampler(kinds, 3, seed=1, epoch_of=lambda: 1))


def test_grouped_batches_have_similar_lengths(rng):
    lengths, kinds = rng.integers(20, 2000, 3000), rng.integers(0, 3, 3000)

    def padding(**options):
        order = list(ModalityGroupedSampler(kinds, 8, seed=0, epoch_of=lambda: 0, **options))
        assert sorted(order) == list(range(3000))
        batches = lengths[np.array(order[:2976])].reshape(-1, 8)
        return 1 - batches.mean() / batches.max(axis=1).mean()

    assert padding(lengths=lengths) < 0.15 < 0.3 < padding()


def test_grouped_batches_mix_lengths_that_are_nearly_the_same(rng):
    lengths = rng.choice([33, 36, 40], 3000)
    order = np.array(list(ModalityGroupedSampler(np.zeros(3000), 8, 0, lambda: 0, lengths)))
    kinds_of_length = [len(set(batch)) for batch in lengths[order].reshape(-1, 8)]
    assert np.mean(kinds_of_length) > 2.5


def test_grouping_keeps_samples_near_their_place_in_the_order(rng):
    """Within two windows, so that a rare source is not postponed to the end of the epoch."""
    kinds, lengths = rng.integers(0, 3, 4000), rng.integers(20, 2000, 4000)
    order = rng.permutation(4000)
    grouped = np.array(list(ModalityGroupedSampler(kinds, 4, 0, lambda: 0, lengths, lambda epoch: order)))
    place = np.empty(4000, int)
    place[order] = np.arange(4000)
    assert np.abs(place[grouped] - np.arange(4000)).max() < 2 * 50 * 4
