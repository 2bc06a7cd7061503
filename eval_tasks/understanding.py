"""What the group `evotok_understanding` changes of upstream's tasks: GQA's images, and whether MM-Vet runs.

Importing this costs nothing; lmms-eval does so when it loads the group.
"""

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from eval_tasks.registration import local_cache, local_dataset

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

_GQA = "lmms-lab-encoder/GQA"
# By upstream's API_TYPE; others (a local server) need none.
_JUDGE_KEYS = {
    "openai": "OPENAI_API_KEY",
    "async_openai": "OPENAI_API_KEY",
    "azure": "AZURE_API_KEY",
    "async_azure": "AZURE_API_KEY",
}


def judged_group(environment: Mapping[str, str]) -> dict[str, Any]:
    """The tasks that an online model judges, as a group: `mmvet` where the key of its judge is set, else none.

    Upstream asks MM-Vet's questions with "think step by step" before them, which a model trained on LLaVA's data has
    never seen: here they stand alone, as LLaVA asks them.
    """
    group = "evotok_understanding_judged"
    key = _JUDGE_KEYS.get(environment.get("API_TYPE", "openai").lower())
    if key is not None and not environment.get(key):
        logger.warning("mmvet is left out: its answers are judged by a model online, for which %s must be set", key)
        return {"group": group, "group_alias": f"mmvet (left out: no {key})", "task": []}
    prompts = {"default": {"pre_prompt": "", "post_prompt": ""}}
    return {"group": group, "task": [{"task": "mmvet", "lmms_eval_specific_kwargs": prompts}]}


def __getattr__(name: str) -> dict[str, Any]:
    """`JUDGED`, made at every look: lmms-eval takes apart what it gets, and the environment decides."""
    if name == "JUDGED":
        return judged_group(os.environ)
    raise AttributeError(name)


def gqa_process_docs(questions: "datasets.Dataset") -> "datasets.Dataset":
    """GQA's questions with their images, which are a data set of their own.

    Raises:
        ValueError: EVOTOK_DATA_ROOT is set and has no GQA, or a question's image is not among the images.
    """
    import datasets

    path = local_dataset(_GQA)
    cache = local_cache(path) if path != _GQA else None
    images = datasets.load_dataset(path, "testdev_balanced_images", split="testdev", cache_dir=cache)
    rows = {name: row for row, name in enumerate(images["id"])}
    missing = [name for name in questions["imageId"] if name not in rows]
    if missing:
        raise ValueError(f"GQA: {len(missing)} questions without image, the first about {missing[0]!r}; fetch it again")
    matching = images.select_columns("image").select([rows[name] for name in questions["imageId"]])
    return datasets.concatenate_datasets([questions, matching], axis=1)
