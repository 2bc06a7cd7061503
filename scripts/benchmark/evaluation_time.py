"""Measure where the time of an lmms-eval drawing task goes: the share of the model, and of everything around it.

    python scripts/benchmark/evaluation_time.py --json evaluation_time.json
    python scripts/benchmark/evaluation_time.py --clock cpu            # on a busy machine

lmms-eval runs the task `geneval_scenes` in this process and without a network: on the included model, and on the same
model with random weights in the shape of a larger LLM, whose drawings are wrong but take the time of such a model. The
first table splits the time of `generate_until`, which draws all images, writes their files and returns their paths. In
the model are the language model with the embedding of prompts, the image head with its sampling and the embedding of
its codes, the pixel decoder, and with `--best_of` the reading of the candidates. Files are written in another thread
while the model runs: by wall time only waiting for it counts, and by CPU time its work. The second table splits the
whole run on the first model. Shown is the round with the shortest `generate_until`.
"""

import argparse
import contextlib
import copy
import io
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import embedded_tasks
import torch
from measuring import CLOCKS, Parts
from report import Table, add_json_option, machine, write_report
from text import SHAPES
from transformers import AutoConfig

from evotok_plugin import EvoTokModel
from evotok_plugin.common import command_line
from evotok_plugin.common.command_parser import CommandParser
from evotok_plugin.errors import UserError
from llava_ext import EvoTokLlavaForConditionalGeneration
from llava_ext.generation.fused_model import FusedModel
from llava_ext.generation.head_steps import DepthHeadStepper, FlatHeadStepper
from llava_ext.generation.reading_score import PromptReader
from llava_ext.generation.steps import Steps
from llava_ext.model_folder import INCLUDED_MODEL, default_model_folder, open_model
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor

TASK = "geneval_scenes"
IN_MODEL = ("language model", "image head", "pixel decoder", "reading")
_ALL = "all of `generate_until`"
AROUND = ("prompts", "existing images", "rows of the batch", "files")


@contextlib.contextmanager
def timing(parts: Parts, language_model: type) -> Iterator[None]:
    """Time the parts of `generate_until`."""
    from eval_tasks import drawing
    from eval_tasks.drawing import ImageWriter
    from eval_tasks.model import EvoTokLmms

    places: list[tuple[Any, str, str]] = [
        (EvoTokLmms, "generate_until", "other"),
        (language_model, "forward", "language model"),
        (FusedModel, "forward", "language model"),
        (EvoTokLlavaForConditionalGeneration, "embed_prompt", "language model"),
        *(
            (stepper, name, "image head")
            for stepper in (DepthHeadStepper, FlatHeadStepper)
            for name in ("draw", "embed")
        ),
        (EvoTokModel, "decode_pixels", "pixel decoder"),
        (PromptReader, "scores", "reading"),
        (EvoTokLlavaProcessor, "apply_chat_template", "prompts"),
        (drawing, "to_prompt", "prompts"),
        (drawing.Drawing, "_exists", "existing images"),
        *((Steps, name, "rows of the batch") for name in ("split", "select", "resize", "add_rows")),
        *((ImageWriter, name, "files") for name in ("write", "__exit__")),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, part in places:
            stack.enter_context(mock.patch.object(owner, name, parts.timed(part, getattr(owner, name))))
        joined = parts.timed("rows of the batch", Steps.joined)
        stack.enter_context(mock.patch.object(Steps, "joined", joined))
        yield


def save_with_llm(folder: Path, name: str, to: Path) -> None:
    """Save the model of a folder with random weights in the shape of another LLM, and its tokenizer's weights."""
    opened = open_model(str(folder), "cpu")
    config = copy.deepcopy(opened.model.config)
    of_text = config.text_config
    kept = {key: getattr(of_text, key) for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    config.text_config = AutoConfig.for_model(**SHAPES[name] | kept)
    torch.manual_seed(0)
    model = EvoTokLlavaForConditionalGeneration(config)
    model.vision_tower.load_state_dict(opened.model.vision_tower.state_dict())
    model.save_pretrained(to)
    opened.processor.save_pretrained(to)


def evaluate(folder: Path, options: argparse.Namespace, clock: Callable[[], float]) -> dict[str, Any]:
    """Run the task once on the model of a folder; returns the seconds of all parts, and the score."""
    from eval_tasks.model import EvoTokLmms

    whole: dict[str, float] = {}
    main_thread = Parts(time.thread_time if options.clock == "cpu" else clock)
    generate_until = EvoTokLmms.generate_until

    def drawing(lm: EvoTokLmms, requests: list) -> list[str]:
        started = clock()
        whole["starting"] = started - begun
        answers = generate_until(lm, requests)
        whole["drawing"] = clock() - started
        return answers

    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
        begun = clock()
        settings = {"batch_size": options.batch_size, "best_of": options.best_of, "images_dir": f"{place}/images"}
        lm = EvoTokLmms(str(folder), device="cpu", **settings)
        with (
            mock.patch.object(EvoTokLmms, "generate_until", drawing),
            timing(main_thread, type(lm._model.language_model)),
        ):
            results = embedded_tasks.evaluate(lm, [TASK], options.prompts, Path(place, "out"))
        whole["scoring"] = clock() - begun - whole["starting"] - whole["drawing"]
        images = len(list(Path(place, "images").rglob("*.png")))
    parts = main_thread.seconds
    if options.clock == "cpu":  # the work of the thread that writes files
        parts["files"] = parts.get("files", 0.0) + whole["drawing"] - sum(parts.values())
    score = results[TASK]["overall,none"]
    return {"parts": parts, "whole": whole, "images": images, "score": score, "share": share(parts)}


def share(parts: dict[str, float]) -> float:
    """The share of the model in the time of drawing."""
    return sum(parts.get(name, 0.0) for name in IN_MODEL) / sum(parts.values())


def parts_table(results: dict[str, dict[str, Any]]) -> Table:
    """Milliseconds per image of the parts of drawing, and their shares, by the model."""
    some = next(iter(results.values()))["parts"]
    names = ["in the model", *(f"- {name}" for name in IN_MODEL if name in some), *AROUND, "other", _ALL]
    cells = [[name] for name in names]
    for result in results.values():
        parts, images = result["parts"], result["images"]
        sums = {"in the model": sum(parts.get(name, 0.0) for name in IN_MODEL), _ALL: sum(parts.values())}
        for row, name in zip(cells, names, strict=True):
            spent = sums.get(name, parts.get(name.removeprefix("- "), 0.0))
            row += [f"{1000 * spent / images:.2f}", f"{spent / sums[_ALL]:.1%}"]
    columns = [(f"{model}, ms per image", f"{model}, share") for model in results]
    return Table(["part of drawing", *(one for pair in columns for one in pair)], cells)


def run_table(result: dict[str, Any], importing: float) -> Table:
    """Seconds of the whole run."""
    whole = result["whole"]
    names = {"starting": "opening the model and the task", "drawing": "drawing", "scoring": "judging and reporting"}
    rows = [["importing the libraries", f"{importing:.1f}"], *([names[one], f"{whole[one]:.1f}"] for one in names)]
    return Table([f"part of the run, {result['images']} images", "s"], rows)


def run(options: argparse.Namespace) -> None:
    """Measure and print the tables.

    Raises:
        UserError: a number is too small.
    """
    for name in ("prompts", "batch_size", "rounds"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.threads:
        torch.set_num_threads(options.threads)
    clock = CLOCKS[options.clock]
    started = clock()
    from eval_tasks import registration

    registration.register()
    import lmms_eval.evaluator  # noqa: F401  (its time is measured)

    import eval_tasks.model  # noqa: F401

    importing = clock() - started
    folder, results, best = Path(options.model or default_model_folder()), {}, {}
    first = "included" if folder == INCLUDED_MODEL else folder.name
    with tempfile.TemporaryDirectory() as place:
        folders = {first: folder} | {name: Path(place, name) for name in options.llms}
        for name in options.llms:
            save_with_llm(folder, name, folders[name])
        for name, own in folders.items():
            results[name] = [evaluate(own, options, clock) for _ in range(options.rounds)]
            best[name] = min(results[name], key=lambda one: one["whole"]["drawing"])
    tables = {"evaluation-time": parts_table(best), "evaluation-run": run_table(best[first], importing)}
    print("\n\n".join(table.markdown() for table in tables.values()))
    on = machine(clock=options.clock, packages=("torch", "lmms_eval"))
    print(f"\n{', '.join(f'{key} {value}' for key, value in on.items())}")
    for name, runs in results.items():
        shown = ", ".join(f"{one['share']:.1%}" for one in runs)
        print(f"{name}: share in each round: {shown}; score {best[name]['score']:.3f}")
    write_report(options.json, __file__, tables, on, {"results": results})


def main() -> int:
    """Parse the flags and measure."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--model", help="model folder (default: the newest in outputs/, or the included model)")
    parser.add_argument(
        "--llms", nargs="*", default=["SmolLM2-135M"], choices=list(SHAPES), help="shapes of the LLMs of further models"
    )
    parser.add_argument("--prompts", type=int, default=64, help="prompts of the task, four images each")
    parser.add_argument("--batch_size", type=int, default=16, help="images drawn together")
    parser.add_argument("--best_of", type=int, help="candidates per image (default: the model's setting)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of the task; the best one counts")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's default")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: CPU time, on a busy machine")
    add_json_option(parser)
    return command_line.run(parser, work=run)


if __name__ == "__main__":
    sys.exit(main())
