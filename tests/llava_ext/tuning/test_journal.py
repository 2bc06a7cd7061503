"""The journal of a search."""

from dataclasses import replace

import pytest

from evotok_plugin.errors import UserError
from llava_ext.generation import DrawingOptions
from llava_ext.tuning.candidates import Candidate
from llava_ext.tuning.journal import Identity, Journal

IDENTITY = Identity(weights="w", prompts="p", judge={"bright": 1.0}, seed=0)
PLAIN = Candidate("plain", DrawingOptions(1.0).completed())
STRONG = Candidate("strong", DrawingOptions((3.0, 1.0)).completed())


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "new/journal.jsonl"
    journal = Journal.open(path, IDENTITY)
    journal.append(PLAIN, [0.5, 1.0])
    journal.append(STRONG, [0.1])
    journal.append(PLAIN, [0.25])
    return path


def test_scores_are_read_again_whatever_the_candidates_are_called(path):
    journal = Journal.open(path, IDENTITY)
    assert journal.scores(replace(PLAIN, name="other")) == [0.5, 1.0, 0.25]
    assert journal.scores(STRONG) == [0.1]
    assert journal.scores(Candidate("new", DrawingOptions(2.0).completed())) == []
    journal.append(STRONG, [0.2])
    assert Journal.open(path, IDENTITY).scores(STRONG) == [0.1, 0.2]


@pytest.mark.parametrize("change", [{"weights": "x"}, {"prompts": "x"}, {"judge": {"bright": 2.0}}, {"seed": 1}])
def test_a_journal_of_another_search_is_rejected(path, change):
    with pytest.raises(UserError, match=f"another value of {next(iter(change))}; name another file"):
        Journal.open(path, replace(IDENTITY, **change))


@pytest.mark.parametrize("text", ["", "notes\n", "[1]\n", '{"prompt": "a ring"}\n'])
def test_other_files_are_kept(tmp_path, text):
    path = tmp_path / "mine.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match="is not a journal of tune-sampling .*; name another file with --journal"):
        Journal.open(path, IDENTITY)
    assert path.read_text() == text


@pytest.mark.parametrize("line", ['{"settings": {}, "first": 3, "scores": [1]}', '{"first": 0}', "[]"])
def test_damage_is_reported(path, line):
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match="is damaged"):
        Journal.open(path, IDENTITY)
