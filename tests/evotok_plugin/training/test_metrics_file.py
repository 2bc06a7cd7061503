"""The metrics file of a run that is resumed: no step twice."""

import json

import pytest

from evotok_plugin.training.metrics_file import METRICS, append_metrics, cut_metrics


def steps_in(folder):
    return [json.loads(line)["step"] for line in (folder / METRICS).read_text().splitlines()]


@pytest.mark.parametrize(("resumed", "left"), [(3, [1, 2, 3, 3]), (9, [1, 2, 3, 3, 4, 5]), (None, [])])
def test_entries_after_the_checkpoint_are_removed(tmp_path, resumed, left):
    for step in (1, 2, 3, 3, 4, 5):
        append_metrics(tmp_path, step, {"loss": float("nan")})
    cut_metrics(tmp_path, resumed)
    assert steps_in(tmp_path) == left and [path.name for path in tmp_path.iterdir()] == [METRICS]


@pytest.mark.parametrize(
    "cut", ['{"step": 2, "lo', '{"step": 2}', '{"loss": 1}\n', "[]\n", "\x00\x00\n", '{"step": "2"}\n']
)
def test_a_line_that_a_kill_has_cut_off_is_removed(tmp_path, cut):
    append_metrics(tmp_path, 1, {"loss": 0.5})
    with (tmp_path / METRICS).open("a") as file:
        file.write(cut)
    cut_metrics(tmp_path, 7)
    append_metrics(tmp_path, 8, {"loss": 0.5})
    assert steps_in(tmp_path) == [1, 8]


def test_a_run_without_the_file_is_left_alone(tmp_path):
    cut_metrics(tmp_path, 3)
    assert not list(tmp_path.iterdir())
