"""Linear layers over few rows on a CPU.

PyTorch computes such products with MKL, which for 2 to 32 rows reads a large weight at only a half to a third of the
rate of oneDNN, which PyTorch also includes (on an AMD EPYC; `scripts/benchmark/generation.py` measures the effect).
"""

import torch
from torch import Tensor, nn


def thin_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """Compute `layer(x)` up to rounding for x (..., D) with few rows.

    Calls the layer itself if gradients are enabled or oneDNN does not apply (another device, dtype or kind of layer).
    """
    if type(layer) is not nn.Linear or not layer.weight.dtype == x.dtype == torch.float32:
        return layer(x)
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available() or torch.is_grad_enabled():
        return layer(x)
    rows = x.reshape(-1, x.shape[-1]).to_mkldnn()
    product = torch.ops.aten.mkldnn_linear(rows, layer.weight, layer.bias)
    return product.to_dense().view(*x.shape[:-1], layer.out_features)
