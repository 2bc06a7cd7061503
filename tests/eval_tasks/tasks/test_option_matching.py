"""Matching of answers to options."""

import pytest

from eval_tasks.tasks.mmbench_scenes.option_matching import match_option

FOUR = {"A": "top left", "B": "left", "C": "center", "D": "bottom"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        (" B ", "B"),
        ("B.", "B"),
        ("(C)", "C"),
        ("D)", "D"),
        ("C:", "C"),
        ("B. left", "B"),
        ("The answer is D", "D"),
        ("The answer is (A).", "A"),
        ("A", "A"),
        ("A circle stands in the center", "C"),  # an article, not an option
        ("left", "B"),
        ("Top Left", "A"),  # also contains "left", but the longer option takes precedence
        ("It is at the bottom.", "D"),
        ("bottomless", None),
        ("", None),
        ("E", None),
        ("A or B", None),
        ("center or bottom", None),
        ("b", None),
        ("I do not know", None),
    ],
)
def test_match_option(answer, letter):
    assert match_option(answer, FOUR) == letter


def test_only_options_that_exist():
    assert match_option("D", {"A": "yes", "B": "no"}) is None
    assert match_option("no", {"A": "yes", "B": "no"}) == "B"
    assert match_option("not sure", {"A": "yes", "B": "no"}) is None


def test_punctuation_in_options():
    assert match_option("I say f(x) here", {"A": "f(x)", "B": "g(x)"}) == "A"
