"""The options of encoding images into a code cache."""

from dataclasses import dataclass

from evotok_plugin.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EncodingOptions:
    """Options of encoding.

    Attributes:
        shard_size: images per shard; a killed process loses its unfinished shard.
        batch_size: images encoded at once.
        num_workers: processes that decode images while others are encoded; 0 alternates in one process.
        max_bad_fraction: share of broken images that is tolerated.
        retry_broken: whether to retry images that earlier runs could not read.

    Raises:
        UserError: a number is out of range.
    """

    shard_size: int = 4096
    batch_size: int = 64
    num_workers: int = 2
    max_bad_fraction: float = 0.001
    retry_broken: bool = False
    show_progress: bool = True

    def __post_init__(self) -> None:
        for name, least in (("shard_size", 1), ("batch_size", 1), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f"max_bad_fraction must be between 0 and 1, got {self.max_bad_fraction}")
