"""Compile the Triton kernel of the search ahead of time, and report its registers, shared memory and spills.

    python scripts/gpu/kernel_resources.py --json kernel_resources.json

Needs no GPU: Triton compiles for a given compute capability, and the assembler `ptxas` of its package reports the
resources. "blocks" is the number of thread blocks that fit onto one multiprocessor at the same time (65536 registers,
2048 threads, and the shared memory of the capability).
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmark"))
from report import Table, add_json_option, machine, write_report

from evotok_plugin.common.command_parser import CommandParser
from evotok_plugin.kernels import residual_search

# Types of the arguments of `search_level` as `residual_codes` passes them; all others are constants.
ARGUMENTS = {
    "residual_pointer": "*fp64", "codebook": "*fp32", "bias": "*fp32", "slack_pointer": "*fp64",
    "codes_pointer": "*i64", "M": "i32", "K": "i32",
}  # fmt: skip
SHARED_KIBIBYTES = {80: 164, 86: 100, 89: 100, 90: 228}  # per multiprocessor; 1 KiB per block is reserved
LAUNCHES = ((128, 128, 8), (64, 64, 4))  # further configurations, of BLOCK_M, BLOCK_K and warps
HEADER = (
    "target, products, BLOCK_M x BLOCK_K, warps", "registers", "shared memory", "spills", "tensor cores", "blocks",
)  # fmt: skip


def assembler() -> str:
    """The path of `ptxas`: the one of Triton's package, or the first of PATH."""
    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    found = str(shipped) if shipped.is_file() else shutil.which("ptxas")
    if found is None:
        raise SystemExit("error: ptxas was not found: neither in the package triton nor on the PATH")
    return found


def measure(capability: int, precision: str, block_m: int, block_k: int, warps: int, dim: int = 32) -> dict:
    """Resources of the kernel in one configuration."""
    kernel = residual_search.search_level
    constants = {
        "C": dim, "PADDED_C": max(triton.next_power_of_2(dim), 16), "BLOCK_M": block_m, "BLOCK_K": block_k,
        "PRECISION": precision,
    }  # fmt: skip
    signature = {name: ARGUMENTS.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(n,): [["tt.divisibility", 16]] for n, name in enumerate(kernel.arg_names) if name in ARGUMENTS}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps},
    )
    report = assemble(compiled.asm["ptx"])
    registers, shared = int(report["registers"]), compiled.metadata.shared
    fitting = min(
        65536 // (-(-registers // 8) * 8 * 32 * warps),  # registers are allocated per warp, in units of 256
        2048 // (32 * warps),
        SHARED_KIBIBYTES[capability] * 1024 // (shared + 1024),
    )
    return {
        "capability": capability,
        "precision": precision,
        "block_m": block_m,
        "block_k": block_k,
        "warps": warps,
        "dim": dim,
        "registers": registers,
        "shared_kibibytes": shared / 1024,
        "spilled_bytes": int(report["stores"]) + int(report["loads"]),
        "stack_bytes": int(report["stack"]),
        "tensor_core_instructions": tensor_cores(compiled.asm["ptx"]),
        "blocks_per_multiprocessor": fitting,
    }


def assemble(ptx: str) -> dict[str, str]:
    """The resources that ptxas reports."""
    target = re.search(r"^\.target (\w+)", ptx, re.M)
    assert target is not None
    with tempfile.TemporaryDirectory() as work:
        source = Path(work) / "kernel.ptx"
        source.write_text(ptx)
        command = [assembler(), "-v", f"-arch={target[1]}", str(source), "-o", str(Path(work) / "kernel.cubin")]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: ptxas failed: {done.stderr.strip()}")
    pattern = r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    spills, used = re.search(pattern, done.stderr), re.search(r"Used (?P<registers>\d+) registers", done.stderr)
    if spills is None or used is None:
        raise SystemExit(f"error: the report of ptxas is not understood: {done.stderr.strip()}")
    return {**spills.groupdict(), **used.groupdict()}


def tensor_cores(ptx: str) -> str:
    """The kind of instruction for tensor cores in the kernel, with its shape and types; "none" without any."""
    found = re.search(r"(wgmma\.mma_async|mma)\.sync\.aligned\.([\w.]+)", ptx)
    return f"{found[1]} {found[2]}" if found else "none"


def row(one: dict) -> list[str]:
    """A row of the table."""
    launch = f"{one['block_m']} x {one['block_k']}, {one['warps']}"
    return [
        f"sm_{one['capability']}, {one['precision']}, {launch}",
        str(one["registers"]),
        f"{one['shared_kibibytes']:g} KiB",
        f"{one['spilled_bytes']} bytes",
        one["tensor_core_instructions"],
        str(one["blocks_per_multiprocessor"]),
    ]


def main() -> None:
    """Compile all configurations and print the table."""
    parser = CommandParser(description=__doc__)
    parser.add_argument(
        "--capability", type=int, nargs="+", default=[80, 90], choices=list(SHARED_KIBIBYTES), help="targets"
    )
    add_json_option(parser)
    options = parser.parse_args()
    own = (residual_search.BLOCK_M, residual_search.BLOCK_K, residual_search.NUM_WARPS)
    configurations = [(capability, "tf32x3", *own) for capability in options.capability]
    configurations.append((options.capability[-1], "ieee", *own))
    configurations += [(options.capability[-1], "tf32x3", *launch) for launch in LAUNCHES]
    on = machine(packages=("torch", "triton")) | {"device": "compiled without a GPU"}
    del on["threads"]
    print(", ".join(f"{key} {value}" for key, value in on.items()))
    results: list[dict] = []
    for configuration in configurations:
        results.append(measure(*configuration))
        print(", ".join(row(results[-1])), flush=True)
        shown = Table(HEADER, [row(one) for one in results])
        write_report(options.json, __file__, {"kernel-resources": shown}, on, {"results": results})
    print(f"\n{shown.markdown()}")


if __name__ == "__main__":
    sys.exit(main())
