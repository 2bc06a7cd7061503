"""The Inception network of FID, as provided by torch-fidelity."""

import io
from pathlib import Path

from torch import nn

from evotok_plugin.common.hub_files import HubFile
from evotok_plugin.errors import UserError

INCEPTION = HubFile(
    names=("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"),
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    digest="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)
INCEPTION_DIM = 2048
_WITHOUT = "or evaluate without rfid among --metrics"


def load_inception(weights: str | Path | None = None) -> nn.Module:
    """Load the frozen network, which maps images (B, 3, H, W) in uint8 to a tuple of one: pool features (B, 2048).

    Args:
        weights: the weights file; by default it is searched in torch's hub folder and downloaded if missing.

    Raises:
        UserError: torch-fidelity is not installed, or the weights are missing or do not match the expected digest.
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
