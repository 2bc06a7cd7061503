"""A source of noise, and functions that encode it into a code cache in this process or in child processes."""

import contextlib
import glob
import multiprocessing
import os
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from evotok_plugin.data.code_cache import CodeCache, EncodingOptions, encode_images
from evotok_plugin.errors import UserError
from evotok_plugin.image_processing_evotok import EvoTokImageProcessor

SIZE = 48
LIMIT_S = 600  # not a performance requirement, only ends a test that hangs
CHILDREN: list[multiprocessing.Process] = []


class Noise:
    """Images of noise with different sizes; those in `broken` cannot be read."""

    def __init__(
        self,
        count: int,
        seconds: float = 0.0,
        broken: tuple[int, ...] = (),
        prefix: str = "noise",
        gate: Path | None = None,
    ) -> None:
        self.name, self.seconds, self.broken, self.prefix = "noise", seconds, broken, prefix
        self.gate = gate  # images from number 50 on wait for this file
        self.count, self.opened = count, []

    def __len__(self) -> int:
        return self.count

    def key(self, index: int) -> str:
        return f"{self.prefix}/{index:04d}.png"

    def picture(self, index: int) -> Image.Image:
        time.sleep(self.seconds)
        while self.gate is not None and index >= 50 and not self.gate.exists():
            time.sleep(0.005)
        self.opened.append(index)
        if index in self.broken:
            raise UserError(f"picture {index} is broken")
        pixels = np.random.default_rng(index).integers(0, 256, (50 + index, 60, 3), dtype=np.uint8)
        return Image.fromarray(pixels)


def options(**values) -> EncodingOptions:
    given = {"shard_size": 7, "batch_size": 3, "num_workers": 0, "max_bad_fraction": 0.0, "show_progress": False}
    return EncodingOptions(**(given | values))


def encode(folder, source, model, **values) -> CodeCache:
    return encode_images(folder, source, model, SIZE, options=options(**values))


def mapping(cache: CodeCache) -> dict[str, list]:
    """Content of a cache by key; checks that keys are unique."""
    keys = list(cache.keys())
    assert len(keys) == len(set(keys)) == len(cache)
    return {key: [cache.codes(key).tolist(), cache.size_of(key)] for key in sorted(keys)}


def expected(source, model, count: int | None = None) -> dict[str, list]:
    """The same, computed by the tokenizer image by image."""
    processor, result = EvoTokImageProcessor(size=SIZE), {}
    for index in range(count or len(source)):
        picture = source.picture(index)
        codes = model.encode(processor(picture).pixel_values).codes[0]
        result[source.key(index)] = [codes.tolist(), picture.size]
    return result


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("shard-*")}


def num_shards(folder) -> int:
    return len(list(folder.glob("shard-*.json")))


def open_files(folder) -> list[str]:
    """Files of a folder that are open in any process, once per process."""
    found = []
    for descriptor in glob.glob("/proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # closed in the meantime
            found.append(os.readlink(descriptor))
    return [name for name in found if name.startswith(str(folder))]


def in_child(function, *arguments, **values):
    """Run a function in a forked child, whose exit code is 0 if the function returns."""
    child = multiprocessing.get_context("fork").Process(target=_alone, args=(function, *arguments), kwargs=values)
    child.start()
    CHILDREN.append(child)
    return child


def _alone(function, *arguments, **values):
    # Forked processes share the default lock, and a killed one may leave it locked.
    tqdm.set_lock(threading.RLock())
    function(*arguments, **values)


def wait_for(condition) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, "timeout"
        time.sleep(0.01)
