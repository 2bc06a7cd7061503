"""A model in evaluation mode without touching the model, which others may be using at the same time."""

import copy
from collections import OrderedDict
from typing import TypeVar

from torch import nn

from evotok_plugin.errors import UserError

M = TypeVar("M", bound=nn.Module)


def evaluation_view(model: M) -> M:
    """The model in evaluation mode: itself where it is in that mode already, else modules of its own over the same
    parameters.

    `model.eval()` followed by `model.train()` would be seen by every other thread, and two threads that do so leave the
    mode that the first one found half-way.

    Raises:
        UserError: a part whose `forward` another library has replaced in training mode; it is bound to the original.
    """
    if not any(module.training for module in model.modules()):
        return model
    views: dict[int, nn.Module] = {}

    def view(module: nn.Module) -> nn.Module:
        if id(module) not in views:
            if module is not model and "forward" in vars(module):
                raise UserError(
                    f"a {type(module).__name__} of the model runs code that is bound to its training mode (hooks of "
                    "another library); call model.eval() before drawing"
                )
            views[id(module)] = made = copy.copy(module)
            made.__dict__["training"] = False
            made.__dict__["_modules"] = {
                n: child if child is None else view(child) for n, child in module._modules.items()
            }
            for hooks in ("_forward_hooks", "_forward_pre_hooks"):
                made.__dict__[hooks] = OrderedDict(module.__dict__[hooks])
        return views[id(module)]

    return view(model)
