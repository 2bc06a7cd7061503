"""Devices of the processes of a run."""

import pytest
import torch

from evotok_plugin.common.processes import Processes, resolve_device
from evotok_plugin.errors import UserError


def test_devices_are_resolved_or_rejected(monkeypatch):
    assert resolve_device("cpu") == torch.device("cpu")
    for name in ("nowhere", "meta", "hpu"):
        with pytest.raises(UserError, match=f"--device {name} cannot be used here"):
            resolve_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match="--device cuda cannot be used here: CUDA is not available"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="there are 2 GPUs"):
        resolve_device("cuda:2")


def test_incomplete_variables_of_torchrun_are_reported(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        UserError, match="WORLD_SIZE is 2, but .* expected, but not set; start the processes with torchrun"
    ):
        Processes.join("cpu")
