"""Lines of other libraries that commands hide because a user cannot act on them."""

import importlib.util
import os
import subprocess
import sys

import pytest

from evotok_plugin import EvoTokVisionConfig, EvoTokVisionImageProcessor


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed: pip install 'evotok[train]'"
)
def test_deepspeed_does_not_report_that_there_is_no_gpu_but_reports_other_warnings():
    code = (
        "import evotok_plugin.common.command_line as c; c.exit_without('train')\n"
        "import deepspeed; deepspeed.get_accelerator(); deepspeed.utils.logger.warning('another warning')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    lines = [*done.stdout.splitlines(), *done.stderr.splitlines()]
    assert len(lines) == 1 and lines[0].endswith("another warning")


def test_image_processors_are_opened_without_a_line_about_backends(tiny_evotok_folder, tmp_path):
    EvoTokVisionImageProcessor(size=48).save_pretrained(tmp_path)
    EvoTokVisionConfig.preset("tiny").save_pretrained(tmp_path)
    code = (
        "import sys, evotok_plugin\nfrom transformers import AutoImageProcessor\n"
        "print(*(type(AutoImageProcessor.from_pretrained(folder)).__name__ for folder in sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, str(tiny_evotok_folder), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("EvoTokImageProcessor EvoTokVisionImageProcessor\n", "")
