"""The processes of a run, as torchrun starts them; one process alone is the same with nothing to wait for."""

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


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
        """
        rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        use_cuda = torch.cuda.is_available() and device in ("auto", "cuda")
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if use_cuda else torch.device("cpu")
        if not use_cuda and device not in ("auto", "cuda"):
            chosen = torch.device(device)
        if use_cuda:
            torch.cuda.set_device(chosen)
        if world_size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if use_cuda else "gloo")
        return cls(rank, world_size, chosen)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()

    def add_up(self, values: Tensor) -> Tensor:
        """Sum over all processes, in place; on a GPU for NCCL, whatever device the values are on."""
        if self.world_size > 1:
            there = values.to(self.device)
            dist.all_reduce(there)
            values.copy_(there)
        return values

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
