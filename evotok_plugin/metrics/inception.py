"""The Inception network of rFID, from torch-fidelity, and a cache of the statistics of real images."""

import hashlib
import io
import logging
from pathlib import Path

import numpy as np
from torch import nn

from evotok_plugin.common.files import cache_folder, writing
from evotok_plugin.common.hub_files import HubFile
from evotok_plugin.data import images
from evotok_plugin.data.code_cache.ledger import stamps_of
from evotok_plugin.data.sources import ImageSource
from evotok_plugin.errors import UserError
from evotok_plugin.image_processing_evotok import EvoTokImageProcessor, as_bytes
from evotok_plugin.metrics.frechet import FeatureStatistics

logger = logging.getLogger(__name__)

INCEPTION = HubFile(
    names=("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"),
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    digest="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)
INCEPTION_DIM = 2048
_WITHOUT = "or evaluate without rfid in --metrics"
_SAMPLED = 16  # images whose pixels are hashed for the name of a cache entry


def load_inception(weights: str | Path | None = None) -> nn.Module:
    """Load the frozen network, which maps uint8 images (B, 3, H, W) to a tuple with the pool features (B, 2048).

    Args:
        weights: the weights file; by default the one in torch's hub folder, which is downloaded if necessary.

    Raises:
        UserError: torch-fidelity is not installed, or the weights are missing or not the expected ones.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise UserError(f"torch-fidelity is not installed: `pip install torch-fidelity`, {_WITHOUT}") from None
    if weights is None:
        path = INCEPTION.fetch(f"put the file there, name it with --inception_weights FILE, {_WITHOUT}")
    else:
        path = INCEPTION.check(Path(weights))
    content = io.BytesIO(path.read_bytes())
    return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=content)


def default_cache_folder() -> Path:
    """Default folder for cached statistics of real images."""
    return cache_folder("inception")


def spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of the numbers 0..count-1, evenly spaced, including the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(int)).tolist()


class StatisticsCache:
    """Inception statistics of a source's images, cached in a file between runs.

    The file is named by a hash over the number of images, their keys and stamps (path, size, times), the processor's
    size, the network's weights, the version of the image reader, and the pixels of 16 images spread over the source.
    """

    def __init__(self, folder: Path, source: ImageSource, processor: EvoTokImageProcessor) -> None:
        self.path = folder / f"{_identity(source, processor)}.safetensors"
        self._num_images = len(source)

    def load(self) -> FeatureStatistics | None:
        """Read the cached statistics; None if there are none or they are damaged."""
        if not self.path.is_file():
            return None
        try:
            return FeatureStatistics.load(self.path, INCEPTION_DIM)
        except UserError as error:
            logger.warning("%s; computing the statistics again", error)
            return None

    def save(self, statistics: FeatureStatistics) -> None:
        """Cache statistics of all images of the source; logs a warning if the file cannot be written."""
        if int(statistics.count) != self._num_images:
            return
        try:
            with writing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
            statistics.save(self.path)
        except UserError as error:
            logger.warning("statistics of the real images are not cached: %s", error)


def _identity(source: ImageSource, processor: EvoTokImageProcessor) -> str:
    facts = f"2 {images.READER_VERSION} {len(source)} {processor.size} {INCEPTION.digest}"
    digest = hashlib.sha256(facts.encode())
    for index in range(len(source)):
        digest.update(source.key(index).encode(errors="surrogateescape") + b"\0")
    digest.update(stamps_of(source, range(len(source))).tobytes())
    for index in spread(len(source), _SAMPLED):
        try:
            digest.update(as_bytes(processor.crop(source.picture(index))).numpy().tobytes())
        except ValueError:  # of our reader, or of the library behind the source
            digest.update(b"broken")
    return digest.hexdigest()[:32]
