"""A view of a model in evaluation mode that leaves the model, which other threads may be using, unchanged."""

import copy
from collections import OrderedDict
from typing import TypeVar, cast

from torch import nn

from evotok_plugin.errors import UserError

M = TypeVar("M")


def evaluation_view(model: M) -> M:
    """Return the model if it is in evaluation mode, else a copy of its modules in that mode over the same parameters.

    `model.eval()` followed by `model.train()` would be visible to other threads, and two threads that do so can leave
    the model in the wrong mode.

    Raises:
        UserError: another library has replaced the `forward` of a part in training mode; it is bound to the original.
    """
    assert isinstance(model, nn.Module)  # the type of the generation mixins does not say so
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

    return cast(M, view(model))
