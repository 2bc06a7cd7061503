"""lmms-eval's entry point: registers the model `evotok`, also as the one meant where no `--model` is given, and makes
our task folder visible.

lmms-eval loads the entry points of all plug-ins under one try/except and imports `lmms_eval.tasks` (seconds) only
when it evaluates. So this module imports next to nothing, never raises, and adds the tasks when, and only when,
`lmms_eval.tasks` is imported.
"""

import functools
import hashlib
import importlib.abc
import importlib.machinery
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from evotok_plugin.errors import UserError

logger = logging.getLogger(__name__)

TASKS_FOLDER = Path(__file__).resolve().parent / "tasks"
DATA_ROOT_VARIABLE = "EVOTOK_DATA_ROOT"
_TASKS_MODULE = "lmms_eval.tasks"
_DEFAULT_NAME = "hf"
_MARK = "_evotok_registered"


@dataclass(frozen=True)
class GivenKwargs:
    """Keys that `--gen_kwargs` set in a task, and whether they were used.

    Attributes:
        given: the keys and values of the command line.
        modality: of the task's requests.
        samples: whether its answers are sampled.
    """

    given: dict
    modality: str
    samples: bool


# By name of the task, for the run that is being set up; lmms-eval mixes these keys with the task's own.
GIVEN: dict[str, GivenKwargs] = {}


def register():
    """Entry point of the group `lmms_eval.models`: returns the model's `ModelManifest`."""
    from lmms_eval.models.registry_v2 import ModelManifest, ModelRegistryV2

    try:
        _answer_to_the_default_name(ModelRegistryV2)
        _patch_tasks_when_imported()
    except Exception as error:  # raising here would unregister every plug-in that comes after ours
        logger.warning("evotok's tasks are not visible (%s); pass --include_path %s", error, TASKS_FOLDER)
    return ModelManifest(model_id="evotok", chat_class_path="eval_tasks.model.EvoTokLmms")


# The model that `lmms-eval --tasks ...` means ------------------------------------------------------------------


def _answer_to_the_default_name(registry: type) -> None:
    """`--model` has a default that lmms-eval itself has no model for; without one of that name, it means ours."""
    if getattr(registry, _MARK, False):
        return
    resolve = registry.resolve

    @functools.wraps(resolve)
    def resolve_default(self, model_name, *args, **kwargs):
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
    """Finds `lmms_eval.tasks` as Python itself would, with a loader that patches the module it has loaded."""

    def find_spec(self, fullname, path=None, target=None):
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
        except Exception as error:  # lmms-eval must go on without our tasks
            logger.warning("evotok's tasks are not visible (%s); pass --include_path %s", error, TASKS_FOLDER)


def _patch(tasks: ModuleType) -> None:
    """Add our folder to the task index, let `EVOTOK_DATA_ROOT` redirect data sets, find judges before drawing, note
    `--gen_kwargs`; once."""
    from tenacity import RetryError

    if getattr(tasks.TaskManager, _MARK, False):
        return
    index_tasks, download = tasks.TaskManager.initialize_tasks, tasks.ConfigurableTask.download
    build_requests, set_config = tasks.ConfigurableTask.build_all_requests, tasks.ConfigurableTask.set_config

    @functools.wraps(index_tasks)
    def initialize_tasks(self, include_path=None, *args, **kwargs):
        folders = [include_path] if isinstance(include_path, (str, os.PathLike)) else list(include_path or ())
        if TASKS_FOLDER not in (Path(folder).resolve() for folder in folders):
            folders.append(str(TASKS_FOLDER))  # last: names of lmms-eval's own tasks and of the user's win
        return index_tasks(self, folders, *args, **kwargs)

    @functools.wraps(download)
    def download_from_data_root(self, dataset_kwargs=None):
        GIVEN.pop(self.config.task, None)  # a task that is set up anew has been given nothing yet
        if (folder := local_dataset(self.DATASET_PATH)) != self.DATASET_PATH:
            self.DATASET_PATH = folder
            dataset_kwargs = {"cache_dir": local_cache(folder), **(dataset_kwargs or {})}
        if judged := _judged(self):  # here, because lmms-eval hides what `download` raises behind five attempts
            self.config.metadata = {**(self.config.metadata or {}), "judges": judged.prepare()}
        try:
            return download(self, dataset_kwargs)
        except RetryError as error:  # says that something was raised; what it was helps
            raise error.last_attempt.exception() from error

    @functools.wraps(build_requests)
    def build_requests_when_judges_are_there(self, *args, **kwargs):
        if judged := _judged(self):
            judged.before_drawing()
        return build_requests(self, *args, **kwargs)

    @functools.wraps(set_config)
    def set_config_and_note(self, key, value, update=False):
        set_config(self, key, value, update)
        if key == "generation_kwargs" and update:  # which only --gen_kwargs does
            settings = self.config.generation_kwargs
            sampled = settings.get("do_sample")
            sampled = (settings.get("temperature") or 0) != 0 if sampled is None else bool(sampled)
            GIVEN[self.config.task] = GivenKwargs(dict(value), settings.get("modality") or "text", sampled)

    tasks.ConfigurableTask.set_config = set_config_and_note
    tasks.TaskManager.initialize_tasks = initialize_tasks
    tasks.ConfigurableTask.download = download_from_data_root
    tasks.ConfigurableTask.build_all_requests = build_requests_when_judges_are_there
    setattr(tasks.TaskManager, _MARK, True)


def _judged(task):
    """The `JudgedTask` that scores a task's answers; None for other tasks, and with --predict_only."""
    owner = getattr(task.config.process_results, "__self__", None)
    return owner if hasattr(owner, "before_drawing") else None


# Local data ----------------------------------------------------------------------------------------------------


def local_dataset(dataset_path: str | None) -> str | None:
    """Where a task's data lies: `$EVOTOK_DATA_ROOT/<dataset_path>`; without the variable nothing changes.

    Only names of the hub's form (`owner/name`) are looked up. Where the variable is set, nothing comes from the hub.

    Raises:
        UserError: there is no such folder.
    """
    root = os.environ.get(DATA_ROOT_VARIABLE)
    if not root or not isinstance(dataset_path, str) or "/" not in dataset_path or os.path.isabs(dataset_path):
        return dataset_path
    folder = Path(root).expanduser().resolve() / dataset_path
    if folder.is_dir():
        logger.info("data set %s is read from %s", dataset_path, folder)
        return str(folder)
    if Path(dataset_path).is_dir():  # a task of the user's, with data beside the working folder
        return dataset_path
    raise UserError(
        f"{DATA_ROOT_VARIABLE} is set, so {dataset_path} is expected in {folder}, which is no folder; fetch it with "
        f"`hf download --repo-type dataset {dataset_path} --local-dir {folder}`, or unset {DATA_ROOT_VARIABLE} to read "
        "from the hub"
    )


def local_cache(folder: str) -> str:
    """Where `datasets` keeps a local folder's tables: a place of its own for every state of the folder.

    Left to itself, `datasets` tells local folders apart by their last name and README alone, and gives the rows of one
    for those of another, or of an earlier state.
    """
    import datasets

    root = os.environ.get("LMMS_EVAL_DATASETS_CACHE") or datasets.config.HF_DATASETS_CACHE
    state = hashlib.sha256(folder.encode())
    for path in sorted(Path(folder).rglob("*")):
        facts = path.stat()
        state.update(f"\n{path} {facts.st_size} {facts.st_mtime_ns}".encode(errors="surrogateescape"))
    return str(Path(root).expanduser() / "evotok_data_root" / state.hexdigest()[:16])
