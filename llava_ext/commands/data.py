"""`evotok-llava data draw`: add drawing samples to conversations that describe images."""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evotok_plugin.common.files import check_output_file, write_whole
from evotok_plugin.data.bad_samples import shorten
from evotok_plugin.errors import UserError
from llava_ext.data.descriptions import check_share, drawing_of, is_chosen
from llava_ext.data.json_records import JsonRecords
from llava_ext.data.record_scan import NUM_EXAMPLES
from llava_ext.data.record_sources import open_records
from llava_ext.data.records import RowOptions, description_in

_SPEAKERS = {"user": "human", "assistant": "gpt"}


@dataclass
class _Counts:
    """Numbers of rows, and the first examples."""

    rows: int = 0
    descriptions: int = 0
    drawn: int = 0
    examples: list[str] = field(default_factory=list)


def run(arguments: argparse.Namespace) -> None:
    """Write the records and their drawing samples, and print their numbers and three examples."""
    check_share(arguments.share)
    output: Path = arguments.output
    check_output_file(output, [".json", ".jsonl"])
    source = open_records(arguments.file, RowOptions())
    if not isinstance(source, JsonRecords):
        raise UserError(f"{arguments.file}: expected .json or .jsonl records; use draw_share in training for others")
    if output.exists():
        raise UserError(f"-o {output} exists; name another file")
    counts = _Counts()

    def write(part: Path) -> None:
        with part.open("w", encoding="utf-8") as file:
            is_list, is_first = output.suffix == ".json", True
            for row in _rows(source, arguments.share, arguments.only, counts):
                file.write(("[\n" if is_first else ",\n") if is_list else "")
                file.write(json.dumps(row, ensure_ascii=False).encode(errors="surrogatepass").decode(errors="replace"))
                file.write("" if is_list else "\n")
                is_first = False
            if is_first:
                raise UserError(f"{arguments.file}: no conversation asks for a description, so nothing is written")
            file.write("\n]\n" if is_list else "")

    write_whole(output, write)
    print(
        f"{counts.rows} conversations, {counts.descriptions} of them describe an image, {counts.drawn} are also drawn"
    )
    for example in counts.examples:
        print(f"  draw: {example}")
    print(output)


def _rows(source: JsonRecords, share: float, only: bool, counts: _Counts) -> Iterator[Any]:
    """The rows to write; rows that are not valid JSON are reported and left out."""
    for index in range(len(source)):
        try:
            row: Any = source.row(index)
        except UserError as error:
            print(f"left out: {source.row_name(index)}: {error}", file=sys.stderr)
            continue
        counts.rows += 1
        if not only:
            yield row
        found = description_in(row)
        if found is None:
            continue
        counts.descriptions += 1
        messages, image = found
        description = messages[-1]["content"]
        if not is_chosen(description, image, share):
            continue
        counts.drawn += 1
        if len(counts.examples) < NUM_EXAMPLES:
            counts.examples.append(shorten(description))
        identity = {"id": f"{row['id']}-draw"} if row.get("id") is not None else {}
        turns = [{"from": _SPEAKERS[turn["role"]], "value": turn["content"]} for turn in drawing_of(messages)]
        yield {**identity, "image": image, "conversations": turns}
