"""The prompts of each step: every prompt is used equally often, and the tags of a step are balanced."""

import random
from collections.abc import Sequence

from llava_ext.data.prompt_files import Prompt


class PromptOrder:
    """An endless order of prompts that depends only on a seed.

    Tags take turns. The prompts of a tag are shuffled, and shuffled again when all have been used.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        self._by_tag: dict[str, list[Prompt]] = {}
        for prompt in prompts:
            self._by_tag.setdefault(prompt.tag, []).append(prompt)
        self._seed, self._tags = seed, sorted(self._by_tag)
        self._shuffled: dict[tuple[str, int], list[Prompt]] = {}

    def take(self, start: int, count: int) -> list[Prompt]:
        """The prompts at the places `start` to `start + count - 1` of the order."""
        return [self._at(place) for place in range(start, start + count)]

    def _at(self, place: int) -> Prompt:
        tag = self._tags[place % len(self._tags)]
        use = place // len(self._tags)
        epoch, index = divmod(use, len(self._by_tag[tag]))
        return self._epoch(tag, epoch)[index]

    def _epoch(self, tag: str, epoch: int) -> list[Prompt]:
        if (tag, epoch) not in self._shuffled:
            self._shuffled.pop((tag, epoch - 2), None)
            prompts = list(self._by_tag[tag])
            random.Random(f"{self._seed} {tag} {epoch}").shuffle(prompts)
            self._shuffled[tag, epoch] = prompts
        return self._shuffled[tag, epoch]
