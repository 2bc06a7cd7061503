"""Where conversations come from: JSON, JSONL, parquet, WebDataset shards and Hugging Face data sets.

Every source is addressed by number and held as the places of its rows: a row is read when it is asked for, an image
only when it is encoded. So a set of many millions of rows costs some bytes a row, any number of processes reads it at
once, and a run can be resumed at any row.
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

_ABOUT_DATA = {"dataset_info.json", "dataset_infos.json", "state.json"}  # files of `datasets` that hold no rows


class RecordSource(Protocol):
    """Rows 0..len-1 and the records and images that are in them."""

    name: str

    def __len__(self) -> int: ...

    def row_name(self, index: int) -> str:
        """The row's name in reports: unique within a run."""

    def records(self, index: int) -> tuple[Record, ...]:
        """The records of a row; ValueError if it is unusable. A row is one record, but for a caption with several
        tasks. The records of a row have the same images."""

    def picture(self, index: int, number: int) -> Image.Image:
        """Image `number` of a row, as RGB; ValueError if it is missing or broken."""

    def content(self, index: int, number: int) -> bytes:
        """The file of image `number` of a row; ValueError if it cannot be read."""


def open_records(spec: str | Path, options: RowOptions) -> RecordSource:
    """The source that an entry of `data_path` means.

    Args:
        spec: `.json` (a list of records) or `.jsonl` files (one a line); `.parquet` files; `.tar` shards; a folder of
            files of one of these kinds, or one written by `datasets`' `save_to_disk`;
            `hf:NAME[[:CONFIGURATION]:SPLIT]`. A pattern (`shards/{000..127}.tar`, `part-*.parquet`) means all its
            files. Suffixes are compared without regard to case.

    Raises:
        UserError: nothing there, or nothing that can be understood.
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
    """The data files of a folder, which are of one kind; what else is there is reported."""
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
            f"data folder {folder} holds several kinds of data ({listing.found()}); keep one kind in a folder, or name "
            f"the files by a pattern such as '{folder}/*.{kinds[-1]}'"
        )
    report_skipped(str(folder), listing.others)
    return [folder / name for name in listing.files[kinds[0]]]
