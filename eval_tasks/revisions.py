"""Revisions of the hub's data sets, so that the rows of a benchmark do not change between evaluations.

The commits are those at the head of each data set's main branch, as shown by its page on the hub or, for GQA, TextVQA
and SEED-Bench, as other projects have recorded them. Most are listed under the data sets' earlier owner, `lmms-lab`,
whose repositories were moved with their history. If the hub lacks one, the data set is read at its current state, with
a warning. This module imports almost nothing.
"""

import os
from collections.abc import Mapping

from evotok_plugin.errors import UserError

REVISIONS_VARIABLE = "EVOTOK_DATA_REVISIONS"
PINNED = {
    "lmms-lab-encoder/POPE": "4db1276663dfa5eb8ad16a52d24c31a09e470896",
    "lmms-lab-encoder/MME": "d6c9023f017b564f7b3ccccf5348166bce8fdbcd",
    "lmms-lab-encoder/MMBench": "56ba1af8954932c4804bd3f522e05ed96e63b654",
    "lmms-lab-encoder/VQAv2": "32665d35052eb4a6d4414851c3c829a72754915a",
    "lmms-lab-encoder/ai2d": "c83a9b9692933aff8349157c88a413df9d02c4e5",
    "lmms-lab-encoder/MMMU": "364f2e2eb107b36e07ff4c5a15f5947a759cef47",
    "lmms-lab-encoder/GQA": "a6e72d6e1b912da88af8b2f9eba05d5ea8ec2dd8",
    "lmms-lab-encoder/SEED-Bench": "74c4ea0cee96786739e4ccb97d227818a05ae752",
    "lmms-lab-encoder/textvqa": "9c0699cd19768ac5ab97568f6b3cbac4c0062884",
    "lmms-lab-encoder/MMVet": "b310d12d0d9e765db953da28a7ef7ff43620dc83",
}


def given_revisions(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The revisions in `EVOTOK_DATA_REVISIONS`, OWNER/NAME=REVISION separated by commas.

    Raises:
        UserError: the variable has another form.
    """
    given = {}
    for entry in filter(None, environment.get(REVISIONS_VARIABLE, "").split(",")):
        name, _, revision = entry.strip().partition("=")
        if name.count("/") != 1 or not revision:
            raise UserError(f"{REVISIONS_VARIABLE}: expected OWNER/NAME=REVISION, separated by commas, got {entry!r}")
        given[name] = revision
    return given


def revision_of(dataset_path: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """The revision of a data set: the given one, else the pinned one, else None, the current state."""
    return given_revisions(environment).get(dataset_path) or PINNED.get(dataset_path)


def is_missing_pin(dataset_path: str, error: BaseException, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether an error of `datasets` says that the hub lacks a pinned revision; a given one must exist."""
    text = str(error)
    return dataset_path not in given_revisions(environment) and "Revision" in text and "doesn't exist" in text
