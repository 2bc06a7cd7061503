"""`evotok-llava`: the multimodal model on the command line."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from evotok_plugin.common import command_line
from evotok_plugin.common.command_parser import examples_of

DESCRIPTION = "Train a multimodal model, use it, prepare it for others, or estimate a training run."
STAGES = {
    "pretrain": "stage 1: train projectors and image head, the LLM is frozen",
    "finetune": "stage 2: also train the LLM",
    "finetune-lora": "stage 2 with LoRA adapters on the LLM",
    "finetune-qlora": "stage 2 with adapters on a 4-bit LLM",
    "reinforce": "stage 3: reinforce the drawing by rewards",
}
COMMANDS = {
    **STAGES,
    "draw": "draw images for prompts",
    "chat": "ask about images, and draw",
    "tune-sampling": "search the settings of drawing with a judge, and write the best to a model",
    "serve": "serve a model over HTTP, with the interface of OpenAI's API",
    "demo": "open a web page to chat, draw and watch an image evolve",
    "convert": "convert research adapters into a model folder",
    "merge": "merge a LoRA or QLoRA adapter into the model it was trained on",
    "export": "export a self-contained model folder",
    "data": "prepare data: add drawing samples to conversations that describe images",
    "estimate": "estimate parameters, memory, disk and hours of a training run",
}

EXAMPLES = examples_of(
    'evotok-llava draw "a photo of a red circle"',
    'evotok-llava chat --image photo.png "How many objects are there?"',
    "evotok-llava finetune --recipe paper_finetune --data_path mix665k.json --image_folder images",
    text="`evotok-llava COMMAND --help` shows the flags and examples of a command.",
)


def _add(subparsers: "argparse._SubParsersAction", name: str) -> None:
    if name in STAGES:
        from llava_ext.commands import stages

        return stages.add(subparsers, name)
    from llava_ext.commands.options import shared_options

    import_module(f"llava_ext.commands.flags.{name.replace('-', '_')}").add(subparsers, shared_options())


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    return command_line.run_command("evotok-llava", DESCRIPTION, COMMANDS, _add, argv, epilog=EXAMPLES)


if __name__ == "__main__":
    sys.exit(main())
