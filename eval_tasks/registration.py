"""Entry point of lmms-eval: registers the model `evotok`, also as the default of `--model`, and adds our task folder.

lmms-eval loads the entry points of all plugins under one try/except, and imports `lmms_eval.tasks` (seconds) only for
an evaluation. Therefore this module imports almost nothing, never raises, and patches `lmms_eval.tasks` when that is
imported.
"""

import functools
import hashlib
import importlib.abc
import importlib.machinery
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from eval_tasks.revisions import is_missing_pin, revision_of
from eval_tasks.unavailable import check_login, load_available, skips_unavailable, warn_of_login
from eval_tasks.upstream_drawing import UPSTREAM, missing_judge, modality_of, warn_of_judge
from evotok_plugin.common.files import user_path
from evotok_plugin.errors import UserError

logger = logging.getLogger(__name__)

TASKS_FOLDER = Path(__file__).resolve().parent / "tasks"
DATA_ROOT_VARIABLE = "EVOTOK_DATA_ROOT"
_TASKS_MODULE = "lmms_eval.tasks"
_DEFAULT_NAME = "hf"
_MARK = "_evotok_registered"


@dataclass(frozen=True)
class GivenKwargs:
    """The effect of `--gen_kwargs` on a task.

    Attributes:
        given: the keys and values of the command line.
        modality: the modality of the task's requests.
        samples: whether the task's answers are sampled.
    """

    given: dict
    modality: str
    samples: bool


# By name of the task, for the current run; lmms-eval itself merges these keys into the task's own.
GIVEN: dict[str, GivenKwargs] = {}


def register() -> Any:
    """Entry point of the group `lmms_eval.models`; returns the model's `ModelManifest`."""
    from lmms_eval.models.registry_v2 import ModelManifest, ModelRegistryV2

    try:
        warn_of_login(DATA_ROOT_VARIABLE)
        _resolve_default_name(ModelRegistryV2)
        _patch_tasks_when_imported()
    except Exception as error:  # an error here would also disable every plugin after ours
        logger.warning("evotok's tasks are not visible (%s); pass --include_path %s", error, TASKS_FOLDER)
    return ModelManifest(model_id="evotok", chat_class_path="eval_tasks.model.EvoTokLmms")


# The default model -------------------------------------------------------------------------------------------


def _resolve_default_name(registry: Any) -> None:
    """Resolve the default of `--model` to ours, unless a model of that name is installed; lmms-eval has none."""
    if getattr(registry, _MARK, False):
        return
    resolve = registry.resolve

    @functools.wraps(resolve)
    def resolve_default(self: Any, model_name: str, *args: Any, **kwargs: Any) -> Any:
        unclaimed = model_name == _DEFAULT_NAME and model_name not in self.list_model_names()
        return resolve(self, "evotok" if unclaimed else model_name, *args, **kwargs)

    registry.resolve = resolve_default
    setattr(registry, _MARK, True)


# Our task folder -----------------------------------------------------------------------------------------------


def _patch_tasks_when_imported() -> None:
    module = sys.modules.get(_TASKS_MODULE)
    if module is not None and hasattr(module, "TaskManager"):
        _patch(module)
    elif not any(isinstance(finder, _TasksFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TasksFinder())


class _TasksFinder(importlib.abc.MetaPathFinder):
    """Finds `lmms_eval.tasks` like Python itself, with a loader that patches the loaded module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TASKS_MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _PatchingLoader(spec.loader.name, spec.loader.path)
        return spec


class _PatchingLoader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        try:
            _patch(module)
        except Exception as error:  # lmms-eval must keep working without our tasks
            logger.warning("evotok's tasks are not visible (%s); pass --include_path %s", error, TASKS_FOLDER)


def _patch(tasks: ModuleType) -> None:
    """Add our task folder, redirect data sets by `EVOTOK_DATA_ROOT`, leave out tasks that cannot run if asked to, check
    judges before drawing, and record `--gen_kwargs`.

    Only the first call has an effect.
    """
    from tenacity import RetryError

    if getattr(tasks.TaskManager, _MARK, False):
        return
    index_tasks, download = tasks.TaskManager.initialize_tasks, tasks.ConfigurableTask.download
    load_tasks = tasks.TaskManager.load_task_or_group
    build_requests, set_config = tasks.ConfigurableTask.build_all_requests, tasks.ConfigurableTask.set_config

    @functools.wraps(index_tasks)
    def initialize_tasks(self: Any, include_path: Any = None, *args: Any, **kwargs: Any) -> Any:
        folders = [include_path] if isinstance(include_path, (str, os.PathLike)) else list(include_path or ())
        if TASKS_FOLDER not in (Path(folder).resolve() for folder in folders):
            folders.append(str(TASKS_FOLDER))  # last: tasks of lmms-eval and of the user take precedence
        return index_tasks(self, folders, *args, **kwargs)

    @functools.wraps(load_tasks)
    def load_tasks_that_can_run(self: Any, task_list: Any = None, *args: Any, **kwargs: Any) -> Any:
        names = [task_list] if isinstance(task_list, str) else list(task_list or ())
        if not skips_unavailable():
            return load_tasks(self, names, *args, **kwargs)

        def load(name: str) -> dict:
            loaded = load_tasks(self, [name], *args, **kwargs)
            if "--predict_only" not in sys.argv:
                _check_judges(loaded)
            return loaded

        return load_available(load, functools.partial(_members, self), names)

    @functools.wraps(download)
    def download_from_data_root(self: Any, dataset_kwargs: dict | None = None) -> Any:
        GIVEN.pop(self.config.task, None)  # a new task has not been given anything yet
        if self.config.task in UPSTREAM and UPSTREAM[self.config.task].needs_media:
            self.config.process_results_use_image = True
        folder = local_dataset(self.DATASET_PATH)
        if folder is not None and folder != self.DATASET_PATH:
            self.DATASET_PATH = folder
            dataset_kwargs = {"cache_dir": local_cache(folder), **(dataset_kwargs or {})}
        check_login(self.config.task, self.DATASET_PATH, dataset_kwargs)
        if judged := _judged(self):  # here, because lmms-eval retries `download` five times and hides its errors
            self.config.metadata = {**(self.config.metadata or {}), "judges": judged.prepare()}
        pinned = _pinned(self, dataset_kwargs)
        try:
            return download(self, pinned)
        except RetryError as error:  # raise the actual error instead
            cause = error.last_attempt.exception() or error
            if pinned is not dataset_kwargs and is_missing_pin(self.DATASET_PATH, cause):
                logger.warning("%s: %s; its current state is used", self.config.task, cause)
                self.config.metadata.pop("revision", None)
                return download(self, dataset_kwargs)
            raise cause from error

    @functools.wraps(build_requests)
    def build_requests_after_judges(self: Any, *args: Any, **kwargs: Any) -> Any:
        if judged := _judged(self):
            judged.before_drawing(self.config.generation_kwargs)
        elif "--predict_only" not in sys.argv:
            warn_of_judge(self.config.task)
        return build_requests(self, *args, **kwargs)

    @functools.wraps(set_config)
    def set_config_and_record(self: Any, key: str, value: Any, update: bool = False) -> None:
        set_config(self, key, value, update)
        if key == "generation_kwargs" and update:  # only --gen_kwargs updates
            settings = self.config.generation_kwargs
            sampled = settings.get("do_sample")
            sampled = (settings.get("temperature") or 0) != 0 if sampled is None else bool(sampled)
            GIVEN[self.config.task] = GivenKwargs(dict(value), modality_of(self.config.task, settings), sampled)

    tasks.TaskManager.load_task_or_group = load_tasks_that_can_run
    tasks.ConfigurableTask.set_config = set_config_and_record
    tasks.TaskManager.initialize_tasks = initialize_tasks
    tasks.ConfigurableTask.download = download_from_data_root
    tasks.ConfigurableTask.build_all_requests = build_requests_after_judges
    setattr(tasks.TaskManager, _MARK, True)


def _judged(task: Any) -> Any:
    """The `JudgedTask` that scores a task's answers; None for other tasks, and with --predict_only."""
    owner = getattr(task.config.process_results, "__self__", None)
    return owner if hasattr(owner, "before_drawing") else None


def _pinned(task: Any, dataset_kwargs: dict | None) -> dict | None:
    """The arguments of a task's data with the revision of its data set, which the results record as well."""
    path = task.DATASET_PATH
    revision = revision_of(path) if isinstance(path, str) and not os.path.isdir(path) else None
    if revision is None or "revision" in (dataset_kwargs or {}):
        return dataset_kwargs
    if not isinstance(task.config.metadata, list):
        task.config.metadata = {**(task.config.metadata or {}), "revision": revision}
    return {**(dataset_kwargs or {}), "revision": revision}


def _members(manager: Any, name: str) -> list[str]:
    """The named tasks of a group of lmms-eval; empty for a task, and for a group of nameless tasks."""
    if not manager._name_is_group(name) and not manager._name_is_tag(name):
        return []
    listed = manager._get_tasklist(name)
    listed = manager._get_config(name)["task"] if listed == -1 else listed
    return [task for task in listed if isinstance(task, str) and task != name]


def _check_judges(loaded: dict) -> None:
    """Locate the judges of loaded tasks, which is otherwise done after all tasks have been loaded.

    Raises:
        UserError: a judge is missing, or the key of an online one.
    """
    for task in loaded.values():
        if isinstance(task, dict):
            _check_judges(task)
        elif judged := _judged(task):
            judged.before_drawing()
        elif names := missing_judge(task.config.task):
            raise UserError(f"the key of upstream's online judge, {names}, is not set; --predict_only draws without it")


# Local data ----------------------------------------------------------------------------------------------------


def local_dataset(dataset_path: str | None) -> str | None:
    """The local folder of a task's data, `$EVOTOK_DATA_ROOT/<dataset_path>`; the path itself without the variable.

    Only names in the form of the hub (`owner/name`) are looked up. With the variable set, nothing is downloaded.

    Raises:
        UserError: the folder does not exist.
    """
    root = os.environ.get(DATA_ROOT_VARIABLE)
    if not root or not isinstance(dataset_path, str) or "/" not in dataset_path or os.path.isabs(dataset_path):
        return dataset_path
    folder = user_path(root).resolve() / dataset_path
    if folder.is_dir():
        logger.info("data set %s is read from %s", dataset_path, folder)
        return str(folder)
    if Path(dataset_path).is_dir():  # a task of the user with data in the working folder
        return dataset_path
    raise UserError(
        f"{DATA_ROOT_VARIABLE} is set, but {folder} is not a folder; download {dataset_path} with "
        f"`hf download --repo-type dataset {dataset_path} --local-dir {folder}`, or unset {DATA_ROOT_VARIABLE} to use "
        "the hub"
    )


def local_cache(folder: str) -> str:
    """The cache folder of `datasets` for a local folder, a separate one for every state of its files.

    By default `datasets` identifies a local folder by its name and README only, and may return the rows of another
    folder or of an earlier state.
    """
    import datasets

    root = os.environ.get("LMMS_EVAL_DATASETS_CACHE") or datasets.config.HF_DATASETS_CACHE
    state = hashlib.sha256(folder.encode())
    for path in sorted(Path(folder).rglob("*")):
        facts = path.stat()
        state.update(f"\n{path} {facts.st_size} {facts.st_mtime_ns}".encode(errors="surrogateescape"))
    return str(user_path(root) / "evotok_data_root" / state.hexdigest()[:16])
