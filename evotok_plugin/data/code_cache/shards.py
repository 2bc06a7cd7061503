"""The files of a code cache.

A cache is a folder of

    cache.json          what the codes are: the tokenizer's fingerprint, the images' size, N, L and K, the version of
                        the image reader
    shard-000042.npy    codes (images, N, L) in uint16
    shard-000042.json   their keys in order, the images' original sizes, stamps and digests, what was broken, checksums

Every file is written under another name, synced and moved into place, a shard's .json last: a shard exists when its
.json does.
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

from evotok_plugin.data import images
from evotok_plugin.errors import UserError
from evotok_plugin.modeling_evotok import EvoTokModel

_FORMAT = 2
_FIRST_READER = 1  # version of the image reader in caches that do not name one


@dataclass(frozen=True, slots=True)
class CacheFacts:
    """Content of `cache.json`: the tokenizer and the image reader that the codes depend on, and the codes' sizes."""

    fingerprint: str
    image_size: int
    num_positions: int
    num_quantizers: int
    codebook_size: int
    format: int = _FORMAT
    reader_version: int = _FIRST_READER

    @classmethod
    def of(cls, model: EvoTokModel, image_size: int) -> "CacheFacts":
        """The facts of codes that a tokenizer gives to square images of `image_size` pixels a side."""
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
        """Read them from a cache.

        Raises:
            UserError: the folder is not a cache, or has another format.
        """
        file = folder / "cache.json"
        if not file.is_file():
            raise UserError(
                f"{str(folder)!r} holds no code cache (cache.json is missing); "
                f"`evotok encode SOURCE -o {folder}` writes one"
            )
        try:
            facts = cls(**json.loads(file.read_text()))
        except (ValueError, TypeError) as error:
            raise UserError(f"{str(file)!r} does not describe a code cache: {error}") from error
        if facts.format != _FORMAT:
            why = ", which identifies images by their names alone" if facts.format == 1 else ""
            raise UserError(
                f"code cache {str(folder)!r} has format {facts.format}{why}; this version reads format {_FORMAT}: "
                "delete the folder to have the images encoded again, or choose another folder"
            )
        return facts

    def write(self, folder: Path) -> None:
        """Make the folder a cache."""
        content = json.dumps(dataclasses.asdict(self), indent=2).encode()
        _write(folder / "cache.json", lambda file: file.write(content))

    def check(self, folder: Path, fingerprint: str | None, image_size: int | None) -> None:
        """Reject codes of another tokenizer, image size or image reader; None accepts any tokenizer or size.

        Raises:
            UserError: the codes are of another tokenizer, of images of another size, or of images that another version
                of the image reader decoded.
        """
        if self.reader_version != images.READER_VERSION:
            raise UserError(
                f"code cache {str(folder)!r} was written with version {self.reader_version} of the image reader, this "
                f"is version {images.READER_VERSION}, which gives other pixels for some images; delete the folder and "
                "run `evotok encode` again, or choose another folder"
            )
        wanted = (fingerprint or self.fingerprint, image_size or self.image_size)
        if wanted != (self.fingerprint, self.image_size):
            raise UserError(
                f"code cache {str(folder)!r} was made by tokenizer {self.fingerprint[:12]} from images of "
                f"{self.image_size} pixels, wanted are codes of tokenizer {wanted[0][:12]} and {wanted[1]} pixels; "
                "choose another folder, or delete this one to have it made anew"
            )


# Shards ------------------------------------------------------------------------------------------------------


@dataclass
class Shard:
    """The content of a shard's .json.

    Attributes:
        keys, sizes, stamps, contents: of each image whose codes the shard holds, in their order; stamps (`stamp_of`)
            and contents (`content_digest`) in hexadecimal, empty where the source has none.
        known_keys, known_stamps, known_contents: of images whose content some shard holds already.
        broken: reason by key of images that could not be read, and `broken_stamps` in the same order.
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
        """All images that the shard tells of."""
        return len(self.keys) + len(self.known_keys) + len(self.broken)

    def all_keys(self) -> list[str]:
        """Keys of the encoded images, the known ones, the broken ones."""
        return [*self.keys, *self.known_keys, *self.broken]

    def checksum(self) -> str:
        return hashlib.sha256(json.dumps(vars(self), sort_keys=True).encode()).hexdigest()

    def write(self, folder: Path, number: int, codes: np.ndarray) -> None:
        """Add the shard to the cache: codes (images, N, L) in uint16.

        Raises:
            UserError: the file system does not take it.
        """
        self.codes_sha256 = hashlib.sha256(codes).hexdigest()
        try:
            stem = folder / shard_name(number)
            self.codes_bytes = _write(stem.with_suffix(".npy"), lambda file: np.save(file, codes, allow_pickle=False))
            record = {**vars(self), "sha256": self.checksum()}
            _write(stem.with_suffix(".json"), lambda file: file.write(json.dumps(record).encode()))
        except OSError as error:
            raise UserError(
                f"shard {str(stem)!r} cannot be written: {error}; what is finished stays, run again to go on"
            ) from error

    @classmethod
    def read(cls, folder: Path, number: int) -> tuple["Shard", str]:
        """A shard and the checksum that it was written with.

        Raises:
            UserError: one of its files is not as it was written.
        """
        stem = folder / shard_name(number)
        try:
            record = json.loads(stem.with_suffix(".json").read_text())
            checksum = record.pop("sha256")
            shard = cls(**record)
            shard._check_lengths()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{str(stem)}.json is not what was written ({error}); {remedy(number)}") from error
        codes = stem.with_suffix(".npy")
        size = codes.stat().st_size if codes.exists() else 0
        if size != shard.codes_bytes:
            raise UserError(f"{str(codes)!r} has {size} bytes, expected {shard.codes_bytes}; {remedy(number)}")
        return shard, checksum

    def _check_lengths(self) -> None:
        for name, others in (
            ("keys", ("sizes", "stamps", "contents")),
            ("known_keys", ("known_stamps", "known_contents")),
            ("broken", ("broken_stamps",)),
        ):
            for other in others:
                if len(getattr(self, name)) != len(getattr(self, other)):
                    raise UserError(f"{other} and {name} have different lengths")


def shard_name(number: int) -> str:
    return f"shard-{number:06d}"


def remedy(number: int) -> str:
    name = shard_name(number)
    return f"delete {name}.npy and {name}.json and run `evotok encode` again: only their images are re-encoded"


def shard_numbers(folder: Path) -> list[int]:
    """The shards that exist, in order."""
    found = (re.fullmatch(r"shard-(\d+)\.json", entry.name) for entry in os.scandir(folder))
    return sorted(int(match[1]) for match in found if match)


def _write(path: Path, write: Callable[[BinaryIO], Any]) -> int:
    """Write a file so that it is there whole or not at all, whatever happens; returns its size in bytes."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)  # the new name, too, must reach the disk before whatever comes next
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return size
