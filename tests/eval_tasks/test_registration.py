"""The entry point: quick to import, never raising; tasks found without --include_path; data from a local root."""

import importlib.metadata
import logging
import subprocess
import sys
import types
from pathlib import Path

import pytest

from eval_tasks import registration


def test_importing_the_entry_point_is_light():
    code = (
        "import sys, eval_tasks.registration; print(sorted({'torch', 'numpy', 'lmms_eval', 'PIL'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


def test_tasks_are_found_without_an_include_path(lmms_eval_tasks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    manager = lmms_eval_tasks.TaskManager(include_defaults=False)
    for name in ("geneval_scenes", "mmbench_scenes"):
        path = Path(manager.task_index[name]["yaml_path"])
        assert path.resolve().is_relative_to(registration.TASKS_FOLDER)


def test_tasks_of_the_user_take_precedence(lmms_eval_tasks, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("task: mmbench_scenes\n")
    for given in (str(tmp_path), [str(tmp_path)]):
        index = lmms_eval_tasks.TaskManager(include_path=given, include_defaults=False).task_index
        assert index["mmbench_scenes"]["yaml_path"] == str(mine)
        assert "geneval_scenes" in index


def test_model_is_registered_as_a_chat_model(lmms_eval_tasks):
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    from eval_tasks.model import EvoTokLmms

    registry = ModelRegistryV2()
    registry.register_manifest(registration.register())
    assert registry.get_model_class("evotok") is EvoTokLmms


def test_the_default_name_is_ours_unless_another_model_has_it(lmms_eval_tasks):
    from lmms_eval.models.registry_v2 import ModelManifest, ModelRegistryV2

    registry = ModelRegistryV2()
    registry.register_manifest(registration.register())
    assert registry.resolve("hf").model_id == "evotok"
    with pytest.raises(ValueError, match="unheard_of"):
        registry.resolve("unheard_of")
    registry.register_manifest(ModelManifest("other", chat_class_path="other.model.Other", aliases=("hf",)))
    assert registry.resolve("hf").model_id == "other"


def test_installed_entry_point(lmms_eval_tasks):
    found = importlib.metadata.entry_points(group="lmms_eval.models", name="evotok")
    if not found:
        pytest.skip("the package is not installed")
    from lmms_eval.models import get_model

    from eval_tasks.model import EvoTokLmms

    assert get_model("evotok") is EvoTokLmms


def test_registering_twice_adds_the_folder_once(lmms_eval_tasks):
    before = lmms_eval_tasks.TaskManager.initialize_tasks
    registration.register()
    assert lmms_eval_tasks.TaskManager.initialize_tasks is before


def test_an_incompatible_lmms_eval_only_loses_our_tasks(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "lmms_eval.tasks", types.SimpleNamespace(TaskManager=object))
    with caplog.at_level(logging.WARNING):
        manifest = registration.register()
    assert manifest.model_id == "evotok"
    assert "--include_path" in caplog.text


def test_local_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(registration.DATA_ROOT_VARIABLE, raising=False)
    assert registration.local_dataset("owner/data") == "owner/data"
    monkeypatch.setenv(registration.DATA_ROOT_VARIABLE, str(tmp_path / "root"))
    folder = tmp_path / "root/owner/data"
    with pytest.raises(ValueError, match=f"hf download --repo-type dataset owner/data --local-dir {folder}"):
        registration.local_dataset("owner/data")
    folder.mkdir(parents=True)
    assert registration.local_dataset("owner/data") == str(folder)
    assert registration.local_dataset("json") == "json"
    assert registration.local_dataset(None) is None
    (tmp_path / "mine/data").mkdir(parents=True)
    assert registration.local_dataset("mine/data") == "mine/data"
