"""Linear layers over few rows on a CPU.

PyTorch gives such products to MKL, which for 2 to 32 rows reads a large weight at a half or a third of the rate at
which oneDNN, which PyTorch carries too, does (on an AMD EPYC; `scripts/benchmark/generation.py` shows the effect).
"""

import torch
from torch import Tensor, nn


def thin_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """What `layer(x)` gives, x (..., D) with few rows, to rounding; without gradients.

    Where oneDNN does not apply (another device or dtype, another kind of layer) it is `layer(x)`.
    """
    plain = type(layer) is nn.Linear and layer.weight.dtype == x.dtype == torch.float32
    if not (plain and x.device.type == "cpu" and torch.backends.mkldnn.is_available()) or torch.is_grad_enabled():
        return layer(x)
    rows = x.reshape(-1, x.shape[-1]).to_mkldnn()
    product = torch.ops.aten.mkldnn_linear(rows, layer.weight, layer.bias)
    return product.to_dense().view(*x.shape[:-1], layer.out_features)
