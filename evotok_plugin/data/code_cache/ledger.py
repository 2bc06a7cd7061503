"""The images that a code cache knows: by key, by place and state, and by content.

An image is recognized by its key and its stamp (`stamp_of`: where it lies, its size and times) without reading it, else
by the digest of its content. So a replaced image is encoded again, while one that was copied, moved or touched is not,
and images of equal names from two folders stay apart. An *entry* is what one run has noted of one image.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evotok_plugin.data.code_cache.shards import Shard, remedy, shard_name, shard_numbers
from evotok_plugin.data.keys import DigestIndex, digests_as_bytes, key_digests, with_rows
from evotok_plugin.data.sources import ImageSource
from evotok_plugin.errors import UserError

_BROKEN, _LOST = -1, -2  # rows of images that could not be read, and of known ones whose codes were deleted


def stamps_of(source: ImageSource, indices: Sequence[int]) -> np.ndarray:
    """Stamps of images (indices,); zeros for a source whose keys alone identify its images."""
    stamp = getattr(source, "stamp", None)
    if stamp is None:
        return np.zeros(len(indices), "S16")
    return np.fromiter((stamp(index) for index in indices), "S16", len(indices))


class Ledger:
    """All entries of a cache, in the order in which they were written.

    Attributes:
        numbers: the shards.
        row_starts: of each shard the number of its first row; a row is the codes of an image.
        entry_starts: of each shard the number of its first entry: its rows, known images, broken images.
        sizes: of each row the image's width and height in pixels (rows, 2).
        keys: of each entry the digest of its key.
        rows: of each entry its row, negative if it has none.
        reasons: key and reason by entry of the broken images.
        contents: the rows of contents.
    """

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            UserError: a shard that is damaged, or two that hold the same images.
        """
        self.numbers = shard_numbers(folder)
        keys, stamps, contents, rows, sizes = [], [], [], [], []  # an array of each shard
        self.reasons: dict[int, tuple[str, str]] = {}
        num_rows, row_starts, entry_starts = 0, [0], [0]
        for number in self.numbers:
            shard, _ = Shard.read(folder, number)
            try:
                stamps.append(_digests_of([*shard.stamps, *shard.known_stamps, *shard.broken_stamps]))
                contents.append(_digests_of([*shard.contents, *shard.known_contents, *[""] * len(shard.broken)]))
            except ValueError as error:
                raise UserError(
                    f"{shard_name(number)}.json is not what was written ({error}); {remedy(number)}"
                ) from error
            keys.append(key_digests(shard.all_keys()))
            rows.append(np.arange(num_rows, num_rows + len(shard.keys)))
            rows += [np.full(len(shard.known_keys), _LOST), np.full(len(shard.broken), _BROKEN)]
            sizes.append(np.asarray(shard.sizes, np.uint32).reshape(-1, 2))
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
        """Give known images the rows of their contents."""
        self._is_encoded, known = self.rows >= 0, self.rows == _LOST
        of_known, indexed = digests[known], self._is_encoded & (digests != b"")
        digests = digests[indexed]  # the parameter's name, to free the array
        self.contents = DigestIndex(digests, self.rows[indexed])
        found = self.contents.rows(of_known)
        self.rows[known] = np.where(found >= 0, found, _LOST)

    def _sort(self, folder: Path) -> None:
        """Sort the entries by identity and check that no two shards encoded one image."""
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
        if not again.any():  # no copies of large arrays in the usual state
            return
        is_encoded = self._is_encoded[self._entries]
        encoded, identities = self._entries[is_encoded], self._identities[is_encoded]
        again = np.flatnonzero(identities[1:] == identities[:-1])
        if len(again):
            first, second = (self.numbers[self._shard_of(encoded[place])] for place in (again[0], again[0] + 1))
            raise UserError(
                f"{shard_name(first)} and {shard_name(second)} of {folder} hold the same images; {remedy(second)}"
            )

    def _shard_of(self, entry: int) -> int:
        return int(np.searchsorted(self.entry_starts, entry, side="right")) - 1

    def entries_of(self, keys: np.ndarray, stamps: np.ndarray) -> np.ndarray:
        """The last entry of each image (keys,), given by the digest of its key and its stamp; -1 if there is none."""
        if not len(self._identities):
            return np.full(len(keys), -1)
        wanted = _identities(keys, stamps)
        places = (np.searchsorted(self._identities, wanted, side="right") - 1).clip(min=0)
        return np.where(self._identities[places] == wanted, self._entries[places], -1)

    def has_place(self, keys: np.ndarray, stamps: np.ndarray) -> np.ndarray:
        """Which images (keys,) have an entry for their key and place, whatever state they were in."""
        known = self.rows != _LOST
        return np.isin(_places(keys, stamps), _places(self.keys[known], self._stamps[known]))

    def first_of(self, index: DigestIndex) -> np.ndarray:
        """Which entries (entries,) are the first with a key and a row of an index."""
        pairs = with_rows(self.keys, self.rows)
        is_first = np.zeros(len(pairs), bool)
        is_first[np.unique(pairs, return_index=True)[1]] = True
        return is_first & np.isin(pairs, index.pairs())

    def current(self) -> np.ndarray:
        """The entries that stand for the images as they were seen last: of every key and place the last entry, of
        those with one key and the same codes the first."""
        entries = np.flatnonzero(self.rows != _LOST)[::-1]
        _, last = np.unique(_places(self.keys[entries], self._stamps[entries]), return_index=True)
        entries = np.sort(entries[last])
        _, first = np.unique(with_rows(self.keys[entries], self.rows[entries]), return_index=True)
        return np.sort(entries[first])


def _joined(arrays: list[np.ndarray], empty: np.ndarray) -> np.ndarray:
    """One array of several, which the list no longer holds afterwards: an array of 13 M images is not kept twice."""
    whole = np.concatenate([empty, *arrays])
    arrays.clear()
    return whole


def _digests_of(hexadecimal: Sequence[str]) -> np.ndarray:
    return np.array([bytes.fromhex(text) for text in hexadecimal], "S16")


def _identities(keys: np.ndarray, stamps: np.ndarray) -> np.ndarray:
    """128 bits for a key and a stamp; those of the key itself where the stamp is zero."""
    return (digests_as_bytes(keys) ^ digests_as_bytes(stamps)).view("S16").ravel()


def _places(keys: np.ndarray, stamps: np.ndarray) -> np.ndarray:
    """The key and the half of the stamp that tells the place (keys,)."""
    return np.concatenate([digests_as_bytes(keys), digests_as_bytes(stamps)[:, :8]], axis=1).view("S24").ravel()
