"""The processes of a run, as torchrun starts them; one process alone is the same with nothing to wait for."""

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from evotok_plugin.errors import UserError


def resolve_device(name: str = "auto") -> torch.device:
    """The device that `--device` names; `auto` is CUDA where it is available, else the CPU.

    Raises:
        UserError: an unknown device, or one that this machine or this build of PyTorch does not have.
    """
    if name in ("", "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = ""
    try:
        device = torch.device(name)
        if device.type == "meta":
            reason = "it holds no values"
        elif device.type == "cuda" and not torch.cuda.is_available():
            reason = "CUDA is not available (no GPU, no driver, or PyTorch without CUDA)"
        elif device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            reason = f"there are {torch.cuda.device_count()} GPUs, counted from 0"
        elif device.type != "cpu":
            torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # a build without the backend asserts
        reason = str(error).splitlines()[0]
    if reason:
        raise UserError(f"--device {name} cannot be used here: {reason}; use auto, cpu, cuda or cuda:N")
    return device


@dataclass(frozen=True)
class Processes:
    """This process among all of them: its `rank` of `world_size`, and the device it works on."""

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def join(cls, device: str = "auto") -> "Processes":
        """Take part in the run that torchrun started, or be the only process.

        Args:
            device: `auto` takes the process's own GPU where there is one, else the CPU.

        Raises:
            UserError: the device is not available, or more processes than GPUs were started.
        """
        rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        chosen = resolve_device(device)
        use_cuda = chosen.type == "cuda"
        if use_cuda and chosen.index is None:
            chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if use_cuda:
            if chosen.index >= torch.cuda.device_count():
                raise UserError(
                    f"process {chosen.index} of this machine has no GPU: {torch.cuda.device_count()} GPUs are there; "
                    "start as many processes as GPUs (NPROC), or use --device cpu"
                )
            torch.cuda.set_device(chosen)
        if world_size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if use_cuda else "gloo")
        return cls(rank, world_size, chosen)

    @classmethod
    def current(cls) -> "Processes":
        """The process group that this process has already joined, or this process alone."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls(0, 1, torch.device("cpu"))
        on_gpu = dist.get_backend() == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()

    def add_up(self, values: Tensor) -> Tensor:
        """Sum over all processes, in place; on a GPU for NCCL, whatever device the values are on."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def largest(self, values: Tensor) -> Tensor:
        """Elementwise maximum over all processes, in place, as `add_up`."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Tensor, operation: Any) -> Tensor:
        if self.world_size > 1:
            there = values.to(self.device)
            dist.all_reduce(there, operation)
            values.copy_(there)
        return values

    def gather_tensors(self, values: Tensor) -> list[Tensor]:
        """The tensors of all processes, which must be of one shape, in rank order."""
        if self.world_size == 1:
            return [values]
        there = values.to(self.device)
        gathered = [torch.empty_like(there) for _ in range(self.world_size)]
        dist.all_gather(gathered, there)
        return [part.to(values.device) for part in gathered]

    def gather(self, value: Any) -> list[Any]:
        """What every process gives, in the order of ranks."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def leave(self) -> None:
        """End taking part; a run that did not start several processes has nothing to end."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()
