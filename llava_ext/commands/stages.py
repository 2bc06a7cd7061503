"""`evotok-llava pretrain`, `finetune`, `finetune-lora`, `finetune-qlora` and `reinforce`: the training stages."""

import argparse
from typing import NoReturn

from evotok_plugin.common.launcher import start
from evotok_plugin.common.requirements import require_extra

_SUPERVISED, _REINFORCEMENT = "llava_ext.training.train", "llava_ext.training.reinforcement.train"
_EXAMPLES = {
    "pretrain": (
        "evotok-llava pretrain",
        "evotok-llava pretrain --recipe paper --vision_tower outputs/evotok --data_path a.json --image_folder images",
    ),
    "finetune": (
        "evotok-llava finetune",
        "evotok-llava finetune --recipe paper_finetune --data_path mix665k.json --image_folder images",
    ),
    "finetune-lora": (
        "evotok-llava finetune-lora",
        "evotok-llava finetune-lora --recipe paper_finetune_lora --data_path mix665k.json --image_folder images",
    ),
    "finetune-qlora": ("evotok-llava finetune-qlora",),
    "reinforce": (
        "evotok-llava reinforce",
        "evotok-llava reinforce --model_name_or_path outputs/finetune --prompts p.txt --rewards '{scene_exact: 1.0}'",
    ),
}


def add(commands: argparse._SubParsersAction, name: str) -> None:
    """Add the command of a stage; all its flags but `--recipe` are those of the training itself."""
    parser = commands.add_parser(name, add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", default=name.replace("-", "_"))
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
        _print_help(name)
    from llava_ext.embedded.prepare import main as prepare  # a command of its own, which prints its errors

    flags = ["--recipe", arguments.recipe, *arguments.rest, *(["--debug"] if arguments.debug else [])]
    code = prepare(flags)
    if code:
        return code
    return start(_REINFORCEMENT if name == "reinforce" else _SUPERVISED, flags)


def _print_help(name: str) -> NoReturn:
    from evotok_plugin.common.recipes import add_arguments

    if name == "reinforce":
        from llava_ext.training.reinforcement.config import ReinforceConfig as schema
    else:
        from llava_ext.training.config import StageConfig as schema  # type: ignore[assignment]  # its base class

    examples = "\n".join(f"  {line}" for line in _EXAMPLES[name])
    parser = argparse.ArgumentParser(
        prog=f"evotok-llava {name}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="NPROC=N starts N processes (by default one per visible GPU), NNODES processes on several nodes.\n"
        "Without flags: the embedded default, which needs no download and no GPU.",
        epilog=f"examples:\n{examples}",
        conflict_handler="resolve",
    )
    parser.add_argument(
        "--recipe", default=name.replace("-", "_"), help="YAML file, or the name of a recipe of the project"
    )
    add_arguments(parser, schema)
    parser.print_help()
    parser.exit()
