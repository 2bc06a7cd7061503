"""Records and images of several sources, each under one number."""

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from evotok_plugin.data.keys import PackedStrings
from llava_ext.data.record_sources import RecordSource
from llava_ext.data.records import Record


class RecordTable:
    """Records of several sources by number, read on request.

    Attributes:
        kinds: the kind of each record (len,) as an index into `KINDS`, uint8.
        reads: whether each record (len,) reads an image; a record that draws can read as well.
        lengths: LLM steps of each record (len,) after truncation, int32.
        sizes: the number of records of each source; record numbers count through the sources in order.
    """

    def __init__(
        self,
        sources: Sequence[RecordSource],
        places: np.ndarray,
        kinds: np.ndarray,
        reads: np.ndarray,
        lengths: np.ndarray,
    ) -> None:
        """`places` (len, 3) has the source of each record, its row, and its number among the records of the row."""
        self._sources, self._places = list(sources), places
        self.kinds, self.reads, self.lengths = kinds, reads, lengths
        self.sizes = np.bincount(places[:, 0], minlength=len(sources)).tolist()

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Record:
        source, row, number = self._places[index].tolist()
        return self._sources[source].records(row)[number]

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def name(self, index: int) -> str:
        """The name of a record in reports."""
        source, row, number = self._places[index].tolist()
        return record_name(self._sources[source], row, number)

    def image_content(self, index: int) -> bytes:
        """The file content of the first image of a record.

        Raises:
            UserError: the image cannot be read.
        """
        source, row, _ = self._places[index].tolist()
        return self._sources[source].content(row, 0)

    def without(self, left_out: np.ndarray) -> "RecordTable":
        """The records that are not in `left_out`, a mask (len,)."""
        kept = (values[~left_out] for values in (self._places, self.kinds, self.reads, self.lengths))
        return RecordTable(self._sources, *kept)


def record_name(source: RecordSource, row: int, number: int) -> str:
    """The name of a record in reports: that of its row, with a number if the row has several."""
    return f"{source.row_name(row)}, record {number}" if number else source.row_name(row)


class RecordImages:
    """The distinct images of all records, as an `ImageSource`."""

    def __init__(
        self, sources: Sequence[RecordSource], places: np.ndarray, keys: PackedStrings, stamps: np.ndarray
    ) -> None:
        """`places` (len, 3) has the source of each image, its row, and its number in the row; `stamps` (len,) its
        state."""
        self.name = ", ".join(source.name for source in sources)
        self._sources, self._places, self._keys, self._stamps = list(sources), places, keys, stamps

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, index: int) -> str:
        return self._keys[index]

    def picture(self, index: int) -> Image.Image:
        source, row, number = self._places[index].tolist()
        return self._sources[source].picture(row, number)

    def stamp(self, index: int) -> bytes:
        return bytes(self._stamps[index])

    def content(self, index: int) -> bytes:
        source, row, number = self._places[index].tolist()
        return self._sources[source].content(row, number)

    def label(self, index: int) -> None:
        return None

    def groups(self) -> None:
        return None
