"""Measure whether drawings of one prompt vary as much as the scenes of the corpus that have this prompt.

    python scripts/benchmark/diversity.py --prompts 4 --images 64

For every prompt, several images are drawn with different seeds, with the model's own settings. What the prompt leaves
open is described by discrete variables of the objects that it names: the cell of each object, its color if the prompt
does not name it, its size in three bins, and, for two objects without a named relation, their relation. The entropy of
each variable (bits) is summed and divided by the same sum for as many scenes of the corpus with the same prompt,
sampled by rejection, rendered and detected like the drawings, so that both estimates have the same number of samples
and the same errors of the detector. Drawings without the named objects are left out (column "usable"). The corrected
ratio adds the bias term of Miller and Madow, (occupied values - 1) / (2 samples) nats, to each entropy.
"""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from drawn_scenes import add_model_options, detected_scene, open_from, show
from report import Table

from evotok_plugin.common import command_line
from evotok_plugin.common.command_parser import CommandParser
from evotok_plugin.common.progress import progress_bar
from evotok_plugin.scenes.captions import prompt_record, scene_prompts
from evotok_plugin.scenes.scene import SKILLS, Scene, SceneObject, relation, render, sample_scene

_STREAM = 7_302  # random numbers unlike those of corpora and tasks
_SIZE_BINS = (0.273, 0.287)  # thirds of the corpus's sizes, as fractions of the image side
_MOST_SCENES = 2_000_000  # per prompt; the rarest prompts of the corpus have a share of 1 / 600

Variables = dict[str, list[Hashable]]  # values by variable; several objects of one kind add a value each


def named_objects(scene: Scene, record: dict) -> list[list[SceneObject]] | None:
    """The objects of each clause of a prompt; None if their number is wrong or there are other objects."""
    groups, rest = [], list(scene.objects)
    for clause in record["include"]:
        color = clause.get("color")
        group = [item for item in rest if item.shape == clause["class"] and color in (None, item.color)]
        if len(group) != clause["count"]:
            return None
        groups.append(group)
        rest = [item for item in rest if item not in group]
    return None if rest else groups


def open_variables(scene: Scene, record: dict) -> Variables | None:
    """List the variables of a scene that the prompt of a record leaves open; None if the scene has other objects."""
    groups = named_objects(scene, record)
    if groups is None:
        return None
    values: Variables = {}
    for number, (clause, group) in enumerate(zip(record["include"], groups, strict=True)):
        values[f"cell {number}"] = [item.cell for item in group]
        values[f"size {number}"] = [int(np.searchsorted(_SIZE_BINS, item.size)) for item in group]
        if "color" not in clause:
            values[f"color {number}"] = [item.color for item in group]
    if len(groups) == 2 and record["tag"] != "position":
        values["relation"] = [relation(groups[0][0], groups[1][0])]
    return values


@dataclass(frozen=True)
class Entropy:
    """Sum of the entropies of some variables in bits, as estimated and with Miller and Madow's correction."""

    plain: float
    corrected: float


def entropy(samples: Sequence[Variables]) -> Entropy:
    """The summed entropy of all variables over the samples."""
    plain = corrected = 0.0
    for name in samples[0]:
        counts = np.array(list(Counter(value for sample in samples for value in sample[name]).values()))
        shares = counts / counts.sum()
        bits = float(-(shares * np.log2(shares)).sum())
        plain += bits
        corrected += bits + (len(counts) - 1) / (2 * counts.sum() * math.log(2))
    return Entropy(plain, corrected)


def corpus_samples(record: dict, image_size: int, count: int, rng: np.random.Generator) -> list[Variables]:
    """Variables of `count` scenes of the corpus that have the prompt of a record."""
    found: list[Variables] = []
    for _ in range(_MOST_SCENES):
        scene = sample_scene(rng, record["tag"])
        if prompt_record(scene, record["tag"])["prompt"] == record["prompt"]:
            seen = detected_scene(render(scene, image_size))
            values = seen and open_variables(seen, record)
            if values:
                found.append(values)
        if len(found) == count:
            return found
    raise RuntimeError(f"the corpus has too few scenes for {record['prompt']!r}")


def main() -> int:
    """Draw, compare with the corpus, and print the ratios as Markdown."""
    parser = CommandParser(description=__doc__)
    add_model_options(parser)
    parser.add_argument(
        "--skills",
        nargs="+",
        choices=SKILLS,
        default=SKILLS,
        metavar="SKILL",
        help=f"skills to measure: {', '.join(SKILLS)} (default: all)",
    )
    parser.add_argument("--prompts", type=int, default=4, help="prompts per skill")
    parser.add_argument("--images", type=int, default=64, help="images per prompt")
    parser.add_argument("--batch_size", type=int, default=64, help="images drawn at once")
    return command_line.run(parser, work=run)


def run(options: argparse.Namespace) -> None:
    """Draw, and print the tables."""
    opened = open_from(options)
    image_size = opened.model.config.vision_config.image_size
    rng = np.random.default_rng([options.seed, _STREAM])
    records = [record for skill in options.skills for record in scene_prompts(skill, options.prompts, rng)]
    rows, ratios = [], {skill: [] for skill in options.skills}
    for record in progress_bar(records, desc="prompts"):
        images = opened.model.generate_images(
            [record["prompt"]],
            opened.processor,
            num_images=options.images,
            batch_size=options.batch_size,
            seed=options.seed,
        )
        scenes = [detected_scene(image) for image in images]
        drawn = [values for scene in scenes if scene and (values := open_variables(scene, record))]
        cells = [record["tag"], record["prompt"], f"{len(drawn)}/{len(images)}"]
        if len(drawn) < 2:
            rows.append([*cells, "-", "-", "-", "-"])
            continue
        ours, theirs = entropy(drawn), entropy(corpus_samples(record, image_size, len(drawn), rng))
        pair = (ours.plain / theirs.plain, ours.corrected / theirs.corrected)
        ratios[record["tag"]].append(pair)
        rows.append([*cells, f"{ours.plain:.2f}", f"{theirs.plain:.2f}", f"{pair[0]:.3f}", f"{pair[1]:.3f}"])
    header = ["skill", "prompt", "usable", "bits drawn", "bits corpus", "ratio", "corrected"]
    print(Table(header, rows).markdown(), end="\n\n")
    tables = {}
    means = [(skill, np.mean(pairs, axis=0), len(pairs)) for skill, pairs in ratios.items() if pairs]
    if means:
        overall = np.mean([mean for _, mean, _ in means], axis=0)
        summary = [*means, ("mean of skills", overall, sum(count for *_, count in means))]
        table = [[name, str(count), f"{plain:.3f}", f"{corrected:.3f}"] for name, (plain, corrected), count in summary]
        tables["diversity"] = Table(["skill", "prompts", "ratio", "corrected"], table)
    show(options, __file__, opened, tables, {"prompts": [dict(zip(header, row, strict=True)) for row in rows]})


if __name__ == "__main__":
    sys.exit(main())
