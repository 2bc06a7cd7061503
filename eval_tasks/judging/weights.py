"""Sources of judges and prompt lists: local paths, or repositories of the hub, downloaded before anything is drawn."""

from collections.abc import Sequence
from pathlib import Path

from evotok_plugin.common.files import user_path
from evotok_plugin.errors import UserError

TRANSFORMERS_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


def fetch(
    source: str, what: str, option: str, files: Sequence[str] = TRANSFORMERS_FILES, *, dataset: bool = False
) -> Path:
    """Return a local path as it is, or the local copy of a repository of the hub.

    Args:
        source: path of a file or folder, or `owner/name` or `owner/name@revision` on the hub.
        what: for the error: a description of the source.
        option: for the error: the environment variable that sets the source.
        files: patterns of the files to fetch.
        dataset: whether the repository holds a data set.

    Raises:
        UserError: the path does not exist, and the hub does not provide it.
    """
    path = user_path(source)
    if path.exists():
        return path
    repository, _, revision = source.partition("@")
    wanted = f"{repository}{f' --revision {revision}' if revision else ''}"
    local = f"hf download {wanted}{' --repo-type dataset' if dataset else ''} --local-dir DIR"
    advice = f"download it on a machine with network access with `{local}`, then set {option}=DIR"
    if source.count("/") != 1 or source.startswith((".", "~", "/")):
        raise UserError(f"{what}: {source!r} does not exist; set {option} to a path or to owner/name on the hub")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            repository,
            repo_type="dataset" if dataset else "model",
            revision=revision or None,
            allow_patterns=list(files),
            etag_timeout=5,
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{what}: {source} is not a local path, and the hub does not provide it ({reason}); {advice}"
        ) from error
    return Path(folder)


def require_weights(folder: Path, what: str, config: str = "config.json") -> Path:
    """Check that a folder holds a model's configuration and safetensors, and return it.

    Raises:
        UserError: the folder or one of these files is missing.
    """
    if not folder.is_dir() or not (folder / config).is_file():
        raise UserError(f"{what}: {folder} must be a folder with {config}")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{what}: {folder} has no *.safetensors; pickled weights are not read, convert them first")
    return folder
