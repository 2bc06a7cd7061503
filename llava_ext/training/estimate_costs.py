"""Disk, host memory and hours of a training run, from its parameters and its steps."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU according to its data sheet.

    Attributes:
        teraflops: dense bf16 TFLOP/s.
        gigabytes: memory.
    """

    teraflops: float
    gigabytes: int


GPUS = {
    "H200": Gpu(989.0, 141),
    "H100": Gpu(989.0, 80),
    "A100": Gpu(312.0, 80),
    "L40S": Gpu(362.0, 48),
    "A6000": Gpu(155.0, 48),
    "4090": Gpu(165.0, 24),
    "3090": Gpu(71.0, 24),
}
RESERVED = 2e9  # bytes of a GPU for CUDA's own state, communication and gaps between allocated blocks
UTILIZATION = 0.35  # share of the peak that dense training usually reaches
_ADAM, _MASTER = 8, 4  # bytes per trained parameter


def gpus_with(memory: float) -> list[str]:
    """The kinds of GPU, keys of `GPUS`, that have `memory` bytes besides those that are reserved."""
    return [name for name, gpu in GPUS.items() if gpu.gigabytes * 1e9 >= memory + RESERVED]


@dataclass(frozen=True)
class Costs:
    """Costs of a run apart from the memory of its GPUs.

    Attributes:
        checkpoint: bytes on disk of a checkpoint.
        disk: bytes on disk of the run: its checkpoints, one more while it is written, and the model. The code cache is
            not included.
        host: bytes of host memory over all processes, while every process loads the model and with what is offloaded.
        flops_per_step: floating point operations of an optimizer step over all GPUs.
        steps: optimizer steps; 0 if they are not known.
    """

    checkpoint: float
    disk: float
    host: float
    flops_per_step: float
    steps: int

    def hours(self, gpu: str, num_gpus: int) -> float:
        """Hours of the run on a number of GPUs of a kind, a key of `GPUS`."""
        return self.steps * self.flops_per_step / (GPUS[gpu].teraflops * 1e12 * UTILIZATION * num_gpus) / 3600

    def lines(self, num_gpus: int) -> list[str]:
        """The costs in words."""
        found = [
            "",
            f"disk: {self.checkpoint / 1e9:.1f} GB per checkpoint, {self.disk / 1e9:.1f} GB for the run",
            f"host memory while loading: {self.host / GIB:.1f} GiB over {num_gpus} process(es)",
            f"computation: {self.flops_per_step / 1e12:.1f} TFLOP per step",
        ]
        if not self.steps:
            return [*found, "hours: unknown number of samples; pass --samples N (of an epoch)"]
        hours = ", ".join(f"{gpu} {self.hours(gpu, num_gpus):.1f}" for gpu in GPUS)
        return [*found, f"hours for {self.steps} steps on {num_gpus} GPU(s) at {UTILIZATION:.0%} of the peak: {hours}"]


@dataclass(frozen=True)
class Sizes:
    """Sizes that costs follow from.

    Attributes:
        tower: bytes of the tokenizer, which is stored in float32.
        weights: bytes of all other weights as they are loaded.
        trained: bytes of the trained weights.
        num_trained: number of trained parameters.
        num_active: parameters of the LLM that every step multiplies with, without embeddings.
        num_active_trained: those of them that train.
        head_per_position: parameters of the image head times the number of times that it runs for a drawn position.
    """

    tower: float
    weights: float
    trained: float
    num_trained: int
    num_active: int
    num_active_trained: int
    head_per_position: float


def checkpoint_bytes(sizes: Sizes, zero_stage: int | None, is_adapter: bool) -> float:
    """Bytes on disk of a checkpoint.

    The model (or the adapter), and the state of the engine: with DeepSpeed (`zero_stage` is not None) the averages of
    Adam and a float32 copy of the trained weights, and below stage 3 also the weights once more.
    """
    model = sizes.trained if is_adapter else sizes.weights + sizes.tower
    if zero_stage is None:
        return model + _ADAM * sizes.num_trained
    again = 0.0 if zero_stage == 3 else sizes.trained if is_adapter else sizes.weights
    return model + again + (_ADAM + _MASTER) * sizes.num_trained


def flops_of_step(sizes: Sizes, llm_steps: float, drawn_positions: float, is_checkpointed: bool) -> float:
    """Floating point operations of an optimizer step.

    A parameter costs 2 in the forward pass of a step of the LLM, 2 for the gradient of its input, 2 for its own
    gradient if it trains, and 2 more if activations are recomputed. Attention scores are left out.
    """
    passes = 4 + (2 if is_checkpointed else 0)
    llm = llm_steps * (passes * sizes.num_active + 2 * sizes.num_active_trained)
    return llm + drawn_positions * 6 * sizes.head_per_position
