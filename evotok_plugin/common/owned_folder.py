"""The record of the files that a run has created in a folder; only these may be overwritten, moved or deleted."""

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from evotok_plugin.common.files import temporary_path, write_json, writing
from evotok_plugin.common.foreign_files import readable_json
from evotok_plugin.errors import UserError

MARKER = ".evotok.json"
PROGRAM = "evotok"
CHECKOUT = Path(__file__).resolve().parents[2]


def read_marker(folder: Path) -> dict | None:
    """The marker that this program wrote into a folder, or None."""
    marker = readable_json(folder / MARKER)
    if marker is None or marker.get("program") != PROGRAM:
        return None
    entries, facts = marker.get("entries", []), marker.get("facts", {})
    is_whole = isinstance(facts, dict) and _are_relative(entries) and _are_relative(marker.get("moved", []))
    return marker if is_whole else None


def _are_relative(names: object) -> bool:
    """Whether these are paths inside a folder; a damaged record must not name files outside of it."""
    return isinstance(names, list) and all(
        isinstance(name, str) and name and "\0" not in name and not name.startswith("/") and ".." not in name.split("/")
        for name in names
    )


class OwnedFolder:
    """The output folder of a run, with a record (`.evotok.json`) of the files that the run has created there.

    An entry is the relative path of a file, or a glob pattern below a folder that the run has created
    (`tensorboard/**/events.*`). Only recorded files are ever overwritten, moved or deleted; all others in the folder
    belong to the user.

    Args:
        legacy: finds the entries of a run from before records existed.
    """

    def __init__(self, path: str | Path, legacy: Callable[[Path], Iterable[str]] | None = None) -> None:
        self.path = Path(path)
        marker = read_marker(self.path)
        self.has_marker = marker is not None
        if marker is None:
            marker = {"program": PROGRAM, "entries": sorted(set(legacy(self.path))) if legacy else []}
        self._marker = marker
        self._marker.setdefault("entries", [])
        self._marker.setdefault("facts", {})

    @property
    def entries(self) -> list[str]:
        return self._marker["entries"]

    @property
    def facts(self) -> dict[str, Any]:
        """Facts about the run that are not settings; `note` changes them."""
        return self._marker["facts"]

    def note(self, **facts: Any) -> None:
        """Record facts of the run."""
        self.facts.update(facts)
        self._write()

    def owns(self, name: str) -> bool:
        """Whether the run has created a file, or the pattern below a folder."""
        return name in self.entries

    def check(self, *names: str) -> None:
        """Check that entries could be created.

        Raises:
            UserError: a file exists that the run has not created.
        """
        owned = set(self.files())
        for name in names:
            path = self.path / name
            found = self.files([name]) or ([path] if "*" not in name and path.exists() else [])
            in_the_way = [] if self.owns(name) else [file for file in found if file not in owned]
            if in_the_way:
                raise UserError(
                    f"{in_the_way[0]} was not written by this program and would be overwritten; move it away, or "
                    "choose another output folder"
                )

    def claim(self, *names: str) -> None:
        """Record entries that are about to be created.

        Raises:
            UserError: as `check`.
        """
        self.check(*names)
        if new := [name for name in names if not self.owns(name)]:
            self.entries.extend(new)
            self._write()
        elif not self.has_marker:
            self._write()

    def forget(self, *names: str) -> None:
        """Remove entries from the record, once their files are deleted."""
        self.exchange(names, ())

    def exchange(self, old: Iterable[str], new: Iterable[str]) -> None:
        """Replace entries by others: patterns by the files that were then written."""
        old = set(old)
        self._marker["entries"] = list(dict.fromkeys([*(e for e in self.entries if e not in old), *new]))
        self._write()

    def files(self, entries: Iterable[str] | None = None) -> list[Path]:
        """The files of the entries that exist."""
        return files_of(self.path, self.entries if entries is None else entries)

    def delete(self, *entries: str) -> None:
        """Delete the files of entries, and folders that become empty."""
        delete_files(self.path, self.files(entries))
        self.forget(*entries)

    def _write(self) -> None:
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / MARKER, self._marker)
        self.has_marker = True

    # Replacing -----------------------------------------------------------------------------------------------

    @property
    def _aside(self) -> Path:
        return self.path / ".replaced"

    def move_aside(self, keep: Iterable[str] = ()) -> Path | None:
        """Move all recorded files except those of `keep` into a subfolder.

        `finish_replacing` deletes them later, `restore` moves them back.

        Returns:
            The subfolder, or None without files to move.
        """
        kept = set(keep)
        moved = self.files(entry for entry in self.entries if entry not in kept)
        if not moved:
            return None
        if self._aside.exists() and set(self._aside.iterdir()) - {temporary_path(self._aside / MARKER)}:
            raise UserError(f"{self._aside} exists already; move it away")
        self._aside.mkdir(exist_ok=True)  # it exists, empty, after a kill before its marker was written
        names = [str(path.relative_to(self.path)) for path in moved]
        record = {"program": PROGRAM, "moved": names, "kept": sorted(kept), "before": self._marker, "obsolete": False}
        write_json(self._aside / MARKER, record)
        _move(self.path, self._aside, names)
        self._marker = {**self._marker, "entries": [entry for entry in self.entries if entry in kept], "facts": {}}
        self._write()
        return self._aside

    def restore(self) -> bool:
        """Move back the files that were moved aside by a run that did not complete its first step.

        The files that this run has created are deleted. If its first step succeeded, the files moved aside are deleted
        instead.

        Returns:
            Whether files were moved back.
        """
        record = read_marker(self._aside)
        if record is None or "moved" not in record:
            return False
        if record["obsolete"]:
            self.finish_replacing()
            return False
        aside = [name for name in record["moved"] if files_of(self._aside, [name])]
        # A kill during the move leaves some files in place; all other recorded files are newer.
        in_place = {self.path / name for name in record["moved"]} - {self.path / name for name in aside}
        new = set(self.files(entry for entry in self.entries if entry not in record["kept"])) - in_place
        delete_files(self.path, new)
        _move(self._aside, self.path, aside)
        self._marker = record["before"]
        self._write()
        (self._aside / MARKER).unlink()
        _remove_if_empty(self._aside)
        return True

    def finish_replacing(self) -> None:
        """Delete the files that were moved aside."""
        record = read_marker(self._aside)
        if record is None or "moved" not in record:
            return
        write_json(self._aside / MARKER, {**record, "obsolete": True})
        delete_files(self._aside, [self._aside / name for name in record["moved"]])
        (self._aside / MARKER).unlink()
        _remove_if_empty(self._aside)


def files_of(folder: Path, entries: Iterable[str]) -> list[Path]:
    """The existing files of a folder that match relative paths or glob patterns."""
    found: set[Path] = set()
    for entry in entries:
        # File names may contain brackets, so only an entry with `*` is a pattern.
        paths = folder.glob(entry) if "*" in entry else [folder / entry]
        found.update(path for path in paths if path.is_symlink() or path.is_file())
    return sorted(found)


def delete_files(root: Path, files: Iterable[Path]) -> None:
    """Delete files below `root`, then the folders in between that are empty."""
    folders: set[Path] = set()
    for path in files:
        path.unlink(missing_ok=True)
        folders.update(parent for parent in path.parents if root in parent.parents)
    for parent in sorted(folders, key=lambda path: len(path.parts), reverse=True):
        _remove_if_empty(parent)


def _move(source: Path, target: Path, names: Iterable[str]) -> None:
    """Move files, given by their relative paths; both folders are on the same file system."""
    folders: set[Path] = set()
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(source / name, target / name)
        folders.update(parent for parent in (source / name).parents if source in parent.parents)
    for parent in sorted(folders, key=lambda path: len(path.parts), reverse=True):
        _remove_if_empty(parent)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def check_replaceable(folder: str | Path, inputs: Mapping[str, Iterable[str]] | None = None) -> None:
    """Check that a run may replace the content of a folder.

    Args:
        inputs: paths that the run reads, by the names of their settings; of a pattern, the part before the first
            wildcard is checked.

    Raises:
        UserError: the folder is a symlink; it is or contains the working folder, the home folder, the root or the
            checkout; or it contains an input of the run.
    """
    folder = Path(folder)
    if folder.is_symlink():
        raise UserError(
            f"--overwrite: {folder} is a symlink to {os.readlink(folder)}; name the folder itself with --output_dir"
        )
    real = folder.resolve()
    protected = {"the working folder": Path.cwd(), "the home folder": Path.home(), "the checkout": CHECKOUT}
    for what, path in {**protected, "the root folder": Path("/")}.items():
        if real == path.resolve() or real in path.resolve().parents:
            raise UserError(f"--overwrite: {folder} is or contains {what} ({path}); choose another --output_dir")
    for setting, paths in (inputs or {}).items():
        for given in paths:
            path = Path(re.split(r"[*?]", given)[0]).resolve()
            if real == path or real in path.parents:
                raise UserError(
                    f"--overwrite: {folder} contains {setting} {given}, which the run reads; "
                    "choose another --output_dir"
                )
