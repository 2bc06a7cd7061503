"""LPIPS (Zhang et al. 2018) through the `lpips` package; its VGG weights come from torchvision's hub."""

from torch import nn


def load_lpips() -> nn.Module:
    """The frozen LPIPS-VGG network, called as `lpips(a, b)` on images in [-1, 1].

    Raises:
        ValueError: the package or its weights are not there.
    """
    try:
        import lpips
    except ImportError:
        raise ValueError(
            "lpips_weight is above 0 but the package lpips is not installed: `pip install lpips`, or train without it "
            "(--lpips_weight 0, as the recipes tokenizer_tiny and tokenizer_photos do)"
        ) from None
    try:
        network = lpips.LPIPS(net="vgg", verbose=False)
    except OSError as error:
        raise ValueError(
            f"LPIPS needs torchvision's VGG16 weights, which could not be fetched ({error}); "
            "put vgg16-397923af.pth into ~/.cache/torch/hub/checkpoints, or train with --lpips_weight 0"
        ) from error
    return network.eval().requires_grad_(False)
