"""Data files: paths and patterns, suffixes, the files of a folder, and the identity of a file's content.

A table of suffixes, compared case-insensitively, determines the kind of a file. Hidden files and folders that operating
systems and tools create (`._x.jpg`, `.ipynb_checkpoints`, `__MACOSX`, `@eaDir`) are ignored; every other file that is
not read is counted and reported.
"""

import glob
import hashlib
import logging
import os
import re
import stat
import unicodedata
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from evotok_plugin.data.bad_samples import shorten
from evotok_plugin.data.images import IMAGE_SUFFIXES, local_file
from evotok_plugin.errors import UserError

logger = logging.getLogger(__name__)

_KINDS = {
    "image": IMAGE_SUFFIXES,
    "tar": (".tar",),
    "parquet": (".parquet",),
    "json": (".json", ".jsonl", ".ndjson"),
    "compressed": (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".zip", ".7z", ".rar"),
}
_KIND_OF = {suffix: kind for kind, suffixes in _KINDS.items() for suffix in suffixes}
_SYSTEM_NAMES = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "thumbs.db", "ehthumbs.db", "desktop.ini"}
_LARGEST_FILE = 2**31  # bytes of one image file
_KINDS_IN_A_REPORT = 10
_LONGEST_PATH = 300  # characters of a path in a message


def suffix_of(path: str | Path) -> str:
    """The suffix in lower case; for a compressed file including the one before it (`.tar.gz`)."""
    stem, suffix = os.path.splitext(os.path.basename(str(path)))
    suffix = suffix.lower()
    return os.path.splitext(stem)[1].lower() + suffix if suffix in _KINDS["compressed"] else suffix


def kind_of(path: str | Path) -> str:
    """The kind of a file: "image", "tar", "parquet", "json" or "compressed"; empty for any other suffix."""
    return _KIND_OF.get(os.path.splitext(str(path))[1].lower(), "")


def refuse_compressed(files: Sequence[Path]) -> None:
    """Reject compressed files, which do not allow random access.

    Raises:
        UserError: one of the files is compressed.
    """
    for file in files:
        if kind_of(file) == "compressed":
            raise UserError(
                f"{_quoted(str(file))} is compressed ({suffix_of(file)}), which is not supported; unpack it first"
            )


def is_hidden(name: str) -> bool:
    """Whether any part of a path is hidden or was created by an operating system or a tool."""
    return any(
        (part.startswith(".") and part not in (".", "..")) or part.lower() in _SYSTEM_NAMES for part in name.split("/")
    )


def _quoted(path: str) -> str:
    """Quote a path for a message; paths of usual length are not shortened, because they differ at the end."""
    return shorten(path, _LONGEST_PATH)


# Folders -----------------------------------------------------------------------------------------------------


@dataclass
class Listing:
    """The files of a folder.

    Attributes:
        files: sorted paths relative to the folder by kind (`kind_of`), only of the requested kinds.
        others: number of other files by suffix.
    """

    files: dict[str, list[str]] = field(default_factory=dict)
    others: Counter = field(default_factory=Counter)

    def skip(self, kind: str) -> None:
        """Count the files of a kind among the others."""
        self.others.update(suffix_of(name) for name in self.files.pop(kind, []))

    def found(self) -> str:
        """Numbers of all files by suffix, for messages."""
        return described(self.others + Counter(suffix_of(name) for names in self.files.values() for name in names))


def list_folder(folder: Path, deep: Sequence[str] = (), flat: Sequence[str] = ()) -> Listing:
    """List the files of a folder: kinds `deep` in all its subfolders, kinds `flat` in the folder itself.

    Links are followed; a folder that is reached several times is read once, if possible under its real path.

    Raises:
        UserError: a folder cannot be read.
    """
    listing = Listing()
    for name, label in _walk(str(folder)):
        kind = "" if label else kind_of(name)
        if kind in deep or (kind in flat and "/" not in name):
            listing.files.setdefault(kind, []).append(name)
        else:
            listing.others[label or suffix_of(name)] += 1
    for names in listing.files.values():
        names.sort()
    return listing


def _walk(root: str) -> Iterator[tuple[str, str]]:
    """Relative path of each file that is not hidden, and why it cannot be read ("" if it can)."""
    entered: set[str] = set()
    folders: deque[tuple[str, str]] = deque([("", root)])
    linked: deque[tuple[str, str]] = deque()
    while folders or linked:
        below, folder = (folders or linked).popleft()
        real = os.path.realpath(folder)
        if real in entered:
            continue
        entered.add(real)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"folder {_quoted(folder)} cannot be read: {error.strerror}") from error
        for entry in entries:
            if is_hidden(entry.name):
                continue
            mode = _mode(entry.path)
            if mode is not None and stat.S_ISDIR(mode):
                (linked if entry.is_symlink() else folders).append((f"{below}{entry.name}/", entry.path))
            elif mode is None:
                yield below + entry.name, "broken link"
            else:
                yield below + entry.name, "" if stat.S_ISREG(mode) else "special file"


def _mode(path: str) -> int | None:
    try:
        return os.stat(path).st_mode
    except OSError:  # a dangling or circular link
        return None


def described(found: Counter) -> str:
    """Format numbers of files by suffix or description: `2 .tif, 5 .txt, 1 broken link`."""
    shown = [
        f"{count} {label or 'without suffix'}{'s' * (count > 1 and label[:1] not in ('', '.'))}"
        for label, count in sorted(found.items())
    ]
    more = len(shown) - _KINDS_IN_A_REPORT
    return ", ".join(shown[:_KINDS_IN_A_REPORT]) + (f" and {more} more kinds" if more > 0 else "") or "no files"


def report_skipped(name: str, found: Counter, noun: str = "file") -> None:
    """Log in one line how many files of a source are not read."""
    if found:
        number = found.total()
        name = name if len(name) <= _LONGEST_PATH else _quoted(name)
        logger.warning("%s: %d %s%s skipped: %s", name, number, noun, "s" * (number > 1), described(found))


# Paths -------------------------------------------------------------------------------------------------------


def local_path(spec: str) -> str:
    """Convert user input to a path: `file:` URLs are decoded, `~` is the home folder unless a file has that name.

    Raises:
        UserError: the URL of a file that is not on this machine.
    """
    if spec.startswith("pipe:"):
        raise UserError(f"{shorten(spec)}: commands are not supported; only local files are read")
    try:
        path = local_file(spec)
    except UserError as error:
        raise UserError(f"{shorten(spec)}: {error}") from None
    if path != spec:
        return path
    return os.path.expanduser(spec) if spec.startswith("~") and not os.path.lexists(spec) else spec


def existing(base: str, name: str) -> str | None:
    """Find `base/name` on disk, whatever the Unicode normal form of the names there; None if it does not exist.

    macOS writes names in NFD, other systems mostly in NFC.
    """
    path = os.path.join(base, name)
    if os.path.lexists(path) or name.isascii():
        return path if os.path.lexists(path) else None
    for part in PurePosixPath(name).parts:
        forms = (part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part))
        found = next((form for form in forms if os.path.lexists(os.path.join(base, form))), None)
        if found is None:
            return None
        base = os.path.join(base, found)
    return base


def is_below(path: str | Path, root: str | Path) -> bool:
    """Whether a path is inside a folder, once `..` and links are resolved."""
    try:
        real, folder = os.path.realpath(path), os.path.realpath(root)
    except (OSError, ValueError):  # a NUL character
        return False
    return os.path.commonpath([real, folder]) == folder


def path_below(name: str | Path, roots: Sequence[Path], remedy: str) -> str:
    """The path of a file that foreign data names, which must be inside one of some folders.

    Args:
        name: absolute, or relative to one of the folders or to the working folder.
        roots: the folders.
        remedy: what the user can do, for the error message.

    Raises:
        UserError: it is outside of them.
    """
    candidates = [str(name), *(os.path.join(root, name) for root in roots)]
    inside = [one for one in candidates if any(is_below(one, root) for root in roots)]
    if not inside:
        where = f"outside of {' and '.join(map(str, roots))}" if roots else "a file of this machine"
        raise UserError(f"image {shorten(str(name))} is {where}; {remedy}")
    return next((one for one in inside if os.path.exists(one)), inside[0])


def matching_files(spec: str) -> list[Path]:
    """Expand a path or pattern to the existing files or folders, sorted; an empty list if there are none.

    Patterns contain `*`, `?`, `[..]`, `{000..127}` or `{a,b}`. Parts of the path that exist literally are not patterns.

    Raises:
        UserError: some of the names listed by braces do not exist, or one is a pipe or a device.
    """
    found, missing = [""], []
    special: Counter[str] = Counter()
    for part in Path(local_path(spec)).parts or (".",):
        inside = []
        for base in found:
            if literal := existing(base, part):
                inside.append(literal)
                continue
            for one in _braces(part):
                if literal := existing(base, one):
                    inside.append(literal)
                elif glob.has_magic(one):
                    below = glob.glob(os.path.join(glob.escape(base), one))
                    below = [path for path in below if not is_hidden(os.path.basename(path))]
                    readable = [path for path in below if _is_readable(path)]
                    special["special file or broken link"] += len(below) - len(readable)
                    inside += readable
                elif one != part:
                    missing.append(os.path.join(base, one))
        found = inside
    if found and missing:
        first = _quoted(missing[0])
        raise UserError(f"{_quoted(spec)}: {len(missing)} of its files do not exist; first: {first}")
    for path in found:
        if os.path.exists(path) and not _is_readable(path):
            raise UserError(f"{_quoted(path)} is a pipe or a device; expected a file or a folder")
    report_skipped(spec, +special)
    return sorted(Path(path) for path in found if os.path.exists(path))


def _is_readable(path: str) -> bool:
    mode = _mode(path)
    return mode is not None and (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _braces(pattern: str) -> list[str]:
    """Expand braces: `a{000..002}.tar` -> a000.tar, a001.tar, a002.tar; `{a,b}.tar` -> a.tar, b.tar."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    if match[3] is not None:
        inside = match[3].split(",")
    else:
        inside = [f"{number:0{len(match[1])}d}" for number in range(int(match[1]), int(match[2]) + 1)]
    return [full for one in inside for full in _braces(pattern[: match.start()] + one + pattern[match.end() :])]


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """A unique name for each file: its stem or, if stems repeat, its path below the common folder."""
    stems = [path.stem for path in paths]
    if len(set(stems)) == len(stems):
        return stems
    absolute = [os.path.abspath(path) for path in paths]
    below = [os.path.relpath(path, os.path.commonpath(map(os.path.dirname, absolute))) for path in absolute]
    bare = [os.path.splitext(name)[0] for name in below]
    return bare if len(set(bare)) == len(bare) else below


# Content -----------------------------------------------------------------------------------------------------


def read_file(path: str | Path, name: str | None = None) -> bytes:
    """Read the content of an image file; `name` identifies it in errors.

    Raises:
        UserError: it does not exist, is not a regular file, cannot be read, or is larger than 2 GiB.
    """
    name = shorten(name or str(path))
    try:  # without O_NONBLOCK, opening a pipe would wait for a writer
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"image {name} does not exist") from None
    except (OSError, ValueError) as error:
        raise UserError(f"image {name} cannot be read: {_cause(error)}") from error
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise UserError(f"image {name} cannot be read: it is a folder, a pipe or a device, expected a file")
        if facts.st_size > _LARGEST_FILE:
            raise UserError(f"image {name} cannot be read: it has {facts.st_size} bytes, the limit is {_LARGEST_FILE}")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    except OSError as error:
        raise UserError(f"image {name} cannot be read: {_cause(error)}") from error
    finally:
        os.close(descriptor)


def _cause(error: Exception) -> str:
    """The reason for an error without the file name, which `str` of an OSError includes in full."""
    return getattr(error, "strerror", None) or str(error)


def file_state(path: str | Path) -> tuple[int, ...]:
    """Size in bytes, modification time and change time (ns) of a file; empty if it does not exist.

    The change time reveals a file that was replaced by one of the same size and modification time.
    """
    try:
        facts = os.stat(path)
    except (OSError, ValueError):
        return ()
    return facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def stamp_of(place: str, *state: object) -> bytes:
    """16 bytes that identify an image without reading it: 8 for its location, 8 for its state."""
    where, how = place.encode(errors="surrogatepass"), repr(state).encode(errors="surrogatepass")
    return hashlib.blake2b(where, digest_size=8).digest() + hashlib.blake2b(how, digest_size=8).digest()


def content_digest(content: bytes) -> bytes:
    """16 bytes that identify an image by its content."""
    return hashlib.blake2b(content, digest_size=16).digest()
