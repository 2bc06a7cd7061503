"""The command `serve`: the model as an argument or as a flag."""

import pytest

from llava_ext.cli import main
from llava_ext.commands import serve
from llava_ext.serving.api import server


@pytest.mark.parametrize("given", [["outputs/model"], ["--model", "outputs/model"]])
def test_the_model_is_an_argument_or_a_flag(monkeypatch, given):
    served = []
    monkeypatch.setattr(serve, "open_selected_model", lambda arguments: arguments.model)
    monkeypatch.setattr(server, "serve", lambda model, *rest: served.append(model))
    assert main(["serve", *given]) == 0
    assert served == ["outputs/model"]


def test_two_models_are_rejected(capsys):
    assert main(["serve", "a", "--model", "b"]) == 2
    assert "expected one model, got a and --model b; omit one of them" in capsys.readouterr().err
