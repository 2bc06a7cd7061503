"""Train the recipe `evolution` and its controls on photographs, and show what the codes of every depth hold.

    python scripts/benchmark/evolution.py --train photos --eval val --teacher timm:tf_efficientnet_lite0:W.safetensors

The evaluated images lie in one folder for each class. Controls: `pixels`, an encoder without the CNN's features;
`decoders 4/4` and `decoders 16/16`, both decoders at one depth; `trained`, an encoder that trains as well. Rerun the
command to resume: finished runs are only read.
"""

import argparse
import csv
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from report import Table, add_json_option, machine, write_report

from evotok_plugin.common import command_line
from evotok_plugin.common.command_parser import CommandParser
from evotok_plugin.common.files import write_json
from evotok_plugin.common.recipes import find_recipe, read_recipe
from evotok_plugin.errors import UserError

# By name: settings that differ from the recipe; `model` holds fields of the model.
VARIANTS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "pixels": {"semantic_share": 0.0},
    "decoders 4/4": {"model": {"semantic_depth": 4}},
    "decoders 16/16": {"model": {"pixel_depth": 16}},
    "trained": {"freeze_encoder": False},
}
FIGURES = {
    "pixel_r2": "R2 of the pixels",
    "probe_accuracy": "linear probe",
    "teacher_r2": "R2 of the teacher's features",
    "psnr": "PSNR of the pixel decoder, dB",
    "cosine_teacher": "cosine of the semantic decoder to the teacher",
}


def train(options: argparse.Namespace, variant: str, seed: int, folder: Path) -> None:
    """Train one variant with one seed, through the command that users type."""
    recipe = read_recipe(find_recipe("evolution", "evotok_plugin"))
    changes = dict(VARIANTS[variant])
    model = recipe["model"] | changes.pop("model", {})
    flags = {"model": model, **changes, "seed": seed}
    if options.max_steps is not None:
        flags["max_steps"] = options.max_steps
    words = [word for name, value in flags.items() for word in (f"--{name}", as_flag(value))]
    run(
        "train", "--recipe", "evolution", "--data", str(options.train), "--teacher", options.teacher,
        "--output_dir", str(folder), "--report_to", "none", *words,
    )  # fmt: skip


def as_flag(value: Any) -> str:
    """A value as it is written on the command line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()


def run(*arguments: str) -> None:
    """Run `evotok`, and end with its error if it fails."""
    code = subprocess.run([sys.executable, "-m", "evotok_plugin.cli", *arguments]).returncode
    if code:
        raise UserError(f"evotok {arguments[0]} ended with exit code {code}; rerun this command to resume")


def measured(options: argparse.Namespace, variant: str, seed: int) -> dict[str, list[float]]:
    """The columns of evolution.csv of one run, by name; trains and measures what is missing."""
    folder = options.output / f"{variant.replace(' ', '_').replace('/', '_')}_seed{seed}"
    table = folder / "evolution" / "evolution.csv"
    if not table.is_file():
        train(options, variant, seed, folder)
        run(
            "evolve", str(options.eval), "--model", str(folder), "--teacher", options.teacher, "--fit",
            *(["--fit_on", str(options.fit_on)] if options.fit_on else []), "--max_images", "50000",
            "-o", str(table.parent),
        )  # fmt: skip
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation of the sample; a single value alone."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def tables(results: dict[str, list[dict[str, list[float]]]]) -> dict[str, Table]:
    """A table for each figure: variants in rows, depths in columns."""
    found = {}
    for name, title in FIGURES.items():
        known = {variant: [run[name] for run in runs] for variant, runs in results.items() if name in runs[0]}
        if not known:
            continue
        depths = [depth for depth in (1, 2, 4, 8, 16) if depth <= len(next(iter(known.values()))[0])]
        rows = []
        for variant, runs in known.items():
            cells = [spread([one[depth - 1] for one in runs], 2 if name == "psnr" else 3) for depth in depths]
            rows.append([variant, *cells])
        found[f"evolution-{name}"] = Table([title, *(f"depth {depth}" for depth in depths)], rows)
    return found


def plot(results: dict[str, list[dict[str, list[float]]]], path: Path) -> None:
    """Plot pixels and probe over depth, of the recipe and of the control without the CNN's features."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.0), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    for variant, style, suffix in (("recipe", "-", ""), ("pixels", "--", ", encoder without the CNN")):
        for name, label, color in (
            ("pixel_r2", "pixels: explained variance", "#0072B2"),
            ("probe_accuracy", "classes: accuracy of a linear probe", "#D55E00"),
        ):
            runs = [one[name] for one in results.get(variant, []) if name in one]
            if runs:
                columns = list(zip(*runs, strict=True))
                depths = range(1, len(columns) + 1)
                axes.fill_between(
                    depths, [*map(min, columns)], [*map(max, columns)], color=color, alpha=0.2, linewidth=0
                )
                means = [statistics.mean(column) for column in columns]
                axes.plot(depths, means, style, color=color, label=label + suffix, linewidth=1.8)
    axes.set_ylim(0, 1)
    axes.set_xlabel("depth: levels of codes that are summed")
    axes.grid(axis="y", alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_title("Pixels first, meaning later: linear fits to the codes of photographs", fontsize=10)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path)


def main() -> int:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--train", type=Path, required=True, help="folder of photographs to train on")
    parser.add_argument("--eval", type=Path, required=True, help="folder with a folder of photographs for each class")
    parser.add_argument(
        "--fit_on", type=Path, help="photographs to fit to, in folders as those of --eval (default: half of --eval)"
    )
    parser.add_argument("--teacher", required=True, help="timm:tf_efficientnet_lite0:FILE.safetensors")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the runs")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS], help="runs to make")
    parser.add_argument("--max_steps", type=int, help="steps of each run instead of the recipe's")
    parser.add_argument("-o", "--output", type=Path, default=Path("outputs/evolution"), help="folder for all results")
    add_json_option(parser)
    return command_line.run(parser, work=_run_all)


def _run_all(options: argparse.Namespace) -> None:
    results = {name: [measured(options, name, seed) for seed in options.seeds] for name in options.variants}
    write_json(options.output / "evolution.json", results)
    shown = tables(results)
    print("\n\n".join(table.markdown() for table in shown.values()) + "\n")
    write_report(options.json, __file__, shown, machine(packages=("torch", "timm")), {"results": results})
    plot(results, options.output / "evolution.png")
    print(options.output / "evolution.png")


if __name__ == "__main__":
    sys.exit(main())
