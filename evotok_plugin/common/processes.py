"""The processes of a run, as torchrun starts them, and what they exchange; a single process exchanges nothing."""

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from evotok_plugin.errors import UserError


def resolve_device(name: str = "auto") -> torch.device:
    """The device that `--device` names; `auto` is CUDA if it is available, else the CPU.

    Raises:
        UserError: the device is unknown, or not available on this machine or in this build of PyTorch.
    """
    if name in ("", "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = ""
    try:
        device = torch.device(name)
        if device.type == "meta":
            reason = "its tensors have no values"
        elif device.type == "cuda" and not torch.cuda.is_available():
            reason = "CUDA is not available (no GPU, no driver, or PyTorch without CUDA)"
        elif device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            reason = f"there are {torch.cuda.device_count()} GPUs, counted from 0"
        elif device.type != "cpu":
            torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        # A build without the backend asserts, or lacks its module.
        reason = str(error).splitlines()[0]
    if reason:
        raise UserError(f"--device {name} cannot be used here: {reason}; use auto, cpu, cuda or cuda:N")
    return device


@dataclass(frozen=True)
class Processes:
    """This process among those of the run: its `rank` of `world_size`, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def join(cls, device: str = "auto") -> "Processes":
        """Join the process group of the run that torchrun started; without torchrun, this is the only process.

        Args:
            device: `auto` is the GPU of this process if CUDA is available, else the CPU.

        Raises:
            UserError: the device is not available, there are more processes than GPUs, or the environment variables
                that torchrun sets are incomplete.
        """
        rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        chosen = resolve_device(device)
        use_cuda = chosen.type == "cuda"
        if use_cuda and chosen.index is None:
            chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if use_cuda:
            if chosen.index >= torch.cuda.device_count():
                raise UserError(
                    f"there are {torch.cuda.device_count()} GPUs, too few for process {chosen.index} (from 0) of this "
                    "machine; start at most one process per GPU (NPROC), or use --device cpu"
                )
            torch.cuda.set_device(chosen)
        if world_size > 1 and not dist.is_initialized():
            try:
                dist.init_process_group("nccl" if use_cuda else "gloo")
            except ValueError as error:  # MASTER_ADDR or MASTER_PORT is missing
                raise UserError(
                    f"WORLD_SIZE is {world_size}, but {error}; start the processes with torchrun"
                ) from error
        return cls(rank, world_size, chosen)

    @classmethod
    def current(cls) -> "Processes":
        """The process group that this process has already joined, or this process alone."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls(0, 1, torch.device("cpu"))
        on_gpu = "nccl" in dist.get_backend()  # also in "cpu:gloo,cuda:nccl"
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
        """Sum over all processes, in place. The values may be on any device; NCCL sums them on the GPU."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def largest(self, values: Tensor) -> Tensor:
        """Elementwise maximum over all processes, in place; like `add_up`."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Tensor, operation: Any) -> Tensor:
        if self.world_size > 1:
            on_device = values.to(self.device)
            dist.all_reduce(on_device, operation)
            values.copy_(on_device)
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
        """The values of all processes, in the order of their ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def leave(self) -> None:
        """Leave the process group, if there is one."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()
