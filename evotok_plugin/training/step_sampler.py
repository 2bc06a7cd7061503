"""Positions of the training stream that one process reads, step by step."""

from collections.abc import Iterator

from evotok_plugin.common.processes import Processes


class StepSampler:
    """A batch sampler that yields, for every step, this process's share of the batch."""

    def __init__(self, first_step: int, last_step: int, batch_size: int, processes: Processes) -> None:
        self._steps, self._batch_size = range(first_step, last_step), batch_size
        self._share = batch_size // processes.world_size
        self._offset = processes.rank * self._share

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps:
            first = step * self._batch_size + self._offset
            yield list(range(first, first + self._share))
