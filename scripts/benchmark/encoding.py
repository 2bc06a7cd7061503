"""Measure `evotok encode` on JPEG folders and tar shards, against the tokenizer alone on images in memory.

    python scripts/benchmark/encoding.py --images photos --json encoding.json
    python scripts/benchmark/encoding.py --sizes base --workers 2 --picture_size 640 480
    python scripts/benchmark/encoding.py --clock cpu --threads 1        # only the parts: on a busy machine

Two tables. Throughput: images per second of the command with 1 and 2 workers, which decode images, in wall time without
opening the model. The lower bound ("floor") is the tokenizer's forward on the same batches of decoded images. All
contestants take turns, and the best turn counts. Parts: CPU time of reading, decoding, resizing, encoding and writing,
in one process with one thread.

Pictures are composed of the photographs of `--images`, or generated, as JPEG files of `--picture_size`. Weights are
random, since the time does not depend on their values. The codes in the caches are compared with those of the floor.
"""

import argparse
import contextlib
import io
import itertools
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from measuring import CLOCKS
from PIL import Image
from report import Table, add_json_option, machine, three_digits, write_report

from evotok_plugin import EvoTokConfig, EvoTokImageProcessor, EvoTokModel, cli
from evotok_plugin.commands import encode as command
from evotok_plugin.common import command_line
from evotok_plugin.common.command_parser import CommandParser
from evotok_plugin.common.recipes import find_recipe, read_recipe
from evotok_plugin.data import batches, sources, tar_shards
from evotok_plugin.data.code_cache import CodeCache
from evotok_plugin.data.code_cache import encode as encoding
from evotok_plugin.data.code_cache.writer import ShardWriter
from evotok_plugin.data.images import IMAGE_SUFFIXES, open_picture
from evotok_plugin.data.sources import ImageSource, open_source
from evotok_plugin.errors import UserError

COUNTS = {"tiny": 2048, "photos": 2048, "base": 48}  # pictures per recipe
BATCHES = {"tiny": 64, "photos": 64, "base": 8}
PARTS = ("reading", "decoding", "resizing", "model", "writing")
_QUALITY = 90  # of the JPEG files
_NUM_SHARDS = 2


# Data ------------------------------------------------------------------------------------------------------------


def compose(photos: list[Image.Image], size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """A picture of `size` that is covered with photographs."""
    picture = Image.new("RGB", size)
    width, height = max(photo.width for photo in photos), max(photo.height for photo in photos)
    for left, top in itertools.product(range(0, size[0], width), range(0, size[1], height)):
        picture.paste(photos[int(rng.integers(len(photos)))], (left, top))
    return picture


def generated_photo(rng: np.random.Generator, side: int = 256) -> Image.Image:
    """Smooth colored areas with fine noise, which JPEG compresses about as much as a photograph."""
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    noise = rng.normal(0, 6, (side, side, 3))
    return Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))


def photographs(folder: Path | None, rng: np.random.Generator, most: int = 256) -> list[Image.Image]:
    """Photographs of a folder, or generated pictures.

    Raises:
        UserError: the folder has no images.
    """
    if folder is None:
        return [generated_photo(rng) for _ in range(32)]
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)[:most]
    if not files:
        raise UserError(f"--images {folder} contains no images; name a folder of photographs")
    return [open_picture(file) for file in files]


@dataclass(frozen=True)
class Data:
    """The same JPEG files as a folder and as tar shards; `num_bytes` is their mean size."""

    places: dict[str, Path]
    num_bytes: float


def write_data(options: argparse.Namespace, count: int, work: Path) -> Data:
    """Write `count` pictures."""
    rng = np.random.default_rng(0)
    photos = photographs(options.images, rng)
    folder, shards = work / "folder", work / "shards"
    shards.mkdir(parents=True)
    total = 0
    for shard in range(_NUM_SHARDS):
        with tarfile.open(shards / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard, count, _NUM_SHARDS):
                buffer = io.BytesIO()
                compose(photos, tuple(options.picture_size), rng).save(buffer, "JPEG", quality=_QUALITY)
                file = folder / str(shard) / f"{number:06d}.jpg"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(buffer.getvalue())
                tar.add(file, file.name)
                total += len(buffer.getvalue())
    return Data({"folder": folder, "tar": shards}, total / count)


def save_model(recipe: str, folder: Path) -> Path:
    """Save a random tokenizer of a recipe."""
    values = read_recipe(find_recipe(recipe, "evotok_plugin"))
    torch.manual_seed(0)
    model = EvoTokModel(EvoTokConfig.preset(values["preset"], **values.get("model", {})))
    model.save_pretrained(folder)
    EvoTokImageProcessor(size=model.config.image_size).save_pretrained(folder)
    return folder


# Measuring -------------------------------------------------------------------------------------------------------


@dataclass
class Stopwatch:
    """Seconds by name, of the calls that it wraps."""

    clock: Callable[[], float]
    seconds: dict[str, float] = field(default_factory=dict)

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """A function that adds the time of a call to `name`."""

        def run(*args: Any, **keywords: Any) -> Any:
            started = self.clock()
            try:
                return call(*args, **keywords)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + self.clock() - started

        return run


@contextlib.contextmanager
def timing_parts(watch: Stopwatch) -> Iterator[None]:
    """Time the parts of encoding that run in this process."""
    places: list[tuple[Any, str, str]] = [
        (sources.FileSource, "content", "reading"),
        (tar_shards.TarSource, "content", "reading"),
        (batches, "open_picture", "decoding"),
        (EvoTokImageProcessor, "crop", "resizing"),
        (batches, "as_bytes", "resizing"),
        (encoding, "codes_of", "model"),
        (ShardWriter, "add", "writing"),
        (ShardWriter, "close", "closing"),  # `add` closes complete shards itself
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, part in places:
            stack.enter_context(mock.patch.object(owner, name, watch.timed(part, getattr(owner, name))))
        yield


def encode(source: Path, model: Path, out: Path, workers: int, batch_size: int, watch: Stopwatch) -> None:
    """Run `evotok encode`; adds the time without opening the model to "all".

    Raises:
        UserError: the command fails.
    """
    flags = ["--model", model, "--num_workers", workers, "--batch_size", batch_size, "--device", "cpu"]
    with (
        mock.patch.object(command, "encode_images", watch.timed("all", command.encode_images)),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        code = cli.main(["encode", str(source), "-o", str(out), *map(str, flags)])
    if code:
        raise UserError(f"evotok encode ended with exit code {code}")


def decoded_batches(source: ImageSource, size: int, batch_size: int) -> list[torch.Tensor]:
    """All images of a source as the command decodes them."""
    processor = EvoTokImageProcessor(size=size)
    return [batch.pixels for batch in batches.decoded(source, range(len(source)), processor, batch_size)]


def codes_in(cache: Path, source: ImageSource) -> np.ndarray:
    """The codes of a source's images in a cache."""
    found = CodeCache(cache)
    return np.stack([found.codes(source.key(index)) for index in range(len(source))])


def throughput(recipe: str, options: argparse.Namespace, model: Path, data: Data, work: Path) -> dict[str, Any]:
    """Images per second of all contestants.

    Raises:
        UserError: the codes in a cache differ from those of the tokenizer alone.
    """
    batch_size = options.batch_size or BATCHES[recipe]
    tokenizer = EvoTokModel.from_pretrained(model).eval()
    opened = {kind: open_source(place) for kind, place in data.places.items()}
    pixels = {kind: decoded_batches(one, tokenizer.config.image_size, batch_size) for kind, one in opened.items()}
    count, number = len(opened["folder"]), itertools.count()
    expected: dict[str, np.ndarray] = {}
    least: dict[str, float] = {}

    def floor() -> None:
        for kind in list(pixels)[: 1 if expected else None]:
            expected[kind] = np.concatenate([encoding.codes_of(batch, tokenizer) for batch in pixels[kind]])

    floor()  # the warm-up, for both orders of images
    for _ in range(options.rounds):
        watch = Stopwatch(time.perf_counter)
        watch.timed("floor", floor)()
        least["floor"] = min(least.get("floor", float("inf")), watch.seconds["floor"])
        for kind, workers in itertools.product(opened, options.workers):
            out, watch = work / f"codes-{next(number)}", Stopwatch(time.perf_counter)
            encode(data.places[kind], model, out, workers, batch_size, watch)
            name = f"{kind}, {workers} worker{'s' * (workers != 1)}"
            least[name] = min(least.get(name, float("inf")), watch.seconds["all"])
            if not np.array_equal(codes_in(out, opened[kind]), expected[kind]):
                raise UserError(f"{recipe}, {name}: the codes in the cache differ from those of the tokenizer alone")
    return {
        name: {"images_per_second": count / spent, "times_floor": spent / least["floor"]}
        for name, spent in least.items()
    }


def parts(recipe: str, options: argparse.Namespace, model: Path, data: Data, work: Path) -> dict[str, Any]:
    """CPU milliseconds per image of each part, per kind of source, with one thread."""
    threads, batch_size = torch.get_num_threads(), options.batch_size or BATCHES[recipe]
    count = len(open_source(data.places["folder"]))
    found: dict[str, dict[str, float]] = {}
    torch.set_num_threads(1)
    try:
        for turn, (kind, place) in itertools.product(range(options.rounds), data.places.items()):
            watch = Stopwatch(time.process_time)
            with timing_parts(watch):
                encode(place, model, work / f"parts-{kind}-{turn}", 0, batch_size, watch)
            spent = {name: 1000 * watch.seconds.get(name, 0.0) / count for name in ("all", *PARTS)}
            spent["other"] = spent["all"] - sum(spent[name] for name in PARTS)
            best = found.setdefault(kind, spent)
            found[kind] = {name: min(best[name], value) for name, value in spent.items()}
    finally:
        torch.set_num_threads(threads)
    return found


# Tables ----------------------------------------------------------------------------------------------------------


def throughput_table(results: dict[str, dict]) -> Table:
    """Images per second, and the time relative to the floor, per recipe and contestant."""
    names = list(dict.fromkeys(name for one in results.values() for name in one["throughput"]))
    rows = []
    for recipe, one in results.items():
        cells = [
            f"{three_digits(row['images_per_second'])} ({row['times_floor']:.2f} x)"
            for row in one["throughput"].values()
        ]
        rows.append([f"{recipe}, {one['image_size']} pixels", *cells])
    return Table(["", *names], rows)


def parts_table(results: dict[str, dict]) -> Table:
    """CPU milliseconds of each part, and the share of decoding and resizing, per recipe and kind of source."""
    header = ["ms of CPU time per image", *PARTS, "other", "decoding and resizing"]
    rows = []
    for recipe, one in results.items():
        for kind, spent in one["parts"].items():
            share = (spent["decoding"] + spent["resizing"]) / spent["all"]
            cells = [f"{spent[name]:.2f}" for name in (*PARTS, "other")]
            rows.append([f"{recipe}, {kind}", *cells, f"{share:.1%}"])
    return Table(header, rows)


def run(options: argparse.Namespace) -> None:
    """Measure all recipes and print the tables.

    Raises:
        UserError: a number is too small, a folder has no images, or codes differ.
    """
    for name in ("num_images", "batch_size", "rounds"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.threads:
        torch.set_num_threads(options.threads)
    results: dict[str, dict] = {}
    for recipe in options.sizes:
        with tempfile.TemporaryDirectory() as place:
            work = Path(place)
            data = write_data(options, options.num_images or COUNTS[recipe], work / "data")
            model = save_model(recipe, work / "model")
            results[recipe] = {
                "image_size": EvoTokConfig.from_pretrained(model).image_size,
                "bytes_per_file": round(data.num_bytes),
            }
            if options.clock == "wall":
                results[recipe]["throughput"] = throughput(recipe, options, model, data, work)
            results[recipe]["parts"] = parts(recipe, options, model, data, work)
    tables = {"encoding-parts": parts_table(results)}
    if options.clock == "wall":
        tables = {"encoding": throughput_table(results), **tables}
    print("\n\n".join(table.markdown() for table in tables.values()))
    on = machine(packages=("torch", "pillow"), pictures="x".join(map(str, options.picture_size)))
    write_report(options.json, __file__, tables, on, {"results": results})


def main() -> int:
    """Parse the flags and measure."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=list(COUNTS), default=list(COUNTS), help="tokenizer recipes")
    parser.add_argument("--images", type=Path, help="folder of photographs (default: generated pictures)")
    parser.add_argument("--num_images", type=int, help=f"pictures per recipe (default: {COUNTS})")
    parser.add_argument("--picture_size", type=int, nargs=2, default=[500, 375], help="width and height in pixels")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of decoding processes")
    parser.add_argument("--batch_size", type=int, help=f"images per batch (default: {BATCHES})")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each contestant; the best counts")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of the tokenizer; 0: torch's default")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: only the parts, in CPU time")
    add_json_option(parser)
    return command_line.run(parser, work=run)


if __name__ == "__main__":
    sys.exit(main())
