"""The documented command, as a user types it: from any folder, one process or two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eval_tasks.results import read_results

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tiny_mllm, tmp_path_factory) -> Path:
    model, processor = tiny_mllm
    folder = tmp_path_factory.mktemp("finetune")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def lmms_eval(folder: Path, checkpoint: Path | str, *launcher: str) -> str:
    folder.mkdir(exist_ok=True)
    command = [
        sys.executable, *launcher, "-m", "lmms_eval", "--model", "evotok",
        "--model_args", f"pretrained={checkpoint},images_dir=images", "--tasks", "mmbench_scenes,geneval_scenes",
        "--limit", "7", "--batch_size", "8", "--output_path", "results",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    return done.stdout + done.stderr


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "images/geneval_scenes").iterdir()}


def test_two_processes_equal_one(checkpoint, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    output = lmms_eval(one, checkpoint)
    assert "geneval_scenes" in output
    lmms_eval(two, checkpoint, "-m", "torch.distributed.run", "--nproc_per_node", "2")
    results = read_results(one / "results", tasks=["mmbench_scenes", "geneval_scenes"])
    assert results == read_results(two / "results")
    # Seven documents on two processes leave one padding clone, which must not draw.
    assert pictures(one) == pictures(two) and len(pictures(one)) == 28
    for folder in (one, two):
        (judgements,) = (folder / "results/judgements").iterdir()
        rows = [json.loads(line) for line in judgements.read_text().splitlines()]
        assert [row["index"] for row in rows] == [n for n in range(7) for _ in range(4)]


def test_a_wrong_checkpoint_is_told_and_leaves_no_results(tmp_path):
    output = lmms_eval(tmp_path / "run", "nowhere")
    assert "needs the output folder of scripts/finetune.sh, but 'nowhere' is no folder" in output
    with pytest.raises(ValueError, match="the run failed"):
        read_results(tmp_path / "run/results")
