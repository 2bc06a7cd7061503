"""Measurement of time and memory, shared by the benchmarks in this folder."""

import functools
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Parts:
    """Seconds by name, of calls in the main thread; a call within another one counts only for itself."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.seconds = clock, dict[str, float]()
        self._inner: list[float] = []  # of the calls in progress: seconds of the calls within

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """A function that adds the time of a call to `name`."""

        @functools.wraps(call)
        def run(*args: Any, **keywords: Any) -> Any:
            started = self.clock()
            self._inner.append(0.0)
            try:
                return call(*args, **keywords)
            finally:
                spent = self.clock() - started
                self.seconds[name] = self.seconds.get(name, 0.0) + spent - self._inner.pop()
                if self._inner:
                    self._inner[-1] += spent

        return run


def synchronize(device: torch.device) -> None:
    """Wait for the pending work of a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def now(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """The time by the given clock after the GPU has finished its work."""
    synchronize(device)
    return clock()


def clock_name(num_threads: int, device: torch.device) -> str:
    """CPU time for one thread, which does not depend on other programs; else wall-clock time."""
    return "cpu" if num_threads == 1 and device.type == "cpu" else "wall"


def clock_for(num_threads: int, device: torch.device) -> Callable[[], float]:
    """The clock that `clock_name` names."""
    return CLOCKS[clock_name(num_threads, device)]


def seconds(run: Callable[[], object], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """The duration of one call by the given clock."""
    synchronize(device)
    started = clock()
    run()
    synchronize(device)
    return clock() - started


def peak_mebibytes(run: Callable[[], object], device: torch.device) -> float:
    """The peak of the additional memory that torch allocates during a call."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 2**20


def device_name(device: torch.device) -> str:
    """The name of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if Path("/proc/cpuinfo").is_file():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
