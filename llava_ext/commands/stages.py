"""`evotok-llava pretrain`, `finetune`, `finetune-lora`, `finetune-qlora` and `reinforce`: the training stages."""

import argparse

from evotok_plugin.common.command_parser import CommandParser, examples_of
from evotok_plugin.common.launcher import start
from evotok_plugin.common.requirements import require_extra

_SUPERVISED, _REINFORCEMENT = "llava_ext.training.train", "llava_ext.training.reinforcement.train"
_EXAMPLES = {
    "pretrain": (
        "evotok-llava pretrain                          # the embedded default",
        "evotok-llava pretrain --recipe paper --vision_tower outputs/evotok --data_path a.json --image_folder images",
    ),
    "finetune": (
        "evotok-llava finetune                          # the embedded default",
        "evotok-llava finetune --recipe paper_finetune --data_path mix665k.json --image_folder images",
    ),
    "finetune-lora": (
        "evotok-llava finetune-lora                     # the embedded default",
        "evotok-llava finetune-lora --recipe paper_finetune_lora --data_path mix665k.json --image_folder images",
    ),
    "finetune-qlora": ("evotok-llava finetune-qlora                    # the embedded default",),
    "reinforce": (
        "evotok-llava reinforce                         # the embedded default",
        "evotok-llava reinforce --model_name_or_path outputs/finetune --prompts p.txt --rewards '{scene_exact: 1.0}'",
    ),
}


def add(commands: argparse._SubParsersAction, name: str) -> None:
    """Add the command of a stage; all its flags but `--recipe` are those of the training itself."""
    parser = commands.add_parser(name, add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", default=name.replace("-", "_"), help="recipe of the training")
    parser.set_defaults(takes_rest=True, run=lambda arguments: run(name, arguments))


def run(name: str, arguments: argparse.Namespace) -> int:
    """Prepare the inputs of the embedded default if the recipe uses them, then train in all processes.

    The training replaces this process, unless the preparation fails, whose exit code is returned.

    Args:
        arguments: `recipe`, `debug`, and the other flags of the training as `rest`.

    Raises:
        UserError: the libraries for training are not installed, or the environment variables for several processes are
            wrong.
    """
    require_extra("train", f"evotok-llava {name}")
    if {"-h", "--help"}.intersection(arguments.rest):
        help_parser(name, arguments.recipe).parse_args(["--help"])  # prints the help and exits
    from llava_ext.embedded.prepare import main as prepare  # a command of its own, which prints its errors

    flags = ["--recipe", arguments.recipe, *arguments.rest, *(["--debug"] if arguments.debug else [])]
    code = prepare(flags)
    if code:
        return code
    return start(_REINFORCEMENT if name == "reinforce" else _SUPERVISED, flags)


def help_parser(name: str, recipe: str) -> argparse.ArgumentParser:
    """The parser of a stage, with the settings of a recipe as the defaults that its help shows.

    Raises:
        UserError: the recipe does not exist or cannot be read.
    """
    from evotok_plugin.common.recipes import find_recipe, read_recipe, recipe_help
    from llava_ext.training.flag_groups import add_stage_flags

    if name == "reinforce":
        from llava_ext.training.reinforcement.config import ReinforceConfig as schema
    else:
        from llava_ext.training.config import StageConfig as schema  # type: ignore[assignment]  # its base class

    parser = CommandParser(
        prog=f"evotok-llava {name}",
        usage=f"evotok-llava {name} [--recipe RECIPE] [--FLAG VALUE ...]",
        description="Train with the settings of a recipe; flags override the recipe. Without flags: the embedded "
        "default, which needs no download and no GPU. NPROC=N starts N processes (by default one per visible GPU), "
        "NNODES processes on several nodes. Interruptible: rerun the same command to resume.",
        epilog=examples_of(
            *_EXAMPLES[name],
            text=f"The values above are those of the recipe {recipe} where it has one; `--recipe RECIPE --help` shows "
            "those of another. LLaVA's flags are taken as well: docs/llava_flags.md.",
        ),
        conflict_handler="resolve",
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", default=name.replace("-", "_"), help=recipe_help("llava_ext"))
    add_stage_flags(parser, schema, read_recipe(find_recipe(recipe, "llava_ext")))
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser
