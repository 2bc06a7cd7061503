"""FID's Inception network, as torch-fidelity keeps it, and statistics of real images that need not be made twice."""

import hashlib
import io
import logging
import os
from pathlib import Path

import numpy as np
from torch import nn

from evotok_plugin.common.hub_files import HubFile
from evotok_plugin.data import images
from evotok_plugin.data.sources import ImageSource, stamps_of
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
_WITHOUT = "or evaluate without rfid among --metrics"
_SAMPLED = 16  # images whose pixels are part of a cache entry's name


def load_inception(weights: str | Path | None = None) -> nn.Module:
    """The frozen network: images (B, 3, H, W), uint8, to a tuple of one, the pool features (B, 2048).

    Args:
        weights: the weights file; without it torch's hub folder is looked into, and the file is downloaded to it.

    Raises:
        UserError: torch-fidelity is not installed, the weights are not there, or they are others.
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
    """Where statistics of real images are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evotok" / "inception"


def spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of the numbers 0..count-1, evenly spread, first and last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(int)).tolist()


class StatisticsCache:
    """Inception statistics of a source's images, kept in a file from run to run.

    The file is named by a hash over the number, the keys and the stamps (place, size, times) of the images, their size,
    the network's weights, the version of the image reader, and the pixels of 16 images spread over the source.
    """

    def __init__(self, folder: Path, source: ImageSource, processor: EvoTokImageProcessor) -> None:
        self.path = folder / f"{_identity(source, processor)}.safetensors"
        self._num_images = len(source)

    def load(self) -> FeatureStatistics | None:
        """What is kept; None if nothing is, or nothing that can be used."""
        if not self.path.is_file():
            return None
        try:
            return FeatureStatistics.load(self.path, INCEPTION_DIM)
        except ValueError as error:
            logger.warning("%s; it will be made again", error)
            return None

    def save(self, statistics: FeatureStatistics) -> None:
        """Keep them, if they are of the whole source; where there is no place to, the run goes on."""
        if int(statistics.count) != self._num_images:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            statistics.save(self.path)
        except OSError as error:
            logger.warning("statistics of the real images cannot be kept: %s", error)


def _identity(source: ImageSource, processor: EvoTokImageProcessor) -> str:
    facts = f"2 {images.READER_VERSION} {len(source)} {processor.size} {INCEPTION.digest}"
    digest = hashlib.sha256(facts.encode())
    for index in range(len(source)):
        digest.update(source.key(index).encode(errors="surrogateescape") + b"\0")
    digest.update(stamps_of(source, range(len(source))).tobytes())
    for index in spread(len(source), _SAMPLED):
        try:
            digest.update(as_bytes(processor.crop(source.picture(index))).numpy().tobytes())
        except ValueError:
            digest.update(b"broken")
    return digest.hexdigest()[:32]
