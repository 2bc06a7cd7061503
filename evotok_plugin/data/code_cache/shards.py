"""The files of a code cache.

A cache is a folder that contains

    cache.json          the tokenizer's fingerprint, the image size, N, L and K, and the version of the image reader
    shard-000042.npy    codes (images, N, L) in uint16
    shard-000042.json   the images' keys in order, original sizes, stamps and digests; broken images; checksums

Every file is written under a temporary name, synced and renamed, a shard's .json last: a shard exists once its .json
does. N positions, L levels, K codes per level.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from evotok_plugin.common.files import write_whole
from evotok_plugin.common.foreign_files import read_json, reading
from evotok_plugin.data import images
from evotok_plugin.data.bad_samples import shorten
from evotok_plugin.errors import UserError
from evotok_plugin.modeling_evotok import EvoTokModel

_FORMAT = 2
_LARGEST = 2**31
_FIRST_READER = 1  # version of the image reader in caches that do not name one


@dataclass(frozen=True, slots=True)
class CacheFacts:
    """Content of `cache.json`: the tokenizer and image reader that the codes depend on, and the shape of the codes."""

    fingerprint: str
    image_size: int
    num_positions: int
    num_quantizers: int
    codebook_size: int
    format: int = _FORMAT
    reader_version: int = _FIRST_READER

    @classmethod
    def of(cls, model: EvoTokModel, image_size: int) -> "CacheFacts":
        """Facts of the codes that a tokenizer assigns to square images of `image_size` pixels per side."""
        config = model.config
        num_positions = (image_size // config.patch_size) ** 2
        return cls(
            model.fingerprint(),
            image_size,
            num_positions,
            config.num_quantizers,
            config.codebook_size,
            reader_version=images.READER_VERSION,
        )

    @classmethod
    def read(cls, folder: Path) -> "CacheFacts":
        """Read `cache.json` of a cache.

        Raises:
            UserError: the folder is not a cache, or has a different format.
        """
        file = folder / "cache.json"
        if not file.is_file():
            raise UserError(
                f"{str(folder)!r} is not a code cache (cache.json is missing); "
                f"create one with `evotok encode SOURCE -o {folder}`"
            )
        advice = "delete the folder to re-encode the images"
        values = read_json(file, remedy=advice)
        with reading(file, advice, "read as the description of a code cache"):
            facts = cls(**values)
            facts._check_types()
        if facts.format != _FORMAT:
            why = ", which identifies images by name only" if facts.format == 1 else ""
            raise UserError(
                f"code cache {str(folder)!r} has format {facts.format}{why}; this version reads format {_FORMAT}: "
                "delete the folder to re-encode the images, or choose another folder"
            )
        return facts

    def _check_types(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            is_valid = isinstance(value, str) if name == "fingerprint" else type(value) is int and 0 < value < _LARGEST
            if not is_valid:
                raise UserError(f"{name} has the value {shorten(value)}")

    def write(self, folder: Path) -> None:
        """Turn the folder into a cache by writing `cache.json`."""
        content = json.dumps(dataclasses.asdict(self), indent=2).encode()
        _write(folder / "cache.json", lambda file: file.write(content))

    def check(self, folder: Path, fingerprint: str | None, image_size: int | None) -> None:
        """Check tokenizer, image size and image reader; None accepts any tokenizer or size.

        Raises:
            UserError: the codes were made by another tokenizer, from images of another size, or with another version of
                the image reader.
        """
        if self.reader_version != images.READER_VERSION:
            raise UserError(
                f"code cache {str(folder)!r} was written with version {self.reader_version} of the image reader, this "
                f"is version {images.READER_VERSION}, which decodes some images differently; delete the folder and "
                "run `evotok encode` again, or choose another folder"
            )
        wanted = (fingerprint or self.fingerprint, image_size or self.image_size)
        if wanted != (self.fingerprint, self.image_size):
            raise UserError(
                f"code cache {str(folder)!r} was made by tokenizer {self.fingerprint[:12]} from images of "
                f"{self.image_size} pixels, expected codes of tokenizer {wanted[0][:12]} and {wanted[1]} pixels; "
                "choose another folder, or delete this one to recreate it"
            )


# Shards ------------------------------------------------------------------------------------------------------


@dataclass
class Shard:
    """The content of a shard's .json.

    Attributes:
        keys, sizes, stamps, contents: one entry per encoded image, in the order of the codes; stamps (`stamp_of`) and
            digests of contents (`content_digest`) in hexadecimal, empty where the source has none.
        known_keys, known_stamps, known_contents: the same for images whose content is already in some shard.
        broken: reason by key of images that could not be read; `broken_stamps` has the same order.
    """

    keys: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    stamps: list[str] = field(default_factory=list)
    contents: list[str] = field(default_factory=list)
    known_keys: list[str] = field(default_factory=list)
    known_stamps: list[str] = field(default_factory=list)
    known_contents: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    broken_stamps: list[str] = field(default_factory=list)
    codes_bytes: int = 0
    codes_sha256: str = ""

    def __len__(self) -> int:
        """Number of images, including known and broken ones."""
        return len(self.keys) + len(self.known_keys) + len(self.broken)

    def all_keys(self) -> list[str]:
        """Keys of the encoded, then the known, then the broken images."""
        return [*self.keys, *self.known_keys, *self.broken]

    def checksum(self) -> str:
        """SHA-256 of all fields."""
        return hashlib.sha256(json.dumps(vars(self), sort_keys=True).encode()).hexdigest()

    def write(self, folder: Path, number: int, codes: np.ndarray) -> None:
        """Add the shard to the cache: codes (images, N, L) in uint16.

        Raises:
            UserError: the file system refuses.
        """
        stem = folder / shard_name(number)
        self.codes_sha256 = sha256_of(codes)
        try:
            self.codes_bytes = _write(stem.with_suffix(".npy"), lambda file: np.save(file, codes, allow_pickle=False))
            record = json.dumps({**vars(self), "sha256": self.checksum()}).encode()
            _write(stem.with_suffix(".json"), lambda file: file.write(record))
        except UserError as error:
            raise UserError(f"{error}. Finished shards are kept; run again to resume") from error

    @classmethod
    def read(cls, folder: Path, number: int) -> tuple["Shard", str]:
        """Read a shard and the checksum that was stored with it.

        Raises:
            UserError: one of its files is missing or damaged.
        """
        stem = folder / shard_name(number)
        file = stem.with_suffix(".json")
        record = read_json(file, remedy=remedy(number))
        with reading(file, remedy(number), "read"):
            checksum = record.pop("sha256")
            shard = cls(**record)
            shard._check_types()
            shard._check_lengths()
        codes = stem.with_suffix(".npy")
        size = codes.stat().st_size if codes.exists() else 0
        if size != shard.codes_bytes:
            raise UserError(f"{str(codes)!r} has {size} bytes, expected {shard.codes_bytes}; {remedy(number)}")
        return shard, checksum

    def _check_types(self) -> None:
        for name, value in vars(self).items():
            kind = {"broken": dict, "codes_bytes": int, "codes_sha256": str}.get(name, list)
            if type(value) is not kind:
                raise UserError(f"expected {kind.__name__} as {name}, got {type(value).__name__}")
            if name != "sizes" and isinstance(value, list) and not all(isinstance(one, str) for one in value):
                raise UserError(f"expected texts as {name}")
        if not all(isinstance(reason, str) for reason in self.broken.values()):
            raise UserError("expected texts as reasons of broken images")

    def _check_lengths(self) -> None:
        for name, others in (
            ("keys", ("sizes", "stamps", "contents")),
            ("known_keys", ("known_stamps", "known_contents")),
            ("broken", ("broken_stamps",)),
        ):
            for other in others:
                if len(getattr(self, name)) != len(getattr(self, other)):
                    raise UserError(f"{other} and {name} have different lengths")


def sha256_of(codes: np.ndarray) -> str:
    """SHA-256 of an array's bytes, in hexadecimal."""
    return hashlib.sha256(codes.data).hexdigest()


def shard_name(number: int) -> str:
    """File name of a shard, without suffix."""
    return f"shard-{number:06d}"


def remedy(number: int) -> str:
    """Instructions to repair a damaged shard, for error messages."""
    name = shard_name(number)
    return f"delete {name}.npy and {name}.json and run `evotok encode` again; only their images are re-encoded"


def shard_numbers(folder: Path) -> list[int]:
    """Numbers of the existing shards, in order."""
    found = (re.fullmatch(r"shard-(\d+)\.json", entry.name) for entry in os.scandir(folder))
    return sorted(int(match[1]) for match in found if match)


def _write(path: Path, write: Callable[[BinaryIO], Any]) -> int:
    """Replace a file as a whole, synced to the disk; returns its size in bytes."""
    size = 0

    def write_part(part: Path) -> None:
        nonlocal size
        with part.open("wb") as file:
            write(file)
            size = file.tell()

    write_whole(path, write_part, sync=True)
    return size
