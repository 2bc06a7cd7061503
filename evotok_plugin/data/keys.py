"""Keys of samples: millions of strings in one buffer, and a sorted index of digests."""

import hashlib
import os
from array import array
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np


class PackedStrings(Sequence[str]):
    """Many strings in two arrays: compact, and shared by data-loading processes without copies."""

    def __init__(self, strings: Iterable[str]) -> None:
        ends, content = array("q"), bytearray()
        for text in strings:
            content += os.fsencode(text)
            ends.append(len(content))
        self._ends, self._bytes = np.array(ends, np.int64), np.frombuffer(bytes(content), np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not 0 <= index < len(self._ends):
            raise IndexError(f"index {index} of {len(self._ends)} strings")
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._bytes[start : self._ends[index]].tobytes())


def key_digests(keys: Iterable[str]) -> np.ndarray:
    """128-bit digests of keys, (keys,)."""
    digests = (hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=16).digest() for key in keys)
    return np.fromiter(digests, dtype="S16")


def as_hex(digest: bytes) -> str:
    """A 16-byte digest in hexadecimal, restoring the trailing zeros that numpy strips; empty for an empty digest."""
    return digest.ljust(16, b"\0").hex() if digest else ""


class DigestIndex:
    """Map from digests to rows, as two sorted arrays.

    For the 13 M images of a large run, a dict of strings takes more than 2 GB, and every forked data-loading process
    ends up with its own copy because accessing a string changes its reference count. These arrays take 20 bytes per
    digest and are shared. The probability that two of 13 M keys have the same digest is 1e-25.
    """

    def __init__(self, digests: np.ndarray, rows: np.ndarray) -> None:
        order = np.argsort(digests, kind="stable")
        self._digests, self._rows = digests[order], rows.astype(np.uint32)[order]

    def rows(self, digests: np.ndarray) -> np.ndarray:
        """Row of each digest (digests,), -1 where there is none; the first row of a digest with several rows."""
        if not len(self._digests):
            return np.full(len(digests), -1)
        places = np.searchsorted(self._digests, digests).clip(max=len(self._digests) - 1)
        return np.where(self._digests[places] == digests, self._rows[places].astype(np.int64), -1)

    def __len__(self) -> int:
        return len(self._digests)

    def pairs(self) -> np.ndarray:
        """Each digest with its row as one comparable value, (digests,)."""
        return with_rows(self._digests, self._rows)

    def all_rows(self, digest: np.ndarray) -> np.ndarray:
        """All rows of one digest (1,)."""
        first, end = (int(np.searchsorted(self._digests, digest, side)[0]) for side in ("left", "right"))
        return self._rows[first:end]

    def repeated(self) -> tuple[int, int] | None:
        """Two rows of the same digest, or None if all digests are distinct."""
        again = np.flatnonzero(self._digests[1:] == self._digests[:-1])
        return (int(self._rows[again[0]]), int(self._rows[again[0] + 1])) if len(again) else None


def digests_as_bytes(digests: np.ndarray) -> np.ndarray:
    """Digests as uint8 (digests, 16)."""
    return np.ascontiguousarray(digests).view(np.uint8).reshape(-1, 16)


def with_rows(digests: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Combine each digest with its row into one comparable value, (digests,)."""
    as_bytes = np.ascontiguousarray(rows.astype(np.int64)).view(np.uint8).reshape(-1, 8)
    return np.concatenate([digests_as_bytes(digests), as_bytes], axis=1).view("S24").ravel()
