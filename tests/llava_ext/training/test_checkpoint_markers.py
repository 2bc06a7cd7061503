"""Markers of complete checkpoints: a damaged one means an incomplete checkpoint, and they detect changed files."""

import json
import os

import pytest

from evotok_plugin.errors import UserError
from llava_ext.training.checkpoints import (
    MARKER,
    STATE,
    RunShape,
    checkpoints,
    claim_checkpoint,
    drop_incomplete,
    find_resumable,
    is_complete,
    mark_complete,
    steps_of,
)

SHAPE = RunShape(1)


@pytest.fixture
def output(tmp_path):
    """A run with complete checkpoints after steps 1 and 2."""
    for step in (1, 2):
        folder = tmp_path / f"checkpoint-{step}"
        foreign = claim_checkpoint(folder)
        folder.mkdir()
        (folder / STATE).write_text(json.dumps({"global_step": step}))
        (folder / "model.safetensors").write_bytes(os.urandom((1 << 20) + 1))
        mark_complete(folder, SHAPE, foreign)
    return tmp_path


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def as_pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(bytes(100)),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text('{"world_size": "1", "files": {}}'),
        lambda path: path.write_text('{"world_size": 1, "files": {"../../a": 3}}'),
        lambda path: path.unlink(),
        as_pipe,
    ],
)
def test_a_checkpoint_without_a_readable_marker_is_incomplete(output, damage):
    assert find_resumable(output, SHAPE) == output / "checkpoint-2"
    damage(output / "checkpoint-2" / MARKER)
    assert find_resumable(output, SHAPE) == output / "checkpoint-1"
    damage(output / "checkpoint-1" / MARKER)
    assert find_resumable(output, SHAPE) is None


def test_a_changed_file_is_detected_small_ones_always_and_large_ones_on_request(output):
    newest = output / "checkpoint-2"
    flip(newest / "model.safetensors")
    assert is_complete(newest) and not is_complete(newest, verify=True)
    assert find_resumable(output, SHAPE, verify=True) == output / "checkpoint-1"
    (newest / STATE).write_text(json.dumps({"global_step": 3}))
    assert find_resumable(output, SHAPE) == output / "checkpoint-1"
    flip(output / "checkpoint-1" / "model.safetensors")
    with pytest.raises(UserError, match="checkpoint-2 was complete and has been changed since"):
        find_resumable(output, SHAPE, verify=True)


def test_a_damaged_checkpoint_is_set_aside(output):
    flip(output / "checkpoint-2" / "model.safetensors")
    drop_incomplete(output, verify=True)
    assert [path.name for path in checkpoints(output)] == ["checkpoint-1"]
    assert (output / "damaged-checkpoint-2" / "model.safetensors").is_file()


def test_a_marker_of_an_earlier_version_has_no_digests(output):
    path = output / "checkpoint-2" / MARKER
    path.write_text(
        json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != "sha256"})
    )
    assert is_complete(output / "checkpoint-2", verify=True)


@pytest.mark.parametrize("state", ["{}", '{"global_step": "2"}', '{"global_step": -1}', "", "[1]"])
def test_an_unreadable_state_is_one_line(output, state):
    path = output / "checkpoint-2" / STATE
    path.write_text(state)
    with pytest.raises(UserError, match="trainer_state.json (cannot be read|is empty)"):
        steps_of(output / "checkpoint-2")
