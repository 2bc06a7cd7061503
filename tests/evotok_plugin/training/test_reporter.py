"""The reporters of a run that was killed and resumed."""

import json

import pytest

from evotok_plugin.training.metrics_file import METRICS, cut_metrics
from evotok_plugin.training.monitor import Reporter


def test_tensorboard_shows_no_step_twice_after_a_kill(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    killed = Reporter(tmp_path, ["tensorboard"], {})
    for step in (1, 2, 3, 4):
        killed.figures(step, {"loss": float(step)})
    killed.close()
    cut_metrics(tmp_path, 2)
    resumed = Reporter(tmp_path, ["tensorboard"], {}, resumed_at=2)
    for step in (3, 4, 5):
        resumed.figures(step, {"loss": 10.0 * step})
    resumed.close()
    events = accumulators.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1), (2, 2), (3, 30), (4, 40), (5, 50)]
    assert [json.loads(line)["step"] for line in (tmp_path / METRICS).read_text().splitlines()] == [1, 2, 3, 4, 5]
