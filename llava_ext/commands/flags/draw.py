"""Flags of `evotok-llava draw`."""

import argparse
from pathlib import Path

from evotok_plugin.common.command_line import deferred
from evotok_plugin.common.command_parser import examples_of
from llava_ext.commands.options import SharedOptions


def add(commands: argparse._SubParsersAction, shared: SharedOptions) -> None:
    parser = commands.add_parser(
        "draw",
        parents=[shared.model, shared.drawing],
        epilog=examples_of(
            'evotok-llava draw "a photo of a red circle above a blue square" -n 4',
            'evotok-llava draw "a photo of a ring" "a photo of two squares" --preview preview.png --temperature 0.8',
            "evotok-llava draw --prompts prompts.txt --model outputs/finetune --best_of 4 -o drawn",
            text="Images of a prompt have the seeds SEED, SEED + 1, ... and are written as PROMPT_seedN.png; several "
            "images are also combined in PROMPT_grid.png. Small images are enlarged to at least 256 pixels (--scale), "
            "in grids always. The PNG text records how each one was drawn: prompt, seed, model, settings, scale, and "
            "with --best_of the candidate that was kept. A file is replaced only by an image of the same prompt, seed, "
            "settings, scale and weights; otherwise the new file gets a number. Ctrl-C keeps the images of finished "
            "batches.",
        ),
    )
    parser.add_argument("prompt", nargs="*", help="what to draw; several prompts are drawn in one batch")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="text file with more prompts, one per line")
    parser.add_argument("-n", "--num_images", type=int, default=1, help="images per prompt")
    parser.add_argument("-o", "--output", type=Path, default=Path("out"), help="folder for the images")
    parser.add_argument("--batch_size", type=int, default=16, help="images (with --best_of, candidates) drawn at once")
    parser.add_argument("--preview", type=Path, metavar="FILE", help="PNG file that shows the images in progress")
    parser.add_argument(
        "--preview_every",
        type=int,
        metavar="N",
        help="positions between two previews (default: an eighth of an image's positions)",
    )
    parser.add_argument(
        "--best_of",
        type=int,
        metavar="N",
        help="draw N candidates per image and keep the one whose prompt the model reads best in it (default: the "
        "model's setting, or 1)",
    )
    parser.add_argument(
        "--judge",
        metavar="SPEC",
        help="keep the candidate that these rewards score best, instead of the model's reading: NAME, or "
        "NAME=WEIGHT,NAME=WEIGHT, where a NAME is a registered reward or package.module:object",
    )
    parser.add_argument(
        "--speculate",
        type=int,
        default=1,
        metavar="W",
        help="positions per step of the language model; 2 or more check drafts of the next codes in one step and give "
        "the same images, sooner if drafts are often right; useful only for a single image at a time",
    )
    parser.set_defaults(run=deferred("llava_ext.commands.draw"))
