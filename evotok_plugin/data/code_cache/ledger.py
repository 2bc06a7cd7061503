"""Index of the images in a code cache: by key, by location and state, and by content.

An image is recognized by its key and stamp (`stamp_of`: location, size and times) without reading it, otherwise by the
digest of its content. So a replaced image is re-encoded, one that was copied, moved or touched is not, and images of
the same name from two folders are distinct. An *entry* is the record that one run has made of one image.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evotok_plugin.common.foreign_files import describe_error
from evotok_plugin.data.code_cache.shards import Shard, remedy, shard_name, shard_numbers
from evotok_plugin.data.keys import DigestIndex, digests_as_bytes, key_digests, with_rows
from evotok_plugin.errors import UserError

_BROKEN, _LOST = -1, -2  # rows of images that could not be read, and of known images whose codes were deleted


class Ledger:
    """All entries of a cache, in the order in which they were written.

    Attributes:
        numbers: number of each shard.
        row_starts: first row of each shard; a row is the codes of one image.
        entry_starts: first entry of each shard; its entries are its rows, then known images, then broken ones.
        sizes: width and height in pixels of the image of each row, (rows, 2).
        keys: digest of the key of each entry.
        rows: row of each entry, negative if it has none.
        reasons: key and reason of the broken images, by entry.
        contents: rows by the digest of the image's content.
    """

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            UserError: a shard is damaged, or two shards contain the same images.
        """
        self.numbers = shard_numbers(folder)
        keys: list[np.ndarray] = []  # these lists have one array per shard
        stamps: list[np.ndarray] = []
        contents: list[np.ndarray] = []
        rows: list[np.ndarray] = []
        sizes: list[np.ndarray] = []
        self.reasons: dict[int, tuple[str, str]] = {}
        num_rows, row_starts, entry_starts = 0, [0], [0]
        for number in self.numbers:
            shard, _ = Shard.read(folder, number)
            try:
                stamps.append(_digests_of([*shard.stamps, *shard.known_stamps, *shard.broken_stamps]))
                contents.append(_digests_of([*shard.contents, *shard.known_contents, *[""] * len(shard.broken)]))
                sizes.append(np.asarray(shard.sizes, np.uint32).reshape(len(shard.keys), 2))
                keys.append(key_digests(shard.all_keys()))
            except (ValueError, TypeError, AttributeError, OverflowError) as error:
                cause = describe_error(error)
                raise UserError(f"{folder / shard_name(number)}.json is damaged ({cause}); {remedy(number)}") from error
            rows.append(np.arange(num_rows, num_rows + len(shard.keys)))
            rows += [np.full(len(shard.known_keys), _LOST), np.full(len(shard.broken), _BROKEN)]
            first_broken = entry_starts[-1] + len(shard) - len(shard.broken)
            self.reasons |= {first_broken + n: facts for n, facts in enumerate(shard.broken.items())}
            num_rows += len(shard.keys)
            row_starts.append(num_rows)
            entry_starts.append(entry_starts[-1] + len(shard))
        self.row_starts, self.entry_starts = np.array(row_starts), np.array(entry_starts)
        self.sizes = _joined(sizes, np.zeros((0, 2), np.uint32))
        self.keys, self.rows = _joined(keys, key_digests([])), _joined(rows, np.zeros(0, np.int64))
        self._stamps = _joined(stamps, _digests_of([]))
        self._resolve(_joined(contents, _digests_of([])))
        self._sort(folder)

    def _resolve(self, digests: np.ndarray) -> None:
        """Look up the rows of known images by their contents."""
        self._is_encoded, known = self.rows >= 0, self.rows == _LOST
        of_known, indexed = digests[known], self._is_encoded & (digests != b"")
        digests = digests[indexed]  # reuses the parameter's name to free the array
        self.contents = DigestIndex(digests, self.rows[indexed])
        found = self.contents.rows(of_known)
        self.rows[known] = np.where(found >= 0, found, _LOST)

    def _sort(self, folder: Path) -> None:
        """Sort the entries by identity and check that no two shards encode the same image."""
        identities = _identities(self.keys, self._stamps)
        entries = np.flatnonzero(self.rows != _LOST)
        if len(entries) < len(identities):
            identities = identities[entries]
        order = np.argsort(identities, kind="stable")
        self._entries = entries[order]
        del entries
        self._identities = identities[order]
        del identities, order
        again = self._identities[1:] == self._identities[:-1]
        if not again.any():  # in the usual case, avoid copies of large arrays
            return
        is_encoded = self._is_encoded[self._entries]
        encoded, identities = self._entries[is_encoded], self._identities[is_encoded]
        again = np.flatnonzero(identities[1:] == identities[:-1])
        if len(again):
            first, second = (self.numbers[self._shard_of(encoded[place])] for place in (again[0], again[0] + 1))
            raise UserError(
                f"{shard_name(first)} and {shard_name(second)} of {folder} contain the same images; {remedy(second)}"
            )

    def _shard_of(self, entry: int) -> int:
        return int(np.searchsorted(self.entry_starts, entry, side="right")) - 1

    def entries_of(self, keys: np.ndarray, stamps: np.ndarray) -> np.ndarray:
        """The latest entry of each image (keys,), given by the digest of its key and its stamp; -1 if there is none."""
        if not len(self._identities):
            return np.full(len(keys), -1)
        wanted = _identities(keys, stamps)
        places = (np.searchsorted(self._identities, wanted, side="right") - 1).clip(min=0)
        return np.where(self._identities[places] == wanted, self._entries[places], -1)

    def has_place(self, keys: np.ndarray, stamps: np.ndarray) -> np.ndarray:
        """Mask (keys,) of the images with an entry for their key and location, in any state."""
        known = self.rows != _LOST
        return np.isin(_places(keys, stamps), _places(self.keys[known], self._stamps[known]))

    def first_of(self, index: DigestIndex) -> np.ndarray:
        """Mask (entries,) of the entries that are the first with a key and row of an index."""
        pairs = with_rows(self.keys, self.rows)
        is_first = np.zeros(len(pairs), bool)
        is_first[np.unique(pairs, return_index=True)[1]] = True
        return is_first & np.isin(pairs, index.pairs())

    def current(self) -> np.ndarray:
        """Entries of the images in their latest state: the last entry of each key and location, and of those with the
        same key and row only the first."""
        entries = np.flatnonzero(self.rows != _LOST)[::-1]
        _, last = np.unique(_places(self.keys[entries], self._stamps[entries]), return_index=True)
        entries = np.sort(entries[last])
        _, first = np.unique(with_rows(self.keys[entries], self.rows[entries]), return_index=True)
        return np.sort(entries[first])


def _joined(arrays: list[np.ndarray], empty: np.ndarray) -> np.ndarray:
    """Concatenate arrays and clear the list, so that the arrays of 13 M images are not in memory twice."""
    joined = np.concatenate([empty, *arrays])
    arrays.clear()
    return joined


def _digests_of(hexadecimal: Sequence[str]) -> np.ndarray:
    return np.array([bytes.fromhex(text) for text in hexadecimal], "S16")


def _identities(keys: np.ndarray, stamps: np.ndarray) -> np.ndarray:
    """128 bits that combine a key and a stamp; equal to the key's digest where the stamp is zero."""
    return (digests_as_bytes(keys) ^ digests_as_bytes(stamps)).view("S16").ravel()


def _places(keys: np.ndarray, stamps: np.ndarray) -> np.ndarray:
    """The key and the half of the stamp that identifies the location (keys,)."""
    return np.concatenate([digests_as_bytes(keys), digests_as_bytes(stamps)[:, :8]], axis=1).view("S24").ravel()
