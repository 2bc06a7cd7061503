"""Cache of Inception statistics of real images, which are the same in every evaluation on a source."""

import hashlib
import logging
from pathlib import Path

from evotok_plugin.data import images
from evotok_plugin.data.sources import ImageSource, evenly_spread, stamps_of
from evotok_plugin.errors import UserError
from evotok_plugin.image_processing_evotok import EvoTokImageProcessor, as_bytes
from evotok_plugin.metrics.frechet import FeatureStatistics
from evotok_plugin.metrics.inception import INCEPTION, INCEPTION_DIM

logger = logging.getLogger(__name__)

_SAMPLED = 16  # images whose pixels are part of the file's name


class StatisticsCache:
    """Inception statistics of a source's images, stored in a file.

    The file is named by a hash of the number, keys and stamps (location, size, times) of the images, the image size,
    the digest of the network's weights, the version of the image reader, and the pixels of 16 evenly spread images.
    """

    def __init__(self, folder: Path, source: ImageSource, processor: EvoTokImageProcessor) -> None:
        self.path = folder / f"{_identity(source, processor)}.safetensors"
        self._num_images = len(source)

    def load(self) -> FeatureStatistics | None:
        """Read the stored statistics; None if there is no usable file."""
        if not self.path.is_file():
            return None
        try:
            return FeatureStatistics.load(self.path, INCEPTION_DIM)
        except UserError as error:
            logger.warning("%s; the statistics are recomputed", error)
            return None

    def save(self, statistics: FeatureStatistics) -> None:
        """Store statistics of all images of the source; if they cannot be written, only log a warning."""
        if int(statistics.count) != self._num_images:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            statistics.save(self.path)
        except (OSError, UserError) as error:
            logger.warning("statistics of the real images cannot be stored: %s", error)


def _identity(source: ImageSource, processor: EvoTokImageProcessor) -> str:
    facts = f"2 {images.READER_VERSION} {len(source)} {processor.size} {INCEPTION.digest}"
    digest = hashlib.sha256(facts.encode())
    for index in range(len(source)):
        digest.update(source.key(index).encode(errors="surrogateescape") + b"\0")
    digest.update(stamps_of(source, range(len(source))).tobytes())
    for index in evenly_spread(len(source), _SAMPLED):
        try:
            digest.update(as_bytes(processor.crop(source.picture(index))).numpy().tobytes())
        except UserError:
            digest.update(b"broken")
    return digest.hexdigest()[:32]
