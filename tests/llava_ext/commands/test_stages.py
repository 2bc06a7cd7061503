"""The commands of the training stages: what they start, and what they do before it."""

import pytest

from llava_ext.cli import STAGES, main
from llava_ext.commands import stages


@pytest.fixture
def calls(monkeypatch):
    """The module that is started, with its flags, and the flags of the preparation before it."""
    seen = []
    monkeypatch.setattr(stages, "start", lambda module, flags: seen.append((module, flags)) or 0)
    monkeypatch.setattr("llava_ext.embedded.prepare.main", lambda flags: seen.append(("prepare", flags)) or 0)
    return seen


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_prepares_its_inputs_and_trains_with_its_own_recipe(calls, name):
    assert main([name, "--max_steps", "3"]) == 0
    (first, prepared), (module, flags) = calls
    assert first == "prepare" and prepared == flags == ["--recipe", name.replace("-", "_"), "--max_steps", "3"]
    assert module == f"llava_ext.training.{'reinforcement.' if name == 'reinforce' else ''}train"


def test_flags_are_passed_on_as_they_are(calls):
    given = ["--debug", "--recipe=paper", "--image_generation", "{top_k: 3}", "--data_path", "a.json", "b.json"]
    assert main(["finetune", *given]) == 0
    assert calls[1][1] == ["--recipe", "paper", *given[2:], "--debug"]


def test_nothing_is_trained_if_the_preparation_fails(calls, monkeypatch):
    monkeypatch.setattr("llava_ext.embedded.prepare.main", lambda flags: 130)
    assert main(["pretrain"]) == 130 and not calls


def test_tracebacks_can_be_asked_for_where_the_inputs_are_prepared(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", "--debug", "--max_step", "3"]) == 2
    assert "unrecognized arguments: --max_step; did you mean --max_steps?" in capsys.readouterr().err


@pytest.mark.parametrize("name", STAGES)
def test_the_help_lists_flags_and_examples(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and "examples:\n  evotok-llava " + name in shown and "--learning_rate" in shown
    assert ("--rewards" in shown) == (name == "reinforce")


def test_an_estimate_takes_debug(tmp_path, capsys):
    assert main(["estimate", "--recipe", "paper_finetune", "--debug", "--gpus", "8"]) == 0
    assert capsys.readouterr().out
