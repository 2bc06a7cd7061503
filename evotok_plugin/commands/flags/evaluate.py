"""Flags of `evotok evaluate`."""

import argparse
from pathlib import Path

from evotok_plugin.commands.options import SharedOptions
from evotok_plugin.common.command_line import deferred
from evotok_plugin.common.command_parser import examples_of
from evotok_plugin.evaluation.options import METRICS, EvaluationOptions


def add(commands: argparse._SubParsersAction, shared: SharedOptions) -> None:
    parser = commands.add_parser(
        "evaluate",
        parents=[shared.model, shared.counting, shared.sizing],
        epilog=examples_of(
            "evotok evaluate photos",
            "evotok evaluate imagenet/val --model outputs/evotok --metrics all --teacher siglip2 -o outputs/measured",
        ),
    )
    parser.add_argument("source", nargs="*", help="images, folders, tar shards, parquet or hf:NAME")
    parser.add_argument(
        "--held_out",
        type=Path,
        metavar="RUN",
        help="instead of a source: the images that this run of `evotok train` held out; its tokenizer is the default",
    )
    parser.add_argument(
        "--reconstructions",
        metavar="FOLDER",
        help="instead of a tokenizer: images of any tokenizer, named as the originals (rfid, psnr, ssim, lpips)",
    )
    parser.add_argument(
        "-o", "--output", type=Path, help="folder for metrics.json, metrics.md and grid.png; NAME.json: only that file"
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        metavar="METRIC",
        help=f"all, or some of {', '.join(METRICS)} (default: those without a download)",
    )
    parser.add_argument(
        "--teacher",
        metavar="FOLDER",
        help="teacher to compare semantic features with: a folder, a hub id or timm:NAME[:FILE]; with the text tower "
        "of a SigLIP, also zero-shot accuracy",
    )
    parser.add_argument(
        "--class_names", type=Path, metavar="FILE", help="for zero_shot: JSON with the words for each class folder"
    )
    parser.add_argument("--inception_weights", metavar="FILE", help="for rfid (default: torch's hub folder)")
    parser.add_argument(
        "--stats_cache", type=Path, metavar="FOLDER", help="for rfid: cache of statistics of the originals"
    )
    parser.add_argument("--batch_size", type=int, default=EvaluationOptions.batch_size, help="images per batch")
    parser.add_argument(
        "--num_workers", type=int, default=EvaluationOptions.num_workers, help="processes that decode images"
    )
    parser.set_defaults(run=deferred("evotok_plugin.commands.evaluate"))
