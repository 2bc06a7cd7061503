"""Keeps adapters of peft out of the image tokenizer inside a model.

peft selects layers by type or name (`target_modules="all-linear"`, `["q_proj", "v_proj"]`), which includes layers of
the tokenizer. Adapters there would never learn, because the tokenizer runs without gradients, but every adapter file
would contain them. A model cannot tell peft to exclude a part, so the part keeps its layers when they are replaced.
"""

from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

_MARK = "_takes_no_adapters"


def keep_adapters_out(module: nn.Module) -> None:
    """Make a module and all its parts keep their layers when peft replaces them by layers with adapters."""
    for part in module.modules():
        part.__dict__[_MARK] = True  # copies of a module have it, too


def _keep_layer(parent: nn.Module, name: str, layer: nn.Module | None) -> Any:
    """Return the present layer instead of one with an adapter; PyTorch calls this before it registers a layer."""
    if parent.__dict__.get(_MARK) and type(layer).__module__.startswith("peft."):
        return parent._modules.get(name)
    return None  # PyTorch then registers `layer`


register_module_module_registration_hook(_keep_layer)
