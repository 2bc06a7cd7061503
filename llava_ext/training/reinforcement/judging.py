"""Scores of drawings by rewards, with errors that name the reward's failure on all processes."""

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from PIL.Image import Image

from evotok_plugin.common.foreign_files import describe_error
from evotok_plugin.common.processes import Processes
from evotok_plugin.errors import UserError
from llava_ext.rewards import WeightedRewards

logger = logging.getLogger(__name__)

T = TypeVar("T")


def judge(
    rewards: WeightedRewards, prompts: Sequence[str], images: Sequence[Image], processes: Processes, when: str
) -> dict[str, list[float]]:
    """Scores by reward of images, each for the prompt at the same index; none without images.

    Args:
        when: the step, for errors.

    Raises:
        UserError: on all processes, if a reward fails on any.
    """
    scores = on_all_processes(lambda: rewards.scores(prompts, images) if images else {}, processes, when)
    return {name: scores.get(name, []) for name in rewards.names}


def on_all_processes(function: Callable[[], T], processes: Processes, when: str) -> T:
    """The result of a function that runs code of others; all processes call this.

    Raises:
        UserError: the function fails on any process.
    """
    message, cause, result = "", None, None
    try:
        result = function()
    except Exception as error:  # a reward is code of the user and may raise anything
        message = str(error) if isinstance(error, UserError) else f"the reward failed with {describe_error(error)}"
        cause = error
        logger.debug("reward failed", exc_info=True)
    failed = [text for text in processes.gather(message) if text]
    if failed:
        raise UserError(
            f"{when}: {failed[0]}; the last checkpoint is kept. Correct the reward and run the same command again"
        ) from cause
    assert result is not None
    return result
