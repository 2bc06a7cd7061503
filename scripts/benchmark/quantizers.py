"""Train small tokenizers that differ in their quantizer only, at equal bits, and compare what their codes hold.

    python scripts/benchmark/quantizers.py
    python scripts/benchmark/quantizers.py --train photos --eval val --teacher timm:tf_efficientnet_lite0:W.safetensors

The evaluated images lie in one folder for each class. Without photographs, embedded scenes are used, and those to
evaluate on have one object, whose shape is the class. With a teacher the runs follow the recipe `evolution`, with an
encoder that trains; without one the recipe `tiny`, pixels only. Rerun the command to resume: finished runs are only
read.
"""

import argparse
import csv
import json
import math
import os
import resource
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from evolution import as_flag, run, spread
from report import Table, add_json_option, machine, write_report

from evotok_plugin.common import command_line
from evotok_plugin.common.command_parser import CommandParser
from evotok_plugin.common.files import write_json
from evotok_plugin.common.recipes import find_recipe, read_recipe
from evotok_plugin.configuration_evotok import EvoTokConfig
from evotok_plugin.errors import UserError
from evotok_plugin.scenes.scene import render, sample_scene

# By name: fields of the model.
VARIANTS: dict[str, dict[str, Any]] = {
    "rvq": {},
    "rvq, rotation": {"quantizer_gradient": "rotation"},
    "simvq": {"quantizer": "simvq"},
    "simvq, rotation": {"quantizer": "simvq", "quantizer_gradient": "rotation"},
    "fsq": {"quantizer": "fsq"},
}
_METRICS = ("psnr", "ssim")
_SCENE_SIZE, _NUM_SCENES = 48, (600, 300)  # images to train and to evaluate on


def settings_of(options: argparse.Namespace, variant: str, seed: int) -> dict[str, Any]:
    """Flags of `evotok train` for one run, without its data and folder."""
    name = "evolution" if options.teacher else "tiny"
    recipe = read_recipe(find_recipe(name, "evotok_plugin"))
    flags: dict[str, Any] = {"recipe": name, "model": recipe.get("model", {}) | VARIANTS[variant], "seed": seed}
    flags |= {"teacher": options.teacher, "freeze_encoder": False} if options.teacher else {"semantic_weight": 0}
    if options.codebook_size:
        flags["model"]["codebook_size"] = options.codebook_size
    if options.image_size:
        flags["model"]["image_size"] = options.image_size
    return flags | ({} if options.max_steps is None else {"max_steps": options.max_steps})


def bits_of(settings: dict[str, Any]) -> float:
    """Bits per position: levels x log2 of the codes per level."""
    recipe = read_recipe(find_recipe(settings["recipe"], "evotok_plugin"))
    model = EvoTokConfig.preset(recipe["preset"], **settings["model"])
    return model.num_quantizers * math.log2(model.codebook_size)


def measured(options: argparse.Namespace, variant: str, seed: int) -> dict[str, Any]:
    """The figures of one run; trains and measures what is missing.

    Raises:
        UserError: a step failed, or the run in the folder has other settings.
    """
    folder = options.output / f"{variant.replace(', ', '_')}_seed{seed}"
    state, settings = folder.with_suffix(".json"), settings_of(options, variant, seed)
    options.output.mkdir(parents=True, exist_ok=True)
    known = json.loads(state.read_text()) if state.is_file() else {"settings": settings, "cpu_seconds": 0.0}
    if known["settings"] != settings:
        raise UserError(f"{folder} holds a run with other settings; choose another --output, or delete it")
    write_json(state, known)
    table, metrics = folder / "evolution" / "evolution.csv", folder / "metrics.json"
    if not (folder / "model.safetensors").is_file():
        before = _cpu_seconds()
        try:
            words = [word for name, value in settings.items() for word in (f"--{name}", as_flag(value))]
            run("train", "--data", str(options.train), "--output_dir", str(folder), "--report_to", "none", *words)
        finally:
            known["cpu_seconds"] += round(_cpu_seconds() - before, 1)
            write_json(state, known)
    if not table.is_file():
        teacher = ["--teacher", options.teacher] if options.teacher else []
        run(
            "evolve", str(options.eval), "--model", str(folder), *teacher, "--fit", "--max_images", "50000",
            "-o", str(table.parent),
        )  # fmt: skip
    if not metrics.is_file():
        run("evaluate", str(options.eval), "--model", str(folder), "--metrics", *_METRICS, "-o", str(metrics))
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    depths = {name: [float(row[name]) for row in rows] for name in rows[0]}
    found = json.loads(metrics.read_text())
    return {**known, "bits": bits_of(settings), "depths": depths, "metrics": {name: found[name] for name in _METRICS}}


def _cpu_seconds() -> float:
    """CPU time of all finished child processes."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _at(name: str, depth: int) -> Callable[[dict[str, Any]], float | None]:
    """The figure of a run at a depth; -1: all levels."""

    def find(figures: dict[str, Any]) -> float | None:
        column = figures["depths"].get(name)
        return column[depth if depth < 0 else depth - 1] if column else None

    return find


# Columns of the table: title, decimals, and the figure of a run; None leaves a column out.
COLUMNS: list[tuple[str, int, Callable[[dict[str, Any]], float | None]]] = [
    ("PSNR, dB", 2, lambda figures: figures["metrics"]["psnr"]),
    ("SSIM", 3, lambda figures: figures["metrics"]["ssim"]),
    ("pixels, depth 1", 3, _at("pixel_r2", 1)),
    ("pixels, depth 4", 3, _at("pixel_r2", 4)),
    ("pixels, all", 3, _at("pixel_r2", -1)),
    ("probe, depth 1", 3, _at("probe_accuracy", 1)),
    ("probe, depth 4", 3, _at("probe_accuracy", 4)),
    ("probe, all", 3, _at("probe_accuracy", -1)),
    ("cosine to the teacher", 3, _at("cosine_teacher", -1)),
    ("codes used", 2, lambda figures: statistics.mean(figures["depths"]["code_usage"])),
    ("perplexity", 1, lambda figures: statistics.mean(figures["depths"]["perplexity"])),
    ("CPU seconds", 0, lambda figures: figures["cpu_seconds"]),
]


def table(results: dict[str, list[dict[str, Any]]]) -> Table:
    """A row for each variant: mean ± standard deviation over the seeds."""
    known = [
        column for column in COLUMNS if all(column[2](one) is not None for runs in results.values() for one in runs)
    ]
    rows = []
    for variant, runs in results.items():
        cells = [spread([float(find(one) or 0.0) for one in runs], digits) for _, digits, find in known]
        rows.append([variant, f"{runs[0]['bits']:g}", *cells])
    return Table(["quantizer", "bits", *(title for title, _, _ in known)], rows)


def write_scenes(folder: Path) -> tuple[Path, Path]:
    """Embedded scenes: a folder to train on, and one with a folder for each shape of an object."""
    rng = np.random.default_rng(0)
    train, evaluated = folder / "train", folder / "eval"
    for number in range(_NUM_SCENES[0]):
        _save(render(sample_scene(rng, "position"), _SCENE_SIZE), train / f"{number}.png")
    for number in range(_NUM_SCENES[1]):
        scene = sample_scene(rng, "single_object")
        _save(render(scene, _SCENE_SIZE), evaluated / scene.objects[0].shape / f"{number}.png")
    return train, evaluated


def _save(image: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def main() -> int:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--train", type=Path, help="folder of photographs to train on (default: embedded scenes)")
    parser.add_argument("--eval", type=Path, help="folder with a folder of photographs for each class")
    parser.add_argument("--teacher", help="timm:tf_efficientnet_lite0:FILE.safetensors (default: pixels only)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="seeds of the runs")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS], help="quantizers to compare")
    parser.add_argument("--max_steps", type=int, help="steps of each run instead of the recipe's")
    parser.add_argument("--image_size", type=int, help="pixels a side instead of the recipe's")
    parser.add_argument("--codebook_size", type=int, help="codes per level instead of the recipe's")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each run")
    parser.add_argument("-o", "--output", type=Path, default=Path("outputs/quantizers"), help="folder for all results")
    add_json_option(parser)
    return command_line.run(parser, work=_run_all)


def _run_all(options: argparse.Namespace) -> None:
    if (options.train is None) != (options.eval is None):
        raise UserError("--train and --eval belong together; give both, or neither for embedded scenes")
    if options.teacher and options.train is None:
        raise UserError("--teacher has no effect on embedded scenes; give photographs with --train and --eval")
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    if options.train is None:
        options.train, options.eval = write_scenes(options.output / "scenes")
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in options.variants}
    for seed in options.seeds:
        for name in options.variants:
            results[name].append(measured(options, name, seed))
    measured_on = machine(packages=("torch", "timm"), threads=str(options.threads))
    write_json(options.output / "quantizers.json", {"machine": measured_on, "runs": results})
    shown = {"quantizers" if options.teacher else "quantizers-scenes": table(results)}
    figures = {name: [{**one, "settings": one["settings"]["model"]} for one in runs] for name, runs in results.items()}
    write_report(options.json, __file__, shown, measured_on, {"results": figures})
    print(*(one.markdown() for one in shown.values()))
    print(options.output / "quantizers.json")


if __name__ == "__main__":
    sys.exit(main())
