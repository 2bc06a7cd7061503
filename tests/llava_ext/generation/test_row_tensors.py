import torch

from llava_ext.generation.cache import runs_of_same
from llava_ext.generation.row_tensors import RowInputs, append_to_rows, codes_of_rows


def test_inputs_are_joined_in_the_order_of_the_rows():
    filler = torch.full((1, 2), -1.0)
    inputs = RowInputs(4, filler)
    drawn, written = torch.arange(4.0).view(2, 2), torch.arange(10.0, 12.0).view(1, 2)
    inputs.set([3, 0], drawn)
    inputs.set([2], written)
    assert [row in inputs for row in range(4)] == [True, False, True, True]
    expected = torch.cat([drawn[1:], filler, written, drawn[:1], drawn[:1], written])
    assert torch.equal(inputs.joined(partnered=[3, 2]), expected)


def test_inputs_of_all_rows_in_order_are_not_copied():
    inputs = RowInputs(3, torch.zeros(1, 2))
    embeddings = torch.randn(3, 2)
    inputs.set([0, 1, 2], embeddings)
    assert inputs.joined() is embeddings


def test_an_embedding_is_appended_to_the_wanted_rows():
    embeddings, mask = torch.arange(1.0, 9.0).view(2, 2, 2), torch.tensor([[0, 1], [1, 1]])
    last = torch.full((1, 2), 9.0)
    some, seen = append_to_rows(embeddings, mask, last, [False, True])
    assert some.tolist() == [[[0, 0], [1, 2], [3, 4]], [[5, 6], [7, 8], [9, 9]]]
    assert seen.tolist() == [[0, 0, 1], [1, 1, 1]]
    every, seen = append_to_rows(embeddings, mask, last, [True, True])
    assert every.tolist() == [[[1, 2], [3, 4], [9, 9]], [[5, 6], [7, 8], [9, 9]]]
    assert seen.tolist() == [[0, 1, 1], [1, 1, 1]]
    none, seen = append_to_rows(embeddings, mask, last, [False, False])
    assert none is embeddings and seen is mask


def test_codes_are_collected_from_steps_with_other_rows():
    first, second, alone = (
        torch.tensor([[1, 2], [3, 4], [5, 6]]),
        torch.tensor([[7, 8], [9, 10]]),
        torch.tensor([[0, 0]]),
    )
    together = [[(first, 2), (second, 0)], [(first, 0), (second, 1)]]
    assert codes_of_rows(together).tolist() == [[5, 6, 7, 8], [1, 2, 9, 10]]
    apart = [[(first, 2), (alone, 0)], [(first, 0), (second, 1)]]
    assert codes_of_rows(apart).tolist() == [[5, 6, 0, 0], [1, 2, 9, 10]]


def test_runs_of_the_same_object():
    a, b = [1], [1]  # equal, but not the same
    assert [(run.start, run.stop) for run, _ in runs_of_same([a, a, b, a])] == [(0, 2), (2, 3), (3, 4)]
    assert runs_of_same([]) == []
