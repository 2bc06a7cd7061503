"""The programs on a system without `fcntl`, which Windows lacks."""

import subprocess
import sys

import pytest

from evotok_plugin.common import locks

WITHOUT = "import sys; sys.modules['fcntl'] = None; from {module} import main; sys.exit(main(['--version']))"


@pytest.mark.parametrize("module", ["evotok_plugin.cli", "llava_ext.cli", "eval_tasks.cli"])
def test_programs_start_without_fcntl(module):
    ended = subprocess.run([sys.executable, "-c", WITHOUT.format(module=module)], capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout.startswith("evotok"), ended.stderr


def test_without_fcntl_outputs_are_written_with_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(locks, "fcntl", None)
    with locks.locked(tmp_path / "out" / ".lock", tmp_path / "out"):
        assert (tmp_path / "out" / ".lock").exists()
    assert "this system has no file locks" in caplog.text and not (tmp_path / "out" / ".lock").exists()
    file = locks.lock_bytes(tmp_path / ".lock", tmp_path, 3, 2)
    locks.unlock_bytes(file, 3, 2)
    file.close()
