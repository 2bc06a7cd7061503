"""Prompts of GenEval's templates give the records that they were written from."""

import pytest

from eval_tasks.tasks.geneval.prompt_parser import parse_prompt
from eval_tasks.tasks.geneval.prompts import draw_records, geneval_records
from evotok_plugin.errors import UserError


def test_prompts_give_their_records():
    for record in [*geneval_records(), *draw_records(seed=7, draws=1000)]:
        assert parse_prompt(record["prompt"]) == record


def test_a_class_that_is_also_a_color():
    assert parse_prompt("a photo of an orange")["include"] == [{"class": "orange", "count": 1}]
    assert parse_prompt("a photo of an orange orange")["include"][0]["color"] == "orange"


@pytest.mark.parametrize(
    "text",
    [
        "", "a photo of ", "a dog", "a photo of dog", "a photo of an dog", "a photo of a ring", "a photo of five dogs",
        "a photo of two dog", "a photo of a dog and", "a photo of a dog and a dog", "a photo of a red dog and a cup",
        "a photo of a red dog left of a blue cup", "a photo of a dog near a cup", "a photo of a silver dog",
        "a photo of a dog and a cup and a cat",
    ],
)  # fmt: skip
def test_other_texts_are_rejected(text):
    with pytest.raises(UserError, match="is not one of GenEval's; expected"):
        parse_prompt(text)
