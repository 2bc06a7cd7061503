"""Weights of metric networks that no package contains: found in torch's hub folder or downloaded, and verified."""

import hashlib
import sys
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import torch

from evotok_plugin.errors import UserError

_TIMEOUT = 10  # seconds for a server to answer


@dataclass(frozen=True)
class HubFile:
    """A file in `checkpoints/` of torch's hub folder: its possible names, its URL and its sha256.

    Figures are comparable with published ones only if they come from exactly these weights, so the digest is verified
    at every use. It also makes it safe to let the packages that read the file unpickle it.
    """

    names: tuple[str, ...]
    url: str
    digest: str

    def fetch(self, advice: str) -> Path:
        """The path of the file, downloaded if it does not exist.

        Args:
            advice: what to do without a network; the end of the error message.

        Raises:
            UserError: the file does not exist and cannot be downloaded, or its content differs.
        """
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        for name in self.names:
            if (folder / name).is_file():
                return self.check(folder / name)
        path = folder / self.names[0]
        try:
            urlopen(self.url, timeout=_TIMEOUT).close()  # the download itself would wait for minutes
            folder.mkdir(parents=True, exist_ok=True)
            has_terminal = sys.stderr.isatty()  # in a log file its bar would print hundreds of states
            torch.hub.download_url_to_file(self.url, str(path), hash_prefix=self.digest, progress=has_terminal)
        except (OSError, HTTPException, RuntimeError) as error:
            raise UserError(f"{path} does not exist and {self.url} cannot be fetched ({error}); {advice}") from error
        return path

    def check(self, path: Path) -> Path:
        """Return the path if the file has these weights.

        Raises:
            UserError: the file cannot be read, or its content differs.
        """
        if path.exists() and not path.is_file():
            raise UserError(f"weights {str(path)!r} cannot be read: expected a file")
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"weights {str(path)!r} cannot be read: {error}") from error
        if digest != self.digest:
            raise UserError(
                f"{path} is not the file that published figures are computed with: its sha256 begins with "
                f"{digest[:8]}, expected {self.digest[:8]}; the right one comes from {self.url}"
            )
        return path
