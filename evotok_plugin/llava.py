"""Run a program of the LLaVA or LLaVA-NeXT code bases, in which EvoTok folders are vision towers.

python -m evotok_plugin.llava -m llava.train.train_mem --vision_tower outputs/evotok ...
python -m evotok_plugin.llava scripts/program.py ...
torchrun --nproc_per_node 8 -m evotok_plugin.llava -m llava.train.train_mem ...
deepspeed --module evotok_plugin.llava -m llava.train.train_mem ...
"""

import os
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from evotok_plugin.errors import UserError
from evotok_plugin.plugins.llava import register_llava

USER_ERROR = 2
_RANK = ("--local_rank", "--local-rank")  # launchers put this flag first; it belongs to the program


@dataclass
class Program:
    """A module or a script, and its arguments."""

    name: str
    is_module: bool
    arguments: list[str]

    @classmethod
    def from_arguments(cls, arguments: Sequence[str]) -> "Program":
        """Parse `-m MODULE ARGS...` or `SCRIPT ARGS...`, after a launcher's `--local_rank`.

        Raises:
            UserError: no program is named, or the script does not exist.
        """
        rest, ranks = list(arguments), list[str]()
        while rest and rest[0].split("=")[0] in _RANK:
            ranks += [rest.pop(0)]
            if "=" not in ranks[-1] and rest:
                ranks += [rest.pop(0)]
        is_module = rest[:1] == ["-m"]
        rest = rest[1:] if is_module else rest
        if not rest or rest[0].startswith("-"):
            raise UserError(
                f"expected a program, got {rest[0] if rest else 'none'}; for example "
                "python -m evotok_plugin.llava -m llava.train.train_mem --vision_tower FOLDER"
            )
        if not is_module and not os.path.isfile(rest[0]):
            raise UserError(f"script {rest[0]!r} does not exist; a module needs -m before its name")
        return cls(rest[0], is_module, ranks + rest[1:])

    def run(self) -> None:
        """Run it in this process as `python -m MODULE ARGS...` or `python SCRIPT ARGS...` would."""
        sys.argv = [self.name, *self.arguments]
        if self.is_module:
            runpy.run_module(self.name, run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, os.path.dirname(os.path.abspath(self.name)))
            runpy.run_path(self.name, run_name="__main__")


def main(argv: "Sequence[str] | None" = None) -> int:
    """Register the tower and run the program; returns the exit code.

    Errors of the program itself keep their traceback.
    """
    try:
        program = Program.from_arguments(sys.argv[1:] if argv is None else argv)
        register_llava()
    except (UserError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    program.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
