"""The bijection between codes and ids of residual tokens."""

import pytest
import torch

from evotok_plugin.errors import UserError
from llava_ext.vocabulary import ResidualVocabulary

VOCABULARY = ResidualVocabulary(offset=700, num_levels=4, codebook_size=16)


def test_ids_and_codes_are_a_bijection():
    codes = torch.cartesian_prod(*[torch.arange(16)] * 2)
    codes = torch.cat([codes, codes.flip(1)], dim=1)  # every code at every level
    ids = VOCABULARY.to_ids(codes)
    assert torch.equal(VOCABULARY.codes(ids), codes)
    assert torch.equal(VOCABULARY.levels(ids), torch.arange(4).expand_as(ids))
    assert ids.unique().numel() == VOCABULARY.size == 64
    assert int(ids.min()) == 700 and int(ids.max()) == 763


def test_the_text_form_of_every_id_round_trips():
    for token in range(700, 764):
        assert VOCABULARY.from_text(VOCABULARY.to_text(token)) == [token]


def test_ids_outside_the_range_are_not_residual():
    mask = VOCABULARY.is_residual(torch.tensor([0, 699, 700, 763, 764]))
    assert mask.tolist() == [False, False, True, True, False]


@pytest.mark.parametrize(
    "codes", [torch.tensor([[16, 0, 0, 0]]), torch.tensor([[-1, 0, 0, 0]]), torch.zeros(1, 5).long()]
)
def test_codes_that_do_not_exist_are_rejected(codes):
    with pytest.raises(UserError, match="codes"):
        VOCABULARY.to_ids(codes)


def test_text_of_a_level_that_does_not_exist_is_rejected():
    with pytest.raises(UserError, match="level below 4"):
        VOCABULARY.from_text("<|evo:4:0|>")
