"""Measure the scores of a model on `mmbench_scenes` and `geneval_scenes`, in total and by category.

    python scripts/benchmark/scene_tasks.py                          # the included model
    python scripts/benchmark/scene_tasks.py --model outputs/finetune

lmms-eval runs both tasks in this process and without a network. For comparison, the table has the score of guessing
("chance"), and that of the same images for other prompts.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from embedded_tasks import evaluate
from report import Table, add_json_option, machine, write_report

from evotok_plugin.common import command_line
from evotok_plugin.common.command_parser import CommandParser
from evotok_plugin.common.recipes import check_seed
from evotok_plugin.errors import UserError
from evotok_plugin.scenes.scene import SKILLS
from llava_ext.model_folder import INCLUDED_MODEL, open_model

# By task: the names of its scores, as lmms-eval has them, and as the table shows them.
TASKS = {
    "mmbench_scenes": {
        "chance": "chance",
        **{name: name for name in ("color", "shape", "counting", "existence", "location", "relation")},
    },
    "geneval_scenes": {"baseline": "other prompts", **{skill: skill for skill in SKILLS}},
}


def scores(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """Run both tasks with lmms-eval, which writes to `folder`; returns the scores by task and name.

    With `--limit`, a category without questions has no score.
    """
    from eval_tasks import registration

    registration.register()
    from eval_tasks.model import EvoTokLmms

    lm = EvoTokLmms(
        str(options.model),
        device="cpu",
        batch_size=options.batch_size,
        seed=options.seed,
        images_dir=str(folder / "images"),
    )
    results = evaluate(lm, [*TASKS], options.limit, folder / "out")
    return {
        task: {name: results[task][f"{name},none"] for name in ("overall", *parts) if f"{name},none" in results[task]}
        for task, parts in TASKS.items()
    }


def table(found: dict[str, dict[str, float]]) -> Table:
    """A row for each score; the first row of a task is its total."""
    rows = []
    for task, parts in TASKS.items():
        rows.append([f"`{task}`", f"{found[task]['overall']:.3f}"])
        known = {shown: found[task][name] for name, shown in parts.items() if name in found[task]}
        rows += [[f"`{task}`, {shown}", f"{score:.3f}"] for shown, score in known.items()]
    return Table(["task", "score"], rows)


def run(options: argparse.Namespace) -> None:
    """Measure and print the table.

    Raises:
        UserError: a number is too small, or the model cannot be opened.
    """
    check_seed(options.seed)
    for name in ("batch_size", "limit", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(options, name)}")
    torch.set_num_threads(options.threads)
    fingerprint = open_model(options.model, "cpu").fingerprint[:12]
    with tempfile.TemporaryDirectory() as folder:
        found = scores(options, Path(folder))
    print(table(found).markdown())
    on = machine(packages=("torch", "transformers", "lmms_eval"), seed=str(options.seed), model=fingerprint)
    write_report(options.json, __file__, {"scene-tasks": table(found)}, on, {"scores": found})


def main() -> int:
    """Parse the flags and measure."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=INCLUDED_MODEL, help="model folder (default: the included model)")
    parser.add_argument("--batch_size", type=int, default=64, help="answers and images computed together")
    parser.add_argument("--seed", type=int, default=0, help="seed of the images")
    parser.add_argument("--limit", type=int, help="questions and prompts of each task (default: all)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    add_json_option(parser)
    return command_line.run(parser, work=run)


if __name__ == "__main__":
    sys.exit(main())
