"""Digests of files."""

import hashlib
from pathlib import Path

from evotok_plugin.common.foreign_files import open_regular


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a regular file, in hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
