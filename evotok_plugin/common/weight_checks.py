"""Checks of loaded weights: all present, of the right shape, finite; independent of transformers."""

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evotok_plugin.common.foreign_files import describe_error
from evotok_plugin.errors import UserError

logger = logging.getLogger(__name__)

HARMLESS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
"""Patterns of unexpected weights that can be ignored: buffers that are computed from the configuration."""

_CHECKED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_SHOWN = 3
_MOST_ZERO = 0.25  # share of the weight matrices


def load_strictly(
    module: nn.Module, weights: dict[str, Tensor], what: str, remedy: str = "download, copy or save the folder again"
) -> None:
    """Load a state dict into a module; every weight must be present, fit and be finite.

    Args:
        what: origin of the weights, for the error message.
        remedy: what the user can do, for the error message.

    Raises:
        UserError: weights that are missing, unexpected, of another shape or not finite.
    """
    check_names(module.state_dict(), weights, what, remedy)
    check_values(weights, what)
    module.load_state_dict(weights)


def check_names(
    expected: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    what: str,
    remedy: str = "download, copy or save the folder again",
) -> None:
    """Compare the names and shapes of weights with the expected ones.

    Raises:
        UserError: weights that are missing, unexpected or of another shape.
    """
    check_report(
        {
            "missing_keys": set(expected) - set(weights),
            "unexpected_keys": set(weights) - set(expected),
            "mismatched_keys": [
                (name, tuple(weights[name].shape), tuple(expected[name].shape))
                for name in expected
                if name in weights and weights[name].shape != expected[name].shape
            ],
        },
        what,
        remedy=remedy,
    )


def check_report(
    report: dict[str, Any],
    what: str,
    unused: Collection[str] = (),
    not_needed: Collection[str] = (),
    remedy: str = "download, copy or save the folder again",
) -> None:
    """Turn the loading report of transformers into an error.

    Args:
        unused, not_needed: patterns of weights that may be unexpected, and that may be missing.

    Raises:
        UserError: weights that are missing, unexpected or of another shape.
    """

    def odd(keys: Collection[str], harmless: Collection[str]) -> list[str]:
        return sorted(key for key in map(str, keys) if not any(re.search(pattern, key) for pattern in harmless))

    shapes = sorted(
        f"{name} {tuple(found)} instead of {tuple(expected)}"
        for name, found, expected in report.get("mismatched_keys", ())
    )
    problems = {
        "missing": odd(report.get("missing_keys", ()), not_needed),
        "unexpected": odd(report.get("unexpected_keys", ()), unused),
        "of another shape": shapes,
    }
    found = [f"{len(names)} {kind} ({some_of(names)})" for kind, names in problems.items() if names]
    if found or report.get("error_msgs"):
        detail = "; ".join(found) or describe_error(str(report["error_msgs"]))
        raise UserError(f"{what} does not match this model: weights {detail}; {remedy}")


def some_of(names: Sequence[str]) -> str:
    """The first of the names, for a message."""
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


@torch.no_grad()
def check_values(weights: dict[str, Tensor], what: str) -> None:
    """Reject NaN and infinite weights and models with many all-zero matrices; warn about a few all-zero matrices.

    A few matrices of zeros may be intended (new blocks that start as the identity). Many are the sign of a file that
    was allocated but not filled, as after an interrupted download.

    Raises:
        UserError: values that are not finite, or too many matrices of zeros.
    """
    matrices, zero = 0, list[str]()
    for name, value in weights.items():
        if not isinstance(value, Tensor) or value.is_meta or not value.numel() or value.dtype not in _CHECKED:
            continue
        least, most = torch.stack(torch.aminmax(value)).tolist()
        if not abs(least) < float("inf") or not abs(most) < float("inf"):
            raise UserError(f"{what}: {name} holds values that are NaN or infinite; train or download it again")
        if value.ndim >= 2 and name.endswith("weight"):
            matrices += 1
            zero += [name] if least == most == 0 else []
    if len(zero) > _MOST_ZERO * matrices:
        raise UserError(
            f"{what}: {len(zero)} of {matrices} weight matrices are zero ({some_of(zero)}); a download or copy was "
            "probably interrupted, download or copy the folder again"
        )
    if zero:
        logger.warning(
            "%s: %d weight matrices are all zero (%s); was a download interrupted?", what, len(zero), some_of(zero)
        )
