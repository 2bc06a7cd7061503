"""The folder of the page's files: uploads, and images that the page shows. It has a quota and ends with the process."""

import atexit
import os
import shutil
import time
from pathlib import Path

from gradio.utils import get_upload_folder

from evotok_plugin.common.temporary_names import own_temporary_path, remove_abandoned
from evotok_plugin.errors import UserError

_KEPT_S = 600.0  # files that are younger are not deleted to make room
_made: list[Path] = []


def use_own_folder() -> None:
    """Give the page a new folder inside gradio's, which other programs may use too; it is deleted at the end.

    Folders that killed processes have left are deleted. gradio reads its folder only from the environment.
    """
    parent = Path(get_upload_folder())
    if parent in _made and parent.is_dir():
        return
    parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(parent / "evotok-page")
    folder = own_temporary_path(parent / "evotok-page")
    folder.mkdir(mode=0o700)
    _made.append(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = str(folder)


class PageFiles:
    """The files of the page, with a limit of their total size.

    Args:
        quota: bytes.
    """

    def __init__(self, quota: int) -> None:
        self._quota = quota

    def make_room(self, num_bytes: int = 0) -> None:
        """Check that `num_bytes` fit into the quota; the oldest files are deleted for them, recent ones are not.

        Raises:
            UserError: they do not fit.
        """
        files = sorted(_files(Path(get_upload_folder())))
        total = sum(size for _, size, _ in files) + num_bytes
        for modified, size, path in files:
            if total <= self._quota or time.time() - modified < _KEPT_S:
                break
            path.unlink(missing_ok=True)
            total -= size
        if total > self._quota:
            raise UserError("the page has no room for more files at the moment; try again later")

    def unfinished(self) -> set[Path]:
        """Files that gradio has not moved to their final place."""
        folder = Path(get_upload_folder())
        return {path for path in folder.glob("tmp*") if path.is_file()} if folder.is_dir() else set()


def _files(folder: Path) -> list[tuple[float, int, Path]]:
    """Time of modification, size and path of every file."""
    found = []
    for path in folder.rglob("*"):
        try:
            state = path.lstat()
        except FileNotFoundError:  # deleted in the meantime
            continue
        if path.is_file():
            found.append((state.st_mtime, state.st_size, path))
    return found
