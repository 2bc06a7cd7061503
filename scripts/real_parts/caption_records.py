"""Write records of images whose file names are their captions, for training (docs/data.md).

  python scripts/real_parts/caption_records.py photos/ captions.jsonl

Underscores become spaces, and a leading WordNet id (n01440764_) is left out. The image folder of the records is the
given folder.
"""

import argparse
import json
import sys
from pathlib import Path

from evotok_plugin.common import command_line
from evotok_plugin.common.files import check_output_file, write_text
from evotok_plugin.errors import UserError
from evotok_plugin.training.teacher import captioned_images


def write(arguments: argparse.Namespace) -> None:
    """Write one record per image, with `a photo of a NAME` as its caption."""
    check_output_file(arguments.output, [".jsonl"])
    if not arguments.folder.is_dir():
        raise UserError(f"{arguments.folder} is not a folder of images")
    rows = [
        {"image": str(path.relative_to(arguments.folder)), "caption": arguments.caption.replace("NAME", name)}
        for path, name in captioned_images(arguments.folder)
    ]
    write_text(arguments.output, "".join(json.dumps(row) + "\n" for row in rows))
    print(f"{arguments.output}: {len(rows)} records, such as {rows[0]['caption']!r}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of images")
    parser.add_argument("output", type=Path, help="new .jsonl file")
    parser.add_argument(
        "--caption", default="a photo of a NAME", help="text in which NAME is replaced (default: a photo of a NAME)"
    )
    return command_line.run(parser, work=write)


if __name__ == "__main__":
    sys.exit(main())
