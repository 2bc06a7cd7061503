"""The documented command line, from any folder, with one or two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eval_tasks.reporting.results import read_results

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tiny_mllm, tmp_path_factory) -> Path:
    model, processor = tiny_mllm
    folder = tmp_path_factory.mktemp("finetune")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def lmms_eval(
    folder: Path, checkpoint: Path | str, *launcher: str, tasks: str = "mmbench_scenes,geneval_scenes", **variables: str
) -> str:
    folder.mkdir(exist_ok=True)
    command = [
        sys.executable, *launcher, "-m", "lmms_eval", "--model", "evotok",
        "--model_args", f"pretrained={checkpoint},images_dir=images", "--tasks", tasks,
        "--limit", "7", "--batch_size", "8", "--output_path", "results",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800)
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


def test_a_wrong_checkpoint_is_an_error_and_leaves_no_results(tmp_path):
    output = lmms_eval(tmp_path / "run", "nowhere")
    assert "--model_args pretrained=nowhere: model folder 'nowhere' does not exist" in output
    with pytest.raises(ValueError, match="the run failed"):
        read_results(tmp_path / "run/results")


def test_geneval_with_and_without_judges(checkpoint, judge_folders, tmp_path):
    """Two processes draw and one judges; without judges nothing is drawn; `evotok-eval judge` gives the same result."""
    judges = {f"EVOTOK_JUDGE_{name.upper()}": str(judge_folders[name]) for name in ("detector", "clip")}
    output = lmms_eval(tmp_path / "absent", checkpoint, tasks="geneval")
    assert "hf download facebook/mask2former-swin-small-coco-instance" in output and "--predict_only" in output
    assert not (tmp_path / "absent/images").exists()
    run = tmp_path / "run"
    lmms_eval(run, checkpoint, "-m", "torch.distributed.run", "--nproc_per_node", "2", tasks="geneval", **judges)
    results = read_results(run / "results", tasks=["geneval"])["geneval"]
    (kept,) = (run / "results/drawn").iterdir()
    before = (kept / "judgements.jsonl").read_text()
    assert len(before.splitlines()) == 28
    command = [sys.executable, "-m", "eval_tasks.cli", "judge", "results", "-o", "again"]
    done = subprocess.run(command, cwd=run, env={**os.environ, **judges}, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert (run / "again/judgements.jsonl").read_text() == before
    assert f"| **overall** | {results['overall']:.3f} |" in done.stdout
