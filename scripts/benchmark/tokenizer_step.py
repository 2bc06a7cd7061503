"""Measure images per second and peak memory of a recipe's training step, relative to its matrix products alone.

    python scripts/benchmark/tokenizer_step.py --recipes tiny photos base paper --json tokenizer_step.json

A step includes everything in the recipe: teacher, LPIPS, discriminator, codebook updates, averaged weights. Weights are
random, since the time does not depend on their values; the teacher and VGG are random networks of the right sizes. Each
recipe is measured in a separate process. The lower bound ("floor") is the step's number of operations according to
PyTorch's counter (matrix products, convolutions, attention; not the code search) at the rate of one large matrix
product, measured in the same process.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import CLOCKS, seconds
from report import Table, add_json_option, machine, three_digits, write_report
from torch.utils.flop_counter import FlopCounterMode
from transformers import SiglipVisionConfig, SiglipVisionModel

from evotok_plugin.common.allocation import keep_freed_memory
from evotok_plugin.common.command_parser import CommandParser
from evotok_plugin.common.recipes import recipe_values
from evotok_plugin.configuration_evotok import EvoTokConfig
from evotok_plugin.scenes.corpus import write_corpus
from evotok_plugin.training import objective
from evotok_plugin.training.config import TokenizerTrainingConfig
from evotok_plugin.training.trainer import TokenizerTrainer

_MATRIX = 4096


def make_teacher(model: EvoTokConfig, folder: Path) -> Path:
    """Save a random SigLIP tower that fits the model; returns its folder."""
    config = SiglipVisionConfig(
        hidden_size=model.encoder_hidden_size,
        intermediate_size=model.encoder_intermediate_size,
        num_hidden_layers=model.encoder_num_layers + 1,
        num_attention_heads=model.encoder_num_heads,
        image_size=model.image_size,
        patch_size=model.patch_size,
    )
    SiglipVisionModel(config).save_pretrained(folder)
    return folder


def random_lpips() -> torch.nn.Module:
    """LPIPS with random weights instead of the published ones that `load_lpips` requires."""
    import lpips

    return lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval().requires_grad_(False)


def matrix_rate(device: torch.device, dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """Operations per second of one large matrix product."""
    size = _MATRIX if device.type == "cuda" else _MATRIX // 2
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    return 2 * size**3 / min(seconds(lambda: a @ b, device, clock) for _ in range(5))


def measure(recipe: str, options: argparse.Namespace, overrides: dict) -> dict:
    """Measure one recipe in this process."""
    keep_freed_memory()  # as `evotok train` does
    clock = CLOCKS[options.clock]
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        write_corpus(work / "scenes", num_train=8, num_val=1, seed=0)
        given = {"data": str(work / "scenes" / "train"), "output_dir": str(work / "out"), **overrides}
        values = recipe_values(recipe, TokenizerTrainingConfig, given)
        values["teacher"] = "x" if values.get("semantic_weight", 1) > 0 else None
        config = TokenizerTrainingConfig(**values)
        model = EvoTokConfig.preset(config.preset, **config.model)
        if config.semantic_weight > 0:
            config.teacher = str(make_teacher(model, work / "teacher"))
        objective.load_lpips = random_lpips
        config.val_fraction, config.gan_start, config.report_to = 0.0, 0, "none"
        config.batch_size = options.batch_size or config.batch_size
        trainer = TokenizerTrainer.open(config)
        device = trainer.device
        images = torch.rand(config.batch_size, 3, model.image_size, model.image_size, device=device) * 2 - 1
        with FlopCounterMode(display=False) as counter:
            trainer.train_step(images)  # also the warm-up
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

        def step() -> None:
            trainer.summarize(trainer.train_step(images), 0)
            if trainer.weights_ema is not None:
                trainer.weights_ema.update(1)

        times = [seconds(step, device, clock) for _ in range(options.steps)]
        rate = matrix_rate(device, torch.bfloat16 if config.bf16 else torch.float32, clock)
        spent = sorted(times)[len(times) // 2]
        return {
            "recipe": recipe,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "dtype": "bf16" if config.bf16 else "fp32",
            "parameters": sum(weight.numel() for weight in trainer.model.parameters()),
            "batch_size": config.batch_size,
            "seconds_a_step": round(spent, 3),
            "images_per_second": round(config.batch_size / spent, 2),
            "teraflop_a_step": round(counter.get_total_flops() / 1e12, 3),
            "times_floor": round(spent * rate / counter.get_total_flops(), 2),
            "peak_gibibytes": round(_peak_bytes(device) / 2**30, 2),
        }


def _peak_bytes(device: torch.device) -> int:
    """The peak of torch's memory on a GPU, or of the memory of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    """Measure the recipes one after another, and print a table; the exit code is 1 if a recipe failed."""
    parser = CommandParser(description=__doc__)
    parser.add_argument(
        "--recipes",
        nargs="+",
        default=["tiny", "photos", "base", "paper", "paper_384"],
        help="tokenizer recipes to measure",
    )
    parser.add_argument("--batch_size", type=int, help="images per step (default: the recipe's)")
    parser.add_argument("--steps", type=int, default=3, help="steps after the first; the median counts")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="fields of the recipe to change")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's default")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: CPU time of all threads")
    add_json_option(parser)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    overrides = dict(pair.split("=", 1) for pair in options.set)
    if options.one:
        print(json.dumps(measure(options.recipes[0], options, overrides)))
        return 0
    rows: list[dict] = []
    on = machine("cuda" if torch.cuda.is_available() else "cpu", clock=options.clock)
    print(", ".join(f"{key} {value}" for key, value in on.items()))
    for recipe in options.recipes:
        own = [word for word in sys.argv[1:] if word != "--one"]
        command = [sys.executable, __file__, *own, "--recipes", recipe, "--one"]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if result.returncode:
            print(f"{recipe}: failed with exit code {result.returncode}", file=sys.stderr)
            continue
        rows.append(json.loads(result.stdout.strip().splitlines()[-1]))
        write_report(options.json, __file__, {"tokenizer-step": table(rows)}, on, {"rows": rows})
    print(table(rows).markdown())
    return int(len(rows) < len(options.recipes))


def table(rows: list[dict]) -> Table:
    """One row per recipe."""
    header = ["recipe", "parameters", "batch", "s per step", "images per s", "TFLOP per step", "x floor", "peak GiB"]
    fields = ["batch_size", "seconds_a_step", "images_per_second", "teraflop_a_step", "times_floor", "peak_gibibytes"]
    cells = [
        [
            f"{row['recipe']} ({row['dtype']})",
            f"{row['parameters'] / 1e6:.1f} M",
            *(three_digits(row[name]) for name in fields),
        ]
        for row in rows
    ]
    return Table(header, cells)


if __name__ == "__main__":
    sys.exit(main())
