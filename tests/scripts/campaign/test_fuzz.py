"""Damaged inputs of every kind end in one line of error: seeded mutations, each read in a child process."""

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[3] / "scripts" / "campaign"
CHEAP = ("image", "json", "jsonl", "prompts", "recipe", "results")
KINDS = (
    *CHEAP, "tar", "parquet", "saved_dataset", "image_folder", "code_cache", "samples", "drawn", "tokenizer", "model",
    "tokenizer_run", "stage_run",
)  # fmt: skip


@pytest.fixture
def campaign(monkeypatch):
    """The fuzz script."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("fuzz")


def failures(campaign, kind, count):
    cases = campaign.fuzz(campaign.INPUTS[kind], range(count), limit=120)
    return [case for case in cases if case.outcome not in campaign.GOOD]


@pytest.mark.parametrize("kind", CHEAP)
def test_a_damaged_file_is_accepted_or_an_error_of_one_line(campaign, kind):
    assert failures(campaign, kind, 12) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_hundreds_of_damaged_files_are_accepted_or_errors_of_one_line(campaign, kind, request):
    assert sorted(KINDS) == sorted(campaign.INPUTS)
    assert failures(campaign, kind, request.config.getoption("--fuzz")) == []


def _run_out_of_memory(folder):
    return len(bytearray(1 << 40))


def _wait(folder):
    import time

    time.sleep(60)


@pytest.mark.parametrize(
    ("read", "outcome"),
    [
        (lambda folder: {}["x"], "traceback"),
        (_run_out_of_memory, "memory"),
        (_wait, "hang"),
        (lambda folder: 2, "unclear"),
    ],
)
def test_failures_are_noticed(campaign, tmp_path, read, outcome):
    def reads(folder):
        (file,) = (folder / "input").iterdir()
        return 0 if file.is_file() and file.read_bytes() == b"whole" else read(folder)

    given = campaign.Input("file", lambda folder: (folder / "input" / "a").write_bytes(b"whole"), reads)
    (case,) = campaign.fuzz(given, [2], limit=1)
    assert case.outcome == outcome
