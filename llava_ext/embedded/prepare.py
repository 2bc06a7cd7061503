"""Prepare the embedded default: scenes, text tokenizer, text backbone, SigLIP teacher, EvoTok tokenizer.

A step is skipped if its result exists. Nothing is downloaded.
"""

from evotok_plugin.common import command_line

if __name__ == "__main__":
    command_line.exit_without("models")

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from evotok_plugin.common.command_parser import CommandParser, examples_of
from evotok_plugin.common.files import check_output_folder, write_json
from evotok_plugin.common.folders import write_whole_folder
from evotok_plugin.common.recipes import check_seed, find_recipe, read_recipe
from evotok_plugin.errors import UserError

DONE = "done.json"


@dataclass(frozen=True)
class EmbeddedSizes:
    """Numbers of scenes and training steps of the embedded default."""

    num_train: int
    num_val: int
    backbone_steps: int
    teacher_steps: int
    tokenizer_steps: int


FULL = EmbeddedSizes(num_train=16000, num_val=240, backbone_steps=120, teacher_steps=900, tokenizer_steps=1200)
FAST = EmbeddedSizes(num_train=960, num_val=48, backbone_steps=30, teacher_steps=20, tokenizer_steps=60)


def check_place(folder: Path, usable: Callable[[Path], bool]) -> str:
    """The state of the folder that a step writes to.

    Returns:
        "nothing" if it is missing or empty, "made" if an earlier run has filled it, "usable" if it is a folder of the
        user that can replace the result of the step.

    Raises:
        UserError: the folder has other content, which is never changed.
    """
    if (folder / DONE).is_file():
        return "made"
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return "nothing"
    if folder.is_dir() and usable(folder):
        return "usable"
    raise UserError(
        f"{folder} was not made by this program and cannot be used by the embedded default; move it away, or choose "
        "another --workspace"
    )


def make(folder: Path, what: str, build: Callable[[Path], None], usable: Callable[[Path], bool]) -> None:
    """Create a folder atomically with `build`, which fills a temporary one; an existing folder is not changed.

    Raises:
        UserError: as in `check_place`, or the folder cannot be written.
    """
    found = check_place(folder, usable)
    if found != "nothing":
        print(f"{what}: {folder} exists{' and is used as it is' if found == 'usable' else ''}", flush=True)
        return
    print(f"{what} -> {folder}", flush=True)
    started = time.monotonic()

    def write(temporary: Path) -> None:
        build(temporary)
        write_json(temporary / DONE, {"seconds": round(time.monotonic() - started, 1)})

    write_whole_folder(folder, write)


def holds_model(*model_types: str) -> Callable[[Path], bool]:
    """A check whether a folder holds a complete model of one of these types, or of any type if none is given."""

    def check(folder: Path) -> bool:
        from evotok_plugin.model_folder import model_type_of  # imports torch

        try:
            kind = model_type_of(folder)
        except UserError:
            return False
        return any(folder.glob("*.safetensors")) and (not model_types or kind in model_types)

    return check


# By step: whether a folder of the user can be used instead of the result of the step.
USABLE: dict[str, Callable[[Path], bool]] = {
    "scenes": lambda folder: (folder / "train" / "pretrain.json").is_file(),
    "backbone": holds_model(),
    "teacher": holds_model("siglip_vision_model", "siglip"),
    "evotok": holds_model("evotok"),
}


def make_scenes(workspace: Path, sizes: EmbeddedSizes, seed: int) -> None:
    from evotok_plugin.scenes.corpus import write_corpus

    make(
        workspace / "scenes",
        f"drawing {sizes.num_train} scenes",
        lambda out: write_corpus(out, sizes.num_train, sizes.num_val, seed),
        USABLE["scenes"],
    )


def make_text_backbone(workspace: Path, sizes: EmbeddedSizes, seed: int) -> None:
    def build(out: Path) -> None:
        from evotok_plugin.scenes.records import text_records
        from llava_ext.embedded.text_backbone import corpus_texts, train_backbone, train_text_tokenizer

        texts = corpus_texts(workspace / "scenes", text_records(2000, seed))
        tokenizer = train_text_tokenizer(texts, out)
        train_backbone(tokenizer, out, sizes.backbone_steps, seed)

    make(workspace / "backbone", "training the BPE and the text backbone", build, USABLE["backbone"])


def _run(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", *arguments], check=True)


def make_teacher(workspace: Path, sizes: EmbeddedSizes, seed: int) -> None:
    make(
        workspace / "teacher",
        "training the SigLIP teacher",
        lambda out: _run(
            "evotok_plugin.training.teacher", "--data", str(workspace / "scenes" / "train"),
            "--tokenizer", str(workspace / "backbone"), "--output_dir", str(out),
            "--max_steps", str(sizes.teacher_steps), "--seed", str(seed),
        ),
        USABLE["teacher"],
    )  # fmt: skip


def make_evotok(workspace: Path, sizes: EmbeddedSizes, seed: int) -> None:
    make(
        workspace / "evotok",
        "training the EvoTok tokenizer",
        lambda out: _run(
            "evotok_plugin.cli", "train", "--recipe", "tiny", "--data", str(workspace / "scenes" / "train"),
            "--teacher", str(workspace / "teacher"), "--output_dir", str(out),
            "--max_steps", str(sizes.tokenizer_steps), "--seed", str(seed),
        ),
        USABLE["evotok"],
    )  # fmt: skip


STEPS = {
    "scenes": make_scenes,
    "backbone": make_text_backbone,
    "teacher": make_teacher,
    "evotok": make_evotok,
}


def uses_embedded_default(recipe: str, overrides: list[str]) -> bool:
    """Whether a training command would use the results of this module."""
    own = {"--model_name_or_path", "--vision_tower", "--data_path"}
    if own & {argument.split("=")[0] for argument in overrides}:
        return False
    values = read_recipe(find_recipe(recipe, "llava_ext"))
    return "{workspace}/backbone" in str(values.get("model_name_or_path"))


def check_stage(argv: list[str]) -> None:
    """Check the settings of the following training stage before minutes of work for it.

    Raises:
        UserError: a flag is unknown, or a setting is invalid or has no effect.
    """
    from llava_ext.training.config import StageConfig, check_reporting
    from llava_ext.training.settings import stage_values
    from llava_ext.training.train import parse

    values = stage_values(*parse(argv))
    check_reporting(values)
    output_dir = values.get("output_dir") or StageConfig.output_dir
    if output_dir:
        output_dir = output_dir.replace("{workspace}", values.get("workspace", StageConfig.workspace))
        check_output_folder(output_dir, "--output_dir")


def _is_made_by_quickstart(workspace: Path) -> bool:
    """Whether only the quickstart has made the inputs of the stages, which then find them in its workspace."""
    from llava_ext.training.settings import QUICKSTART_WORKSPACE

    made = all((Path(QUICKSTART_WORKSPACE) / name / DONE).is_file() for name in STEPS)
    return made and not any((workspace / name).exists() for name in STEPS)


def main(argv: list[str] | None = None) -> int:
    parser = CommandParser(
        prog="python -m llava_ext.embedded.prepare",
        description=__doc__,
        epilog=examples_of(
            "python -m llava_ext.embedded.prepare",
            "python -m llava_ext.embedded.prepare --fast --workspace work",
            "python -m llava_ext.embedded.prepare --only scenes",
        ),
        allow_abbrev=False,
    )
    parser.add_argument("--workspace", help="folder for all results (default: outputs)")
    parser.add_argument("--fast", action="store_true", help="far fewer scenes and steps")
    parser.add_argument(  # not --seed, which is a setting of the training stage that may follow
        "--preparation_seed", type=int, default=0, metavar="SEED", help="seed of the scenes and of all steps"
    )
    parser.add_argument("--only", choices=STEPS, help="run only this step (default: all)")
    parser.add_argument(
        "--recipe", help="do nothing unless this training recipe uses the embedded default (default: prepare always)"
    )
    parser.set_defaults(takes_rest=True)
    return command_line.run(parser, argv, _prepare)


def _prepare(arguments: argparse.Namespace) -> int:
    if arguments.recipe is not None and not uses_embedded_default(arguments.recipe, arguments.rest):
        return 0
    workspace = Path(arguments.workspace or "outputs")
    if arguments.recipe is not None and arguments.workspace is None and _is_made_by_quickstart(workspace):
        return 0
    check_seed(arguments.preparation_seed)
    try:
        if arguments.recipe is not None and not all((workspace / name / DONE).is_file() for name in STEPS):
            check_stage([f"--recipe={arguments.recipe}", f"--workspace={workspace}", *arguments.rest])
        wanted = [name for name in STEPS if arguments.only in (None, name)]
        for name in wanted:
            check_place(workspace / name, USABLE[name])  # all before the first, which takes minutes
        for name in wanted:
            STEPS[name](workspace, FAST if arguments.fast else FULL, arguments.preparation_seed)
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
