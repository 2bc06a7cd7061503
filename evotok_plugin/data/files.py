"""Files as data: paths and patterns, suffixes, the files of a folder, and the identity of a file's content.

One table of suffixes, compared without regard to case, decides what a file is. Hidden files and the folders that
operating systems and tools add (`._x.jpg`, `.ipynb_checkpoints`, `__MACOSX`, `@eaDir`) are ignored; every other file
that is not read is counted and reported.
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
_ADDED_BY_SYSTEMS = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "thumbs.db", "ehthumbs.db", "desktop.ini"}
_LARGEST_FILE = 2**31  # bytes of one image file
_KINDS_IN_A_REPORT = 10
_LONGEST_PATH = 300  # characters of a path in a message


def suffix_of(path: str | Path) -> str:
    """The suffix in lower case; of a compressed file with the one before it (`.tar.gz`)."""
    stem, suffix = os.path.splitext(os.path.basename(str(path)))
    suffix = suffix.lower()
    return os.path.splitext(stem)[1].lower() + suffix if suffix in _KINDS["compressed"] else suffix


def kind_of(path: str | Path) -> str:
    """ "image", "tar", "parquet", "json" or "compressed"; empty for any other suffix."""
    return _KIND_OF.get(os.path.splitext(str(path))[1].lower(), "")


def refuse_compressed(files: Sequence[Path]) -> None:
    """Reject compressed files, which cannot be read at any position.

    Raises:
        UserError: one of the files is compressed.
    """
    for file in files:
        if kind_of(file) == "compressed":
            raise UserError(
                f"{_quoted(str(file))} is compressed ({suffix_of(file)}), which is not supported; unpack it first"
            )


def is_hidden(name: str) -> bool:
    """Whether any part of a path is hidden or was added by an operating system or a tool."""
    return any(
        (part.startswith(".") and part not in (".", "..")) or part.lower() in _ADDED_BY_SYSTEMS
        for part in name.split("/")
    )


def _quoted(path: str) -> str:
    """A path as a message quotes it: paths of usual lengths in full, because their ends differ."""
    return shorten(path, _LONGEST_PATH)


# Folders -----------------------------------------------------------------------------------------------------


@dataclass
class Listing:
    """The files of a folder.

    Attributes:
        files: paths relative to the folder, by kind (`kind_of`), sorted; kinds that are not asked for are absent.
        others: how many other files there are, by suffix.
    """

    files: dict[str, list[str]] = field(default_factory=dict)
    others: Counter = field(default_factory=Counter)

    def skip(self, kind: str) -> None:
        """Count the files of a kind among the others."""
        self.others.update(suffix_of(name) for name in self.files.pop(kind, []))

    def found(self) -> str:
        """All suffixes with their numbers, for messages."""
        return described(self.others + Counter(suffix_of(name) for names in self.files.values() for name in names))


def list_folder(folder: Path, deep: Sequence[str] = (), flat: Sequence[str] = ()) -> Listing:
    """The files of a folder: of the kinds `deep` in all its sub-folders, of the kinds `flat` in the folder itself.

    Links are followed; a folder that several links lead to is read once, under its own path where it has one.

    Raises:
        UserError: a folder that cannot be read.
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
    folders, linked = deque([("", root)]), deque()
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
    except OSError:  # a link to nothing, or to itself
        return None


def described(found: Counter) -> str:
    """Numbers by suffix, or by what is not a file with a suffix: `2 .tif, 5 .txt, 1 broken link`."""
    shown = [
        f"{count} {label or 'without suffix'}{'s' * (count > 1 and label[:1] not in ('', '.'))}"
        for label, count in sorted(found.items())
    ]
    more = len(shown) - _KINDS_IN_A_REPORT
    return ", ".join(shown[:_KINDS_IN_A_REPORT]) + (f" and {more} more kinds" if more > 0 else "") or "no files"


def report_skipped(name: str, found: Counter, what: str = "file") -> None:
    """Log in one line how many files of a source are not read."""
    if found:
        number = found.total()
        name = name if len(name) <= _LONGEST_PATH else _quoted(name)
        logger.warning("%s: %d %s%s skipped: %s", name, number, what, "s" * (number > 1), described(found))


# Paths -------------------------------------------------------------------------------------------------------


def local_path(spec: str) -> str:
    """The path that a user means: `file:` URLs are decoded, `~` is the home folder unless a file has that name.

    Raises:
        UserError: the URL of something that is not on this machine.
    """
    if spec.startswith("pipe:"):
        raise UserError(f"{shorten(spec)}: commands are not run; only local files are read")
    try:
        path = local_file(spec)
    except UserError as error:
        raise UserError(f"{shorten(spec)}: {error}") from None
    if path != spec:
        return path
    return os.path.expanduser(spec) if spec.startswith("~") and not os.path.lexists(spec) else spec


def existing(base: str, name: str) -> str | None:
    """`base/name` as it is on disk, whichever Unicode normal form the names have there; None if it is not there.

    macOS writes names in NFD, other systems mostly in NFC.
    """
    whole = os.path.join(base, name)
    if os.path.lexists(whole) or name.isascii():
        return whole if os.path.lexists(whole) else None
    for part in PurePosixPath(name).parts:
        forms = (part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part))
        found = next((form for form in forms if os.path.lexists(os.path.join(base, form))), None)
        if found is None:
            return None
        base = os.path.join(base, found)
    return base


def matching_files(spec: str) -> list[Path]:
    """The files or folders that a path or pattern means, with `*`, `?`, `[..]`, `{000..127}` and `{a,b}`, sorted; none
    if there are none. A part of the path that exists as it is written is not a pattern.

    Raises:
        UserError: some of the names that braces spell out do not exist, or one is a pipe or a device.
    """
    found, missing, special = [""], [], Counter()
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
    """`a{000..002}.tar` -> a000.tar, a001.tar, a002.tar; `{a,b}.tar` -> a.tar, b.tar."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    if match[3] is not None:
        inside = match[3].split(",")
    else:
        inside = [f"{number:0{len(match[1])}d}" for number in range(int(match[1]), int(match[2]) + 1)]
    return [full for one in inside for full in _braces(pattern[: match.start()] + one + pattern[match.end() :])]


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """A name for each file: its stem, or where stems repeat the path below the folder that all have in common."""
    stems = [path.stem for path in paths]
    if len(set(stems)) == len(stems):
        return stems
    absolute = [os.path.abspath(path) for path in paths]
    below = [os.path.relpath(path, os.path.commonpath(map(os.path.dirname, absolute))) for path in absolute]
    bare = [os.path.splitext(name)[0] for name in below]
    return bare if len(set(bare)) == len(bare) else below


# Content -----------------------------------------------------------------------------------------------------


def read_file(path: str | Path, name: str | None = None) -> bytes:
    """The content of an image file; `name` stands for it in errors.

    Raises:
        UserError: it does not exist, is not a regular file, cannot be read, or has more than 2 GiB.
    """
    name = shorten(name or str(path))
    try:  # without O_NONBLOCK the open of a pipe would wait for a writer
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
    """The reason of an error without the file's name, which `str` of an OSError repeats in full."""
    return getattr(error, "strerror", None) or str(error)


def file_state(path: str | Path) -> tuple[int, ...]:
    """Size in bytes, time of the last write, time of the last change of any kind (ns); empty if there is no file.

    The last one shows a file that was replaced by one of the same size with its old time of writing restored.
    """
    try:
        facts = os.stat(path)
    except (OSError, ValueError):
        return ()
    return facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def stamp_of(place: str, *state: object) -> bytes:
    """16 bytes that identify an image without reading it: 8 for the place where it lies, 8 for the state it is in."""
    where, how = place.encode(errors="surrogatepass"), repr(state).encode(errors="surrogatepass")
    return hashlib.blake2b(where, digest_size=8).digest() + hashlib.blake2b(how, digest_size=8).digest()


def content_digest(content: bytes) -> bytes:
    """16 bytes that identify an image by its content."""
    return hashlib.blake2b(content, digest_size=16).digest()
