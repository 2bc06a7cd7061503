"""Real training runs in forked ranks: libraries are imported once, process groups and environments are separate."""

import json
import multiprocessing
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from queue import Empty

import torch.distributed as dist
import yaml

from llava_ext.training import train
from llava_ext.training.config import StageConfig
from llava_ext.training.launch import prepare_processes
from llava_ext.training.parameter_groups import group_of
from llava_ext.training.reinforcement.train import REINFORCEMENT
from llava_ext.training.settings import stage_values
from llava_ext.training.trainer import EvoTokTrainer

LIMIT_S = 900  # only ends a test that hangs


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _child(rank, world_size, port, function, arguments, queue, watch=None):
    if watch is not None:
        threading.Thread(target=_signal_self, args=watch, daemon=True).start()
    if world_size > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
        os.environ.update(LOCAL_WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        queue.put((rank, "ok", function(*arguments)))
    except SystemExit:
        raise
    except BaseException as error:  # noqa: BLE001 - the parent process raises it
        queue.put((rank, f"{type(error).__name__}: {error}", traceback.format_exc()))


def _signal_self(happened: Callable[[], bool], number: int) -> None:
    while not happened():
        time.sleep(0.001)
    os.kill(os.getpid(), number)


def start_forked(function: Callable, *arguments, world_size: int = 1, watches: dict[int, tuple] | None = None):
    """Start `function` in forked ranks; returns the ranks and the queue of their results.

    Args:
        watches: by rank a condition and the signal that the rank sends to itself once it is met.
    """
    assert not dist.is_initialized(), "a forked rank would wait in its parent's process group"
    context = multiprocessing.get_context("fork")
    queue, port = context.Queue(), _free_port()
    ranks = [
        context.Process(
            target=_child, args=(rank, world_size, port, function, arguments, queue, (watches or {}).get(rank))
        )
        for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    return ranks, queue


def run_forked(function: Callable, *arguments, world_size: int = 1):
    """Run `function` in forked ranks; returns the result of rank 0, or raises an error with the text of a rank's."""
    ranks, queue = start_forked(function, *arguments, world_size=world_size)
    results = []
    while len(results) < world_size:
        try:
            results.append(queue.get(timeout=2))
        except Empty:
            died = [rank.exitcode for rank in ranks if rank.exitcode]
            if died:
                for rank in ranks:
                    rank.kill()
                raise RuntimeError(f"a rank died with exit code {died[0]}") from None
    for rank in ranks:
        rank.join(LIMIT_S)
    results.sort(key=lambda result: result[0])
    for rank, status, result in results:
        if status != "ok":
            raise RuntimeError(f"rank {rank}: {status}\n{result}")
    return results[0][2]


def exit_codes_when(
    happened: Callable[[], bool],
    signal_number: int,
    function: Callable,
    *arguments,
    world_size: int = 1,
    only_first: bool = False,
) -> list[int]:
    """Exit codes of forked ranks that run `function` and get a signal as soon as a condition is met.

    A thread in each rank checks the condition and sends the signal: on a loaded machine it is as slow as the rank
    itself, so the signal arrives in time.
    """
    watched = range(1 if only_first else world_size)
    watches = dict.fromkeys(watched, (happened, signal_number))
    ranks, _ = start_forked(function, *arguments, world_size=world_size, watches=watches)
    for rank in ranks:
        rank.join(LIMIT_S)
    assert happened(), "the run ended before the condition was met"
    return [rank.exitcode for rank in ranks]


def run(recipe: Path, output: Path, overrides: dict | None = None) -> None:
    """Run a stage as the training command does."""
    train.run_stage(str(recipe), {"output_dir": str(output), **(overrides or {})})


def reinforce(recipe: Path, output: Path, overrides: dict | None = None) -> None:
    """Run reinforcement as its command does."""
    train.run_stage(str(recipe), {"output_dir": str(output), **(overrides or {})}, REINFORCEMENT)


def stage_exit(recipe: Path, output: Path, flags: list[str], main: Callable = train.main) -> tuple[int, str]:
    """Exit code of a training command and the last line on its stderr."""
    import contextlib
    import io

    captured = io.StringIO()
    with contextlib.redirect_stderr(captured):
        code = main(["--recipe", str(recipe), "--output_dir", str(output), *flags])
    return code, captured.getvalue().strip().splitlines()[-1]


def losses(output: Path) -> dict[int, float]:
    """The loss of every step; of a repeated step, the last one."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def write_recipe(folder: Path, backbone: Path, evotok: Path, scenes: Path) -> Path:
    """A recipe of four steps that trains everything on a few scenes and text-only samples."""
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    (folder / "text.json").write_text(json.dumps([{"id": f"t{i}", "conversations": turns} for i in range(8)]))
    values = {
        "model_name_or_path": str(backbone),
        "vision_tower": str(evotok),
        "data_path": [str(scenes / "train" / "finetune.json"), str(folder / "text.json")],
        "image_folder": str(scenes / "train"),
        "code_cache": str(folder / "codes"),
        "head_hidden_size": 32,
        "head_num_layers": 2,
        "head_num_heads": 2,
        "deepspeed": "zero2",
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "report_to": "none",
        "disable_tqdm": True,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def prepared_config(recipe: Path, overrides: dict) -> StageConfig:
    """The config of a stage, ready for training in this process."""
    config = StageConfig(**stage_values(str(recipe), overrides))
    prepare_processes(config)
    return config


def train_one_step(recipe, output, overrides):
    """Train a step without DeepSpeed.

    Returns:
        (all, trained) parameters by group; bytes of all weights, of the trained weights and of the optimizer state.
    """
    config = prepared_config(recipe, {"output_dir": str(output), "deepspeed": None, "max_steps": 1, **overrides})
    model, processor = train.build_model(config)
    dataset = train.build_dataset(config, model, processor)
    model = train.make_trainable(model, config)
    counts = {"vision_tower": (sum(p.numel() for p in model.vision_tower.parameters()), 0)}
    for name, parameter in model.named_parameters():
        every, trained = counts.get(group_of(name), (0, 0))
        counts[group_of(name)] = (every + parameter.numel(), trained + parameter.numel() * parameter.requires_grad)
    trainer = EvoTokTrainer(
        model,
        config,
        train_dataset=dataset,
        data_collator=train.Collator(processor),
        processing_class=processor,
        shape=train.RunShape(1),
        base={"name": "", "fingerprint": None},
    )
    trainer.train()
    averages = [t for state in trainer.optimizer.state.values() for t in state.values() if t.ndim]
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
    weights = [*model.parameters(), *model.vision_tower.parameters()]
    return counts, size(weights), size(p for p in model.parameters() if p.requires_grad), size(averages)
