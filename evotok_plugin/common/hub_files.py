"""Weights that measuring networks need and no package brings: found in torch's hub folder, or fetched, and checked."""

import hashlib
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import torch

from evotok_plugin.errors import UserError

_PATIENCE = 10  # seconds for a server to answer


@dataclass(frozen=True)
class HubFile:
    """A file of `checkpoints/` in torch's hub folder: the names it goes by, where it comes from, its sha256.

    A number that is to be compared with published ones must come from these very weights, so every use is checked; a
    checked file is also the only kind that may be unpickled by the packages that read it.
    """

    names: tuple[str, ...]
    url: str
    digest: str

    def fetch(self, advice: str) -> Path:
        """The file, downloaded if it is not there yet.

        Args:
            advice: what to do where there is no network; the end of the error.

        Raises:
            UserError: it is not there and cannot be fetched, or it is another file.
        """
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        for name in self.names:
            if (folder / name).is_file():
                return self.check(folder / name)
        path = folder / self.names[0]
        try:
            urlopen(self.url, timeout=_PATIENCE).close()  # the download itself would wait for minutes
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(self.url, str(path), hash_prefix=self.digest)
        except (OSError, HTTPException, RuntimeError) as error:
            raise UserError(f"{path} does not exist and {self.url} cannot be fetched ({error}); {advice}") from error
        return path

    def check(self, path: Path) -> Path:
        """The path, if it holds these weights.

        Raises:
            UserError: there is no such file, or it holds something else.
        """
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"weights {str(path)!r} cannot be read: {error}") from error
        if digest != self.digest:
            raise UserError(
                f"{path} is not the file that published figures are made with: its sha256 begins with {digest[:8]}, "
                f"expected {self.digest[:8]}; the right one comes from {self.url}"
            )
        return path
