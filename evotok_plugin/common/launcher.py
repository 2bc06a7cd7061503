"""Start a module in one process, or in several with torchrun: `python -m evotok_plugin.common.launcher MODULE ...`.

The number of processes is that of the environment variable NPROC, by default one per visible GPU. NNODES, NODE_RANK,
MASTER_ADDR and MASTER_PORT start processes on several nodes, as for torchrun.
"""

from evotok_plugin.common import command_line

if __name__ == "__main__":
    command_line.exit_without("models")

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NoReturn

from evotok_plugin.errors import UserError

_SECONDS_TO_SAVE = 600  # how long torchrun waits for its processes after a signal; its own default is 30
_CPU_FLAGS = (("--use_cpu", "true"), ("--device", "cpu"))


def visible_gpus(environment: Mapping[str, str] = os.environ) -> int:
    """The number of NVIDIA GPUs that a process would see; CUDA_VISIBLE_DEVICES selects among them."""
    selected = environment.get("CUDA_VISIBLE_DEVICES")
    if selected is not None:
        names = [name.strip() for name in selected.split(",") if name.strip()]
        return names.index("-1") if "-1" in names else len(names)
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, env=dict(environment))
    except OSError:
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def runs_on_cpu(arguments: Sequence[str]) -> bool:
    """Whether flags choose the CPU, as `--use_cpu true` or `--device cpu`."""
    words = " ".join(arguments).lower().replace("=", " ").split()
    return any(pair in _CPU_FLAGS for pair in pairwise(words))


def _count(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdecimal() or not int(text):
        raise UserError(f"{name}: expected a number of at least 1, got {text!r}")
    return int(text)


def command_for(module: str, arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> list[str]:
    """The command line that starts a module in as many processes as the environment asks for.

    Raises:
        UserError: NPROC, NNODES or NODE_RANK is not a number, or a variable that several nodes need is missing.
    """
    default = 1 if runs_on_cpu(arguments) else max(1, visible_gpus(environment))
    processes, nodes = _count(environment, "NPROC", default), _count(environment, "NNODES", 1)
    if processes == 1 and nodes == 1:
        return [sys.executable, "-m", module, *arguments]
    if not environment.get("NPROC") and processes > 1:
        print(f"starting {processes} processes, one per visible GPU (NPROC)", file=sys.stderr)
    where = ["--standalone"]
    if nodes > 1:
        for name, meaning in (("NODE_RANK", "this node's number"), ("MASTER_ADDR", "the first node's address")):
            if not environment.get(name):
                raise UserError(f"NNODES is {nodes}, but {name} is not set; set it to {meaning}")
        where = ["--nnodes", str(nodes), "--node_rank", environment["NODE_RANK"]]
        where += ["--master_addr", environment["MASTER_ADDR"]]
        where += ["--master_port", environment.get("MASTER_PORT") or "29500"]
    torchrun = [sys.executable, "-m", "evotok_plugin.common.torchrun", *where, "--nproc_per_node", str(processes)]
    return [*torchrun, "-m", module, *arguments]


def start(module: str, arguments: Sequence[str]) -> NoReturn:
    """Replace this process by the command of `command_for`, so that signals reach the training itself.

    Raises:
        UserError: as `command_for`.
    """
    command = command_for(module, arguments)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SECONDS_TO_SAVE))
    if "evotok_plugin.common.torchrun" in command and os.environ.get("NNODES", "1") == "1":
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun would set it with a warning
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command[0], command)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"error: expected a module and its arguments; {__doc__.split(chr(10))[0]}")
    try:
        start(sys.argv[1], sys.argv[2:])
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
