"""Keys of samples: millions of strings in one buffer, and their digests in a sorted index."""

import hashlib
import os
from array import array
from collections.abc import Iterable, Sequence

import numpy as np


class PackedStrings(Sequence):
    """Many strings in two arrays: small, and shared by data-loading processes without copies."""

    def __init__(self, strings: Iterable[str]) -> None:
        ends, content = array("q"), bytearray()
        for text in strings:
            content += os.fsencode(text)
            ends.append(len(content))
        self._ends, self._bytes = np.array(ends, np.int64), np.frombuffer(bytes(content), np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self._ends):
            raise IndexError(f"index {index} of {len(self._ends)} strings")
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._bytes[start : self._ends[index]].tobytes())


def key_digests(keys: Iterable[str]) -> np.ndarray:
    """128 bits a key, (keys,)."""
    digests = (hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=16).digest() for key in keys)
    return np.fromiter(digests, dtype="S16")


def as_hex(digest: bytes) -> str:
    """A digest as a shard's .json holds it; numpy strips zeros from the end of bytes."""
    return digest.ljust(16, b"\0").hex() if digest else ""


class DigestIndex:
    """The rows of digests: sorted digests and the row of each.

    For the 13 M images of a large run a dict of strings takes more than 2 GB, and every forked data-loading process
    comes to own a copy, because looking at a string counts a reference. These arrays take 20 bytes a digest and are
    shared. That two of 13 M keys have one digest has a probability of 1e-25.
    """

    def __init__(self, digests: np.ndarray, rows: np.ndarray) -> None:
        order = np.argsort(digests, kind="stable")
        self._digests, self._rows = digests[order], rows.astype(np.uint32)[order]

    def rows(self, digests: np.ndarray) -> np.ndarray:
        """Row of each (digests,), -1 where there is none; of a digest with several rows the first."""
        if not len(self._digests):
            return np.full(len(digests), -1)
        places = np.searchsorted(self._digests, digests).clip(max=len(self._digests) - 1)
        return np.where(self._digests[places] == digests, self._rows[places].astype(np.int64), -1)

    def __len__(self) -> int:
        return len(self._digests)

    def pairs(self) -> np.ndarray:
        """Digests and rows in one comparable value each (digests,)."""
        return with_rows(self._digests, self._rows)

    def all_rows(self, digest: np.ndarray) -> np.ndarray:
        """All rows of one digest (1,)."""
        first, end = (int(np.searchsorted(self._digests, digest, side)[0]) for side in ("left", "right"))
        return self._rows[first:end]

    def repeated(self) -> tuple[int, int] | None:
        """Two rows of one digest, if there are any."""
        again = np.flatnonzero(self._digests[1:] == self._digests[:-1])
        return (int(self._rows[again[0]]), int(self._rows[again[0] + 1])) if len(again) else None


def digests_as_bytes(digests: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(digests).view(np.uint8).reshape(-1, 16)


def with_rows(digests: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Digests and rows in one comparable value each (digests,)."""
    as_bytes = np.ascontiguousarray(rows.astype(np.int64)).view(np.uint8).reshape(-1, 8)
    return np.concatenate([digests_as_bytes(digests), as_bytes], axis=1).view("S24").ravel()
