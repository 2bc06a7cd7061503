"""LPIPS (Zhang et al. 2018) from the `lpips` package, with VGG16 weights from torchvision's hub."""

import warnings

from torch import nn

from evotok_plugin.common.hub_files import HubFile
from evotok_plugin.errors import UserError

VGG16 = HubFile(
    names=("vgg16-397923af.pth",),
    url="https://download.pytorch.org/models/vgg16-397923af.pth",
    digest="397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
)
_WITHOUT = "or disable LPIPS: train with --lpips_weight 0, evaluate without lpips in --metrics"


def load_lpips() -> nn.Module:
    """Load the frozen LPIPS-VGG network.

    Returns:
        A module called as `lpips(a, b)` on images (B, 3, H, W) in [-1, 1], at least 16 pixels per side, with result
        (B, 1, 1, 1).

    Raises:
        UserError: the package or its weights are missing, or the weights are not the expected ones.
    """
    try:
        import lpips
    except ImportError:
        raise UserError(f"the package lpips is not installed: `pip install lpips`, {_WITHOUT}") from None
    VGG16.fetch(f"LPIPS needs the weights of VGG16: put the file there, {_WITHOUT}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips calls torchvision with deprecated arguments
        network = lpips.LPIPS(net="vgg", verbose=False)
    return network.eval().requires_grad_(False)
