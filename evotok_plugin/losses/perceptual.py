"""LPIPS (Zhang et al. 2018) through the `lpips` package; its VGG16 weights come from torchvision's hub."""

import warnings

from torch import nn

from evotok_plugin.common.hub_files import HubFile
from evotok_plugin.errors import UserError

VGG16 = HubFile(
    names=("vgg16-397923af.pth",),
    url="https://download.pytorch.org/models/vgg16-397923af.pth",
    digest="397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
)
_WITHOUT = "or do without LPIPS: train with --lpips_weight 0, evaluate without lpips among --metrics"


def load_lpips() -> nn.Module:
    """The frozen LPIPS-VGG network, called as `lpips(a, b)` on images (B, 3, H, W) in [-1, 1], at least 16 pixels a
    side; gives (B, 1, 1, 1).

    Raises:
        UserError: the package or its weights are not there, or the weights are others.
    """
    try:
        import lpips
    except ImportError:
        raise UserError(f"the package lpips is not installed: `pip install lpips`, {_WITHOUT}") from None
    VGG16.fetch(f"LPIPS needs VGG16's weights: put the file there, {_WITHOUT}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the way in which lpips calls torchvision
        network = lpips.LPIPS(net="vgg", verbose=False)
    return network.eval().requires_grad_(False)
