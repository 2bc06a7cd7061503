"""Images encoded once: the frozen tokenizer's codes on disk, so that no training step runs the vision tower.

A cache is a folder with `codes.npy` (images, N, L) in uint16 and `index.json` (names, the tokenizer's fingerprint).
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from evotok_plugin import EvoTokImageProcessor, EvoTokModel
from evotok_plugin.progress import progress_interval
from llava_ext.data.records import BadSamples


class CodeCache:
    """Codes by image name, memory-mapped."""

    def __init__(self, folder: str | Path, fingerprint: str) -> None:
        """Open a finished cache.

        Raises:
            ValueError: it is missing, or was made by another tokenizer.
        """
        index_file = Path(folder) / "index.json"
        if not index_file.is_file():
            raise ValueError(f"{folder} holds no code cache (index.json is missing)")
        index = json.loads(index_file.read_text())
        if index["fingerprint"] != fingerprint:
            raise ValueError(
                f"code cache {folder} was made by tokenizer {index['fingerprint'][:12]}, the model has "
                f"{fingerprint[:12]}; delete the folder or choose another with --code_cache"
            )
        self._rows = {name: row for row, name in enumerate(index["names"])}
        self.broken: dict[str, str] = index["broken"]
        self._codes = np.load(Path(folder) / "codes.npy", mmap_mode="r", allow_pickle=False)

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def codes(self, name: str) -> torch.Tensor:
        """Codes (N, L) of one image, int64."""
        return torch.from_numpy(self._codes[self._rows[name]].astype(np.int64))

    def covers(self, names: Sequence[str]) -> bool:
        """Whether every name is cached or known to be broken."""
        return all(name in self._rows or name in self.broken for name in names)


def write_code_cache(
    folder: str | Path,
    image_folder: str | Path,
    names: Sequence[str],
    tokenizer: EvoTokModel,
    image_processor: EvoTokImageProcessor,
    batch_size: int = 64,
    show_progress: bool = True,
) -> None:
    """Encode images into a new cache; broken images are noted in it, not encoded. The index is written last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.json").unlink(missing_ok=True)
    kept, broken, parts = [], {}, []
    bar = tqdm(
        total=len(names), desc="encoding images", unit="img", disable=not show_progress, mininterval=progress_interval()
    )
    for start in range(0, len(names), batch_size):
        pictures = []
        for name in names[start : start + batch_size]:
            try:
                with Image.open(Path(image_folder) / name) as picture:
                    pictures.append(picture.convert("RGB"))
                kept.append(name)
            except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
                broken[name] = f"cannot be read as an image ({error})"
        if pictures:
            pixels = image_processor(pictures, return_tensors="pt").pixel_values
            with torch.inference_mode():
                codes = tokenizer.encode(pixels.to(tokenizer.device, tokenizer.dtype)).codes
            parts.append(codes.cpu().numpy().astype(np.uint16))
        bar.update(len(names[start : start + batch_size]))
    bar.close()
    config = tokenizer.config
    empty = np.zeros((0, config.num_positions, config.num_quantizers), np.uint16)
    np.save(folder / "codes.npy", np.concatenate([empty, *parts]), allow_pickle=False)
    index = {"fingerprint": tokenizer.fingerprint(), "names": kept, "broken": broken}
    temporary = folder / "index.json.tmp"
    temporary.write_text(json.dumps(index))
    os.replace(temporary, folder / "index.json")


def note_broken(cache: CodeCache, names: Sequence[str], bad: BadSamples) -> None:
    """Report the images among `names` that the cache could not read."""
    for name in names:
        if name in cache.broken:
            bad.add(name, cache.broken[name])
