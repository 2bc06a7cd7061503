import subprocess
import sys

import pytest

from llava_ext.cli import main

COMMANDS = ("draw", "chat", "tune-sampling", "demo", "convert", "merge", "export", "data", "estimate")


@pytest.fixture(scope="module")
def model_folder(tiny_mllm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    for part in tiny_mllm:
        part.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0 and f"usage: evotok-llava {command}" in capsys.readouterr().out


def test_the_command_line_imports_no_library_that_help_does_not_need():
    heavy = ("gradio", "matplotlib", "deepspeed", "peft", "datasets", "lmms_eval")
    code = f"import sys, llava_ext.cli; print([name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_unknown_flags_are_rejected_with_a_suggestion(capsys):
    assert main(["draw", "a ring", "--guidence_scale", "2"]) == 2
    error = capsys.readouterr().err
    assert "unrecognized arguments: --guidence_scale; did you mean --guidance_scale?" in error


def test_an_unavailable_device_is_reported(model_folder, capsys):
    assert main(["draw", "a ring", "--model", str(model_folder), "--device", "nowhere"]) == 2
    assert "--device nowhere cannot be used here" in capsys.readouterr().err
