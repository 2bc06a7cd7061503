"""Report the GPU, the versions of packages, and the packages that are missing.

    python scripts/gpu/machine.py --json machine.json

Uses Python's standard library, and torch if it is installed.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import subprocess
from pathlib import Path

# Modules, with the names of their distributions where these differ.
MODULES = {
    "torch": "", "triton": "", "transformers": "", "tokenizers": "", "safetensors": "", "numpy": "", "PIL": "pillow",
    "yaml": "pyyaml", "tqdm": "", "jinja2": "", "accelerate": "", "peft": "", "pytest": "", "lpips": "", "datasets": "",
    "deepspeed": "", "flash_attn": "", "bitsandbytes": "", "lmms_eval": "",
}  # fmt: skip


def version(module: str) -> str | None:
    """The version of an installed package; None if its module is missing."""
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return importlib.metadata.version(MODULES[module] or module)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def gpu() -> dict:
    """Properties of the first GPU; empty without one, or without torch."""
    try:
        import torch
    except ImportError:
        return {}
    if not torch.cuda.is_available():
        return {}
    facts = torch.cuda.get_device_properties(0)
    torch.ones(8, device="cuda").sum().item()  # fails here if the driver cannot run this build
    return {
        "gpu": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "multiprocessors": facts.multi_processor_count,
        "gibibytes": round(facts.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
    }


def driver() -> str | None:
    """The version of NVIDIA's driver; None without one."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def cpu() -> str:
    """The name of the CPU."""
    if Path("/proc/cpuinfo").is_file():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    """Write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file for the report")
    options = parser.parse_args()
    versions = {module: version(module) for module in MODULES}
    report = {
        "gpu": None,
        **gpu(),
        "driver": driver(),
        "cpu": cpu(),
        "python": platform.python_version(),
        "torch": versions["torch"],
        "versions": versions,
        "missing": [module for module, found in versions.items() if found is None],
    }
    print(json.dumps(report, indent=2))
    options.json.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
