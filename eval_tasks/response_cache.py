"""lmms-eval's `--use_cache` for this model: answers are kept by the content of the model folder, drawings not at all.

The cache knows a model by its name and arguments alone, so that answers of a model would be scored as those of a later
training in the same folder. Drawn images are files that a later run may overwrite; they are reused by their own rule.
"""

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.caching.response_cache import ResponseCache

from evotok_plugin.errors import UserError

_MARK = "_evotok_keyed"
_KEY = "_model_fingerprint_hash"


def key_by_weights() -> None:
    """Make the response cache ask the model for its identity, where it has one; models of others are left alone."""
    if getattr(ResponseCache, _MARK, False):
        return
    execute = ResponseCache.execute

    @functools.wraps(execute)
    def execute_by_identity(self: ResponseCache, lm: Any, reqtype: str, requests: list[Instance]) -> list:
        identity = getattr(lm, "response_identity", None)
        if identity is None:
            return execute(self, lm, reqtype, requests)
        return _execute(self, functools.partial(execute, self, lm, reqtype), lm, reqtype, requests)

    ResponseCache.execute = execute_by_identity
    setattr(ResponseCache, _MARK, True)


def _execute(cache: ResponseCache, execute: Any, lm: Any, reqtype: str, requests: Sequence[Instance]) -> list:
    if not hasattr(cache, _KEY):
        raise UserError("this version of lmms_eval keys its response cache in another way; leave --use_cache out")
    answers: list = [None] * len(requests)
    kept = [place for place, request in enumerate(requests) if lm.may_be_cached(request)]
    others = sorted(set(range(len(requests))) - set(kept))
    before = getattr(cache, _KEY)
    setattr(cache, _KEY, hashlib.sha256(f"{before}|{lm.response_identity}".encode()).hexdigest()[:16])
    try:
        found = execute([requests[place] for place in kept])
    finally:
        setattr(cache, _KEY, before)
    made = getattr(lm, reqtype)([requests[place] for place in others]) if others else []
    for place, answer in zip([*kept, *others], [*found, *made], strict=True):
        answers[place] = answer
    return answers
