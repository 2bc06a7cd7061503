"""Flags of `evotok-llava tune-sampling`."""

import argparse

from evotok_plugin.common.command_line import deferred
from evotok_plugin.common.command_parser import examples_of
from llava_ext.commands.options import SharedOptions


def add(commands: argparse._SubParsersAction, shared: SharedOptions) -> None:
    parser = commands.add_parser(
        "tune-sampling",
        epilog=examples_of(
            "evotok-llava tune-sampling outputs/finetune --prompts prompts.jsonl --judge scene_judge",
            "evotok-llava tune-sampling outputs/finetune --prompts prompts.txt --judge clip_score=1 -n 8 --dry_run",
            text="The score of settings is the mean over skills of the mean score of their images. All candidates draw "
            "a few images with the same prompts and seeds, the better half twice as many, and so on; at most four "
            "draw all of them, among them the model's current settings and the best ones without guidance. Ties "
            "within one standard error of the best score go to the settings that cost least: guidance 1 first, "
            "then the interval of guidance that ends first. Only image_generation in MODEL/generation_config.json "
            "changes. Interruptible: rerun the same command to resume from the journal, which belongs to the "
            "weights, the prompts, the judge and the seed.",
        ),
    )
    parser.add_argument("model", metavar="MODEL", help="model folder whose settings are tuned")
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        required=True,
        help="a prompt per line, or .jsonl rows with a prompt and a tag, which names its skill",
    )
    parser.add_argument(
        "--judge", metavar="SPEC", required=True, help="NAME or NAME=WEIGHT,...: rewards, or package.module:function"
    )
    parser.add_argument("-n", "--num_images", type=int, default=4, help="images per prompt")
    parser.add_argument(
        "--settings",
        metavar="FILE.yaml",
        help="candidates instead of the default grid, a line each: 'strong: {guidance_scale: 3, min_p: 0.1}'; the "
        "model's settings fill the others",
    )
    parser.add_argument("--dry_run", action="store_true", help="search and print, but do not write the best settings")
    parser.add_argument("--batch_size", type=int, default=16, help="images drawn at once")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image; each further image adds 1")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--journal",
        metavar="FILE.jsonl",
        help="file that keeps finished evaluations (default: outputs/tune_sampling/MODEL-SEARCH.jsonl)",
    )
    parser.set_defaults(run=deferred("llava_ext.commands.tune_sampling"))
