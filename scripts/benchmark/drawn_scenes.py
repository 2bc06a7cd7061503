"""Scenes in drawn images, and options, shared by the benchmarks of the embedded model in this folder."""

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from report import Table, add_json_option, machine, write_report

from eval_tasks.judging.scene_detector import SceneDetector
from evotok_plugin.scenes.scene import Scene, SceneObject
from llava_ext.model_folder import OpenModel, default_model_folder, open_model


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add --model, --device, --seed, --threads and --json."""
    add_json_option(parser)
    parser.add_argument("--model", help="model folder (default: the newest in outputs/, or the included model)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts and images")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's default")


def open_from(options: argparse.Namespace) -> OpenModel:
    """Open the model that the options select, and print its folder."""
    if options.threads:
        torch.set_num_threads(options.threads)
    folder = options.model or default_model_folder()
    print(f"model: {folder}, seed {options.seed}\n")
    return open_model(folder, options.device)


def detected_scene(image: Image.Image) -> Scene | None:
    """The objects of an image as a scene; None if there are none, or one has no named color."""
    side, objects = image.width, []
    for found in SceneDetector().detect(image):
        if found.color is None:
            return None
        left, top, right, bottom = (edge / side for edge in found.box)
        size = max(right - left, bottom - top)
        objects.append(SceneObject(found.label, found.color, (left + right) / 2, (top + bottom) / 2, size))
    return Scene(tuple(objects)) if objects else None


def show(
    options: argparse.Namespace,
    script: str,
    opened: OpenModel,
    tables: dict[str, Table],
    figures: Mapping[str, Any] | None = None,
) -> None:
    """Print tables, and write them to the file of --json, with further figures."""
    print("\n\n".join(table.markdown() for table in tables.values()))
    on = machine(opened.model.device, ("torch", "transformers"), seed=str(options.seed), model=opened.fingerprint[:12])
    write_report(options.json, script, tables, on, figures)
