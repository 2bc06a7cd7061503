import subprocess
import sys

import pytest

from llava_ext.cli import main

COMMANDS = ("draw", "chat", "demo", "convert", "merge", "export", "estimate")


@pytest.fixture(scope="module")
def model_folder(tiny_mllm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    for part in tiny_mllm:
        part.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0 and f"usage: evotok-llava {command}" in capsys.readouterr().out


def test_help_waits_for_no_library_that_it_does_not_need():
    heavy = ("gradio", "matplotlib", "deepspeed", "peft", "datasets", "lmms_eval")
    code = f"import sys, llava_ext.cli; print([name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_unknown_flags_are_refused(capsys):
    assert main(["draw", "a ring", "--guidence_scale", "2"]) == 2
    said = capsys.readouterr().err
    assert "unrecognized arguments: --guidence_scale; did you mean --guidance_scale?" in said


def test_a_device_that_is_not_there_is_named(model_folder, capsys):
    assert main(["draw", "a ring", "--model", str(model_folder), "--device", "nowhere"]) == 2
    assert "--device nowhere cannot be used here" in capsys.readouterr().err
