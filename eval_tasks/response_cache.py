"""lmms-eval's `--use_cache` for this model: answers are keyed by the model folder's content, images are not cached.

lmms-eval identifies a model by its name and arguments only, so that after another training in the same folder it would
reuse the answers of the old weights. Drawn images are files that a later run may overwrite; the model adapter decides
whether to reuse them.
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
    """Patch the response cache to include a model's `response_identity` in its keys; other models are not affected."""
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
        raise UserError("this version of lmms_eval keys its response cache differently; leave --use_cache out")
    answers: list = [None] * len(requests)
    cached = [place for place, request in enumerate(requests) if lm.may_be_cached(request)]
    others = sorted(set(range(len(requests))) - set(cached))
    before = getattr(cache, _KEY)
    setattr(cache, _KEY, hashlib.sha256(f"{before}|{lm.response_identity}".encode()).hexdigest()[:16])
    try:
        found = execute([requests[place] for place in cached])
    finally:
        setattr(cache, _KEY, before)
    made = getattr(lm, reqtype)([requests[place] for place in others]) if others else []
    for place, answer in zip([*cached, *others], [*found, *made], strict=True):
        answers[place] = answer
    return answers
