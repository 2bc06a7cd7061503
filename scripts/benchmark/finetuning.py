"""Measure the quickstart's fine-tuning stage on a CPU: what packing brings, and where the time of a step goes.

    python scripts/benchmark/finetuning.py --json finetuning.json
    python scripts/benchmark/finetuning.py --threads 1 --clock cpu     # on a busy machine

Every run is the stage `finetune` of the quickstart (its recipe, with DeepSpeed) in a process of its own, on a small
scene corpus, from the included model. Three kinds of batches take turns, and the best round of each counts:

* packed: the recipe's rows of several samples, one row per step;
* padded: the samples of the same row, each in a row of its own, padded to the longest. The losses, the gradient norm
  and the numbers of learned tokens of the first step must equal those of the packed row, otherwise the exit code is 1.
* grouped: `--packing false` with as many samples per step, which makes batches of one kind and similar lengths. These
  are other samples, so losses are not compared.

A token is an input of the language model: a token of text or a position of an image. The first steps and the last one,
which writes a checkpoint, are not counted. Losses are those of the first step. The second table splits the steps with
packed rows; "forward" includes the gradients of the classifiers, which are computed together with the losses.
"""

from evotok_plugin.common import command_line

if __name__ == "__main__":
    command_line.exit_without("train")

import argparse
import contextlib
import functools
import itertools
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from measuring import CLOCKS, Parts
from report import Table, add_json_option, machine, write_report
from transformers.trainer_callback import CallbackHandler

from evotok_plugin.common.command_parser import CommandParser
from evotok_plugin.errors import UserError
from evotok_plugin.scenes.corpus import write_corpus
from llava_ext.data.collators import Collator, PackedCollator
from llava_ext.data.dataset import ConversationDataset, Sample
from llava_ext.folding import FoldedSequence
from llava_ext.model_folder import INCLUDED_MODEL
from llava_ext.modeling_evotok_llava import EvoTokLlavaForConditionalGeneration
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor
from llava_ext.training import train
from llava_ext.training.trainer import EvoTokTrainer

WARM_UP = 3  # steps that do not count, since memory is allocated and libraries are imported in them
TOLERANCE = 1e-5  # of the losses and the gradient norm, relative
BATCHES = {
    "packed": "packed (the recipe)",
    "padded": "padded, the same samples",
    "grouped": "grouped (`--packing false`)",
}
# Parts in the order of the table; those after a group's name belong to it.
PARTS = {
    "data": ("reading and encoding", "packing", "loading and counting"),
    "forward": (),
    "backward": ("autograd", "gradients to DeepSpeed's buffers"),
    "optimizer": ("AdamW", "norm, clipping, copies"),
    "everything else": ("logging and callbacks", "engine and Trainer"),
}


# One run of the stage -----------------------------------------------------------------------------------------------


class PaddedRows:
    """Collates the samples of packed rows to a batch with one sample per row."""

    def __init__(self, processor: EvoTokLlavaProcessor) -> None:
        self._collate = Collator(processor)

    def __call__(self, rows: Sequence[Sequence[Sample]]) -> dict[str, torch.Tensor]:
        return self._collate([sample for row in rows for sample in row])


class Recorder:
    """Times, losses and batches of the steps of a training run in this process."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.parts = Parts(clock)
        self.starts: list[float] = []  # of the steps
        self.seconds_before: list[dict[str, float]] = []  # of the parts, before each step
        self.losses: list[dict[str, torch.Tensor]] = []
        self.norms: list[float] = []
        self.batches: list[FoldedSequence] = []

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record the training that runs within."""
        from deepspeed.runtime.engine import DeepSpeedEngine
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        places: list[tuple[Any, str, str]] = [
            (EvoTokTrainer, "get_batch_samples", "loading and counting"),
            (ConversationDataset, "__getitem__", "reading and encoding"),
            *((collator, "__call__", "packing") for collator in (Collator, PackedCollator)),
            (EvoTokLlavaForConditionalGeneration, "forward", "forward"),
            (DeepSpeedEngine, "backward", "autograd"),
            (DeepSpeedZeroOptimizer, "process_gradients", "gradients to DeepSpeed's buffers"),
            (DeepSpeedEngine, "allreduce_gradients", "gradients to DeepSpeed's buffers"),
            (DeepSpeedEngine, "step", "norm, clipping, copies"),
            (torch.optim.AdamW, "step", "AdamW"),
            (CallbackHandler, "call_event", "logging and callbacks"),
            (EvoTokTrainer, "log", "logging and callbacks"),
        ]
        watched: list[tuple[Any, str, Callable]] = [
            (EvoTokLlavaForConditionalGeneration, "forward", self._keep_losses),
            (EvoTokLlavaForConditionalGeneration, "run_backbone", lambda run: self.batches.append(run.folded)),
            (DeepSpeedEngine, "get_global_grad_norm", lambda norm: self.norms.append(float(norm))),
        ]
        with contextlib.ExitStack() as stack:
            for owner, name, part in places:
                stack.enter_context(mock.patch.object(owner, name, self.parts.timed(part, getattr(owner, name))))
            for owner, name, keep in watched:
                stack.enter_context(mock.patch.object(owner, name, watch(getattr(owner, name), keep)))
            fetch = EvoTokTrainer.get_batch_samples
            stack.enter_context(mock.patch.object(EvoTokTrainer, "get_batch_samples", self._begins_step(fetch)))
            yield

    def _keep_losses(self, output: Any) -> None:
        names = ("text_loss", "image_loss", "num_text_tokens", "num_image_positions")
        self.losses.append({name: getattr(output, name).detach() for name in names})

    def _begins_step(self, fetch: Callable) -> Callable:
        def run(*args: Any, **keywords: Any) -> Any:
            self.seconds_before.append(dict(self.parts.seconds))
            self.starts.append(self.parts.clock())
            return fetch(*args, **keywords)

        return run

    def _learned(self, step: int) -> dict[str, float]:
        """Losses, numbers of learned tokens and positions, and gradient norm of a step."""
        losses = {name: float(value) for name, value in self.losses[step].items()}
        return {**losses, "gradient_norm": self.norms[step]}

    def figures(self) -> dict[str, Any]:
        """Figures of the steps that count, and the losses of the first and of the last of all steps."""
        last = len(self.starts) - 1  # the index of the step that writes a checkpoint
        before, after = self.seconds_before[WARM_UP], self.seconds_before[last]
        counted = self.batches[WARM_UP:last]
        return {
            "seconds": [end - start for start, end in itertools.pairwise(self.starts[WARM_UP:])],
            "parts": {name: after[name] - before.get(name, 0.0) for name in after},
            "samples": sum(int((one.starts & (one.segment_ids > 0)).sum()) for one in counted),
            "tokens": sum(int((one.segment_ids > 0).sum()) for one in counted),
            "padded_tokens": sum(one.segment_ids.numel() for one in counted),
            "first_step": self._learned(0),
            "last_step": self._learned(last),
            "threads": torch.get_num_threads(),
        }


def watch(call: Callable, keep: Callable[[Any], object]) -> Callable:
    """A function that also passes the result of a call to `keep`."""

    @functools.wraps(call)
    def run(*args: Any, **keywords: Any) -> Any:
        result = call(*args, **keywords)
        keep(result)
        return result

    return run


def finetune(batches: str, settings: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Run the stage in this process; returns the figures of its steps."""
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)  # accelerate would replace the number of threads
        torch.set_num_threads(options.threads)
    recorder = Recorder(CLOCKS[options.clock])
    with contextlib.ExitStack() as stack:
        stack.enter_context(recorder.recording())
        if batches == "padded":
            stack.enter_context(mock.patch.object(train, "PackedCollator", PaddedRows))
        train.run_stage("finetune", settings)
    return recorder.figures()


def in_own_process(work: Callable[[], dict[str, Any]], log: Path) -> dict[str, Any]:
    """The result of a call in a forked process, which shares the imports but not the process group.

    Args:
        log: file for the output of the process.

    Raises:
        UserError: the process fails.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        with log.open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        try:
            sender.send(work())
        except UserError as error:
            sender.send(error)

    process = context.Process(target=run)
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        lines = log.read_text(errors="replace").strip().splitlines()[-5:]
        raise UserError(f"fine-tuning failed (exit code {process.exitcode}): {' / '.join(lines)}") from None
    except BaseException:
        process.terminate()
        raise
    finally:
        process.join()
    if isinstance(result, UserError):
        raise result
    return result


# Comparison -----------------------------------------------------------------------------------------------------------


def compare(options: argparse.Namespace, workspace: Path) -> dict[str, list[dict[str, Any]]]:
    """Run the stage with all kinds of batches in turn; returns the figures of all rounds of each."""
    write_corpus(workspace / "scenes", options.scenes, num_val=1, seed=0)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in BATCHES}
    for number in range(options.rounds):
        for name in BATCHES:
            settings = {
                "model_name_or_path": str(options.model),
                "workspace": str(workspace),
                "output_dir": str(workspace / f"{name}_{number}"),
                "max_steps": WARM_UP + options.steps + 1,
                "use_cpu": True,
            }
            if name == "grouped":
                samples = round(runs["packed"][0]["samples"] / options.steps)
                settings |= {"packing": False, "per_device_train_batch_size": samples}
            work = functools.partial(finetune, name, settings, options)
            runs[name].append(in_own_process(work, workspace / f"{name}_{number}.log"))
            spent = sum(runs[name][-1]["seconds"]) / options.steps
            print(f"round {number + 1}, {name}: {1000 * spent:.1f} ms per step", file=sys.stderr, flush=True)
    return runs


def best(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The round with the least time."""
    return min(runs, key=lambda run: sum(run["seconds"]))


def differences(packed: dict[str, Any], padded: dict[str, Any]) -> dict[str, float]:
    """Relative differences of the first step: losses, gradient norm, and numbers of learned tokens and positions."""
    one, other = packed["first_step"], padded["first_step"]
    return {name: abs(one[name] - other[name]) / (abs(other[name]) or 1.0) for name in other}


def same_step(different: dict[str, float]) -> bool:
    """Whether all differences are within the tolerance; NaN is not."""
    return all(value <= TOLERANCE for value in different.values())


def batches_table(runs: dict[str, list[dict[str, Any]]]) -> Table:
    """Speed, size and losses of each kind of batches."""
    header = ["batches", "samples per s", "tokens per s", "ms per step", "samples per step", "tokens per step"]
    header += ["padding", "text loss", "image loss"]
    rows = []
    for name, title in BATCHES.items():
        run = best(runs[name])
        spent, steps, first = sum(run["seconds"]), len(run["seconds"]), run["first_step"]
        cells = [f"{run['samples'] / spent:.1f}", f"{run['tokens'] / spent:.0f}", f"{1000 * spent / steps:.1f}"]
        cells += [f"{run['samples'] / steps:.1f}", f"{run['tokens'] / steps:.0f}"]
        cells.append(f"{1 - run['tokens'] / run['padded_tokens']:.1%}")
        cells += ["" if name == "grouped" else f"{first[loss]:.6f}" for loss in ("text_loss", "image_loss")]
        rows.append([title, *cells])
    return Table(header, rows)


def parts_table(run: dict[str, Any]) -> Table:
    """Milliseconds per step and shares of the parts of a step."""
    total, steps, parts = sum(run["seconds"]), len(run["seconds"]), run["parts"]
    parts = {**parts, "engine and Trainer": total - sum(parts.values())}
    rows = []
    for group, names in PARTS.items():
        rows.append((group, sum(parts.get(name, 0.0) for name in names or (group,))))
        rows += [(f"- {name}", parts.get(name, 0.0)) for name in names]
    rows.append(("all", total))
    cells = [[name, f"{1000 * spent / steps:.2f}", f"{spent / total:.1%}"] for name, spent in rows]
    return Table(["part of a training step", "ms per step", "share"], cells)


def run(options: argparse.Namespace) -> int:
    """Measure, print the tables, and compare the first step; 1 if it differs.

    Raises:
        UserError: a number is too small, or training fails.
    """
    for name in ("steps", "scenes", "rounds"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(options, name)}")
    with tempfile.TemporaryDirectory(prefix="evotok-finetuning-") as place:
        runs = compare(options, Path(place))
    tables = {"finetuning": batches_table(runs), "finetuning-parts": parts_table(best(runs["packed"]))}
    print("\n\n".join(table.markdown() for table in tables.values()))
    packages = ("torch", "transformers", "accelerate", "deepspeed")
    on = machine("cpu", packages, clock=options.clock, threads=str(runs["packed"][0]["threads"]))
    different = differences(runs["packed"][0], runs["padded"][0])
    print(f"\n{', '.join(f'{key} {value}' for key, value in on.items())}")
    print(f"first step, relative differences: {', '.join(f'{key} {value:.1e}' for key, value in different.items())}")
    write_report(options.json, __file__, tables, on, {"results": runs, "differences": different})
    if same_step(different):
        return 0
    print(f"the first steps of packed and padded samples differ by more than {TOLERANCE}", file=sys.stderr)
    return 1


def main() -> int:
    """Parse the flags and measure."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--model", default=INCLUDED_MODEL, help="start of the training (default: the included model)")
    parser.add_argument("--scenes", type=int, default=960, help="scenes of the corpus; quickstart.sh --fast has 960")
    parser.add_argument("--steps", type=int, default=30, help="steps that count; a log line is written every 10 steps")
    parser.add_argument("--rounds", type=int, default=3, help="runs with each kind of batches; the best one counts")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: as in the quickstart")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: CPU time, on a busy machine")
    add_json_option(parser)
    return command_line.run(parser, work=run)


if __name__ == "__main__":
    sys.exit(main())
