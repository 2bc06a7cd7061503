"""Sources of conversations: JSON, JSONL, parquet, WebDataset shards and Hugging Face data sets.

A source gives rows by number and keeps only their positions in memory: a row is read on request, an image only when it
is encoded. A data set of millions of rows takes a few bytes per row, any number of processes can read it at the same
time, and a run can resume at any row.
"""

from collections import Counter
from pathlib import Path
from typing import Protocol

from PIL import Image

from evotok_plugin.data.files import (
    described,
    kind_of,
    list_folder,
    matching_files,
    refuse_compressed,
    report_skipped,
    suffix_of,
)
from evotok_plugin.data.hf_datasets import is_saved_dataset, load_hub, load_parquet, load_saved
from evotok_plugin.data.sources import skip_side_files
from evotok_plugin.errors import UserError
from llava_ext.data.dataset_records import DatasetRecords, parquet_parts
from llava_ext.data.json_records import JsonRecords
from llava_ext.data.records import Record, RowOptions
from llava_ext.data.tar_records import TarRecords

_ABOUT_DATA = {"dataset_info.json", "dataset_infos.json", "state.json"}  # files of `datasets` without rows


class RecordSource(Protocol):
    """Rows 0..len-1 with their records and images."""

    name: str

    def __len__(self) -> int: ...

    def row_name(self, index: int) -> str:
        """The name of a row in reports, unique within a run."""

    def records(self, index: int) -> tuple[Record, ...]:
        """The records of a row; they have the same images. Only a caption gives several, one for each of its tasks.

        Raises:
            UserError: the row is unusable.
        """

    def picture(self, index: int, number: int) -> Image.Image:
        """Image `number` of a row, as RGB.

        Raises:
            UserError: the image is missing or broken.
        """

    def content(self, index: int, number: int) -> bytes:
        """The file content of image `number` of a row.

        Raises:
            UserError: the image cannot be read.
        """


def open_records(spec: str | Path, options: RowOptions) -> RecordSource:
    """Open the source that an entry of `data_path` describes.

    Args:
        spec: `.json` (a list of records) or `.jsonl` files (one record per line); `.parquet` files; `.tar` shards; a
            folder with files of one of these kinds, or one written by `save_to_disk` of `datasets`;
            `hf:NAME[[:CONFIGURATION]:SPLIT]`. A pattern (`shards/{000..127}.tar`, `part-*.parquet`) stands for all
            matching files. The case of suffixes is ignored.

    Raises:
        UserError: no files match, or they are not in one of these formats.
    """
    spec = str(spec)
    if spec.startswith("hf:"):
        return DatasetRecords(load_hub(spec), spec, options)
    files = matching_files(spec)
    if not files:
        raise UserError(f"data file {spec} does not exist; expected .json, .jsonl, .parquet, .tar or hf:NAME")
    if len(files) == 1 and files[0].is_dir():
        if is_saved_dataset(files[0]):
            return DatasetRecords(load_saved(files[0]), spec, options)
        files = _files_in(files[0])
    refuse_compressed(files)
    kinds = {"folder" if file.is_dir() else kind_of(file) for file in files}
    if kinds == {"json"}:
        return JsonRecords(files, spec, options)
    if kinds == {"parquet"}:
        return DatasetRecords(load_parquet(files, spec), spec, options, parquet_parts(files))
    if kinds == {"tar"}:
        return TarRecords(files, spec, options)
    found = Counter("folder" if file.is_dir() else suffix_of(file) for file in files)
    raise UserError(
        f"data {spec}: expected .json, .jsonl, .parquet or .tar files, found "
        f"{', '.join(sorted(suffix or 'none' for suffix in found)) if len(found) == 1 else described(found)}"
    )


def _files_in(folder: Path) -> list[Path]:
    """The data files of a folder, all of one kind; other files are reported."""
    listing = list_folder(folder, flat=("tar", "parquet", "json"))
    skip_side_files(listing)
    if about := _ABOUT_DATA.intersection(listing.files.get("json", [])):
        listing.files["json"] = [name for name in listing.files["json"] if name not in about]
        listing.others[".json"] += len(about)
    kinds = sorted(kind for kind, names in listing.files.items() if names)
    if not kinds:
        raise UserError(
            f"data folder {folder} holds neither .tar shards nor .parquet files nor .json or .jsonl records nor a "
            f"saved data set; found {listing.found()}"
        )
    if len(kinds) > 1:
        raise UserError(
            f"data folder {folder} holds several kinds of data ({listing.found()}); keep one kind per folder, or "
            f"select files with a pattern such as '{folder}/*.{kinds[-1]}'"
        )
    report_skipped(str(folder), listing.others)
    return [folder / name for name in listing.files[kinds[0]]]
