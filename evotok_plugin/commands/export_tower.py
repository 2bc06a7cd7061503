"""`evotok export-tower`: write the vision tower with its own code."""

import argparse

from evotok_plugin.common.files import check_output_folder
from evotok_plugin.common.folders import check_new_folder
from evotok_plugin.export.tower import export_tower


def run(arguments: argparse.Namespace) -> None:
    """Write a folder that transformers opens with `trust_remote_code=True`."""
    check_output_folder(arguments.output)
    check_new_folder(arguments.output)
    export_tower(arguments.folder, arguments.output)
    print(arguments.output)
