"""The changes of the group `evotok_understanding` to upstream's tasks: GQA's images, and MM-Vet only with a judge.

This module imports almost nothing, because lmms-eval imports it whenever it loads the group.
"""

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from eval_tasks.registration import local_cache, local_dataset
from eval_tasks.revisions import revision_of
from evotok_plugin.errors import UserError

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

UNJUDGED = (
    "pope",
    "mmbench_en_dev_static",
    "mme",
    "seedbench",
    "evotok_gqa",
    "textvqa_val",
    "vqav2_val",
    "ai2d",
    "mmmu_val",
)
_GQA = "lmms-lab-encoder/GQA"
# By upstream's API_TYPE; other types (a local server) need no key.
_JUDGE_KEYS = {
    "openai": "OPENAI_API_KEY",
    "async_openai": "OPENAI_API_KEY",
    "azure": "AZURE_API_KEY",
    "async_azure": "AZURE_API_KEY",
}


def judged_tasks(environment: Mapping[str, str]) -> list[str]:
    """The tasks judged by an online model: `evotok_mmvet` if the key of its judge is set."""
    key = _missing_key(environment)
    if key:
        logger.warning("mmvet is left out: its answers are judged by an online model, which needs %s", key)
    return [] if key else ["evotok_mmvet"]


def _missing_key(environment: Mapping[str, str]) -> str:
    key = _JUDGE_KEYS.get(environment.get("API_TYPE", "openai").lower(), "")
    return "" if environment.get(key) else key


def suite(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The members of the group `evotok_understanding`, to run them one by one."""
    return [*UNJUDGED, *judged_tasks(environment)]


def __getattr__(name: str) -> dict[str, Any]:
    """`JUDGED`, created on every access: lmms-eval modifies the value, and the environment determines it."""
    if name == "JUDGED":
        group = {"group": "evotok_understanding_judged", "task": judged_tasks(os.environ)}
        return group if group["task"] else {**group, "group_alias": f"mmvet (left out: no {_missing_key(os.environ)})"}
    raise AttributeError(name)


def gqa_process_docs(questions: "datasets.Dataset") -> "datasets.Dataset":
    """GQA's questions joined with their images, which are a separate data set.

    Raises:
        UserError: EVOTOK_DATA_ROOT is set but has no GQA, or an image is missing.
    """
    import datasets

    path = local_dataset(_GQA)
    assert path is not None
    cache = local_cache(path) if path != _GQA else None
    revision = revision_of(_GQA) if path == _GQA else None
    images = datasets.load_dataset(path, "testdev_balanced_images", split="testdev", cache_dir=cache, revision=revision)
    rows = {name: row for row, name in enumerate(images["id"])}
    missing = [name for name in questions["imageId"] if name not in rows]
    if missing:
        raise UserError(f"GQA: {len(missing)} questions without an image, first {missing[0]!r}; download GQA again")
    matching = images.select_columns("image").select([rows[name] for name in questions["imageId"]])
    return datasets.concatenate_datasets([questions, matching], axis=1)
