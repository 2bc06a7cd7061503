"""A view of a model whose large linear layers are `ThinLinear`, for generation on a CPU."""

import copy
from typing import TypeVar, cast

from torch import nn

from evotok_plugin.kernels.thin_linear import ThinLinear, can_be_thin

M = TypeVar("M")


def thin_view(model: M) -> M:
    """Return a copy of the modules over the same parameters in which the layers that gain from it are `ThinLinear`.

    The model itself is not changed: it can be saved, merged, copied, pickled and trained while the view is in use.
    Modules without such a layer are shared with the model. So are those whose `forward` another library has replaced,
    with all their parts: it is bound to the original. Returns the model if no layer gains.
    """
    assert isinstance(model, nn.Module)  # the type of the generation mixins does not say so
    views: dict[int, nn.Module] = {}

    def view(module: nn.Module) -> nn.Module:
        if id(module) not in views:
            views[id(module)] = _view_of(module)
        return views[id(module)]

    def _view_of(module: nn.Module) -> nn.Module:
        if can_be_thin(module):
            assert isinstance(module, nn.Linear)
            return ThinLinear.of(module)
        if "forward" in vars(module):
            return module
        children = {name: child if child is None else view(child) for name, child in module._modules.items()}
        if all(children[name] is child for name, child in module._modules.items()):
            return module
        made = copy.copy(module)
        made.__dict__["_modules"] = children
        return made

    return cast(M, view(model))
