"""A view of a model with faster layers for few rows, for generation on a CPU."""

import copy
from collections import OrderedDict
from typing import TypeVar, cast

from torch import nn

from evotok_plugin.kernels.thin_linear import ThinLinear, can_be_thin
from llava_ext.generation.fused_layers import can_be_fused, fused
from llava_ext.generation.fused_model import can_fuse_model, fused_model

M = TypeVar("M")


def thin_view(model: M) -> M:
    """Return a copy of the modules over the same parameters, with `FusedModel`, `FusedLayer` and
    `ThinLinear` where they apply.

    The model itself is not changed: it can be saved, merged, copied, pickled and trained while the view is in use.
    Parts without such a layer are shared with the model. So are modules whose `forward` another library has replaced,
    with all their parts: it is bound to the original. Returns the model if nothing applies.
    """
    assert isinstance(model, nn.Module)  # the type of the generation mixins does not say so
    views: dict[int, nn.Module] = {}

    def view(module: nn.Module) -> nn.Module:
        if id(module) not in views:
            views[id(module)] = made = view_of(module)
            views[id(made)] = made
        return views[id(module)]

    def view_of(module: nn.Module) -> nn.Module:
        if can_be_thin(module):
            assert isinstance(module, nn.Linear)
            return ThinLinear.of(module)
        if "forward" in vars(module):
            return module
        children = {name: child if child is None else view(child) for name, child in module._modules.items()}
        fuse = can_be_fused(module)
        if not fuse and all(children[name] is child for name, child in module._modules.items()):
            return module
        made = copy.copy(module)
        made.__dict__["_modules"] = children
        for hooks in ("_forward_hooks", "_forward_pre_hooks"):
            made.__dict__[hooks] = OrderedDict(module.__dict__[hooks])
        if can_fuse_model(module, children.get("layers")):
            return fused_model(made, module)
        return fused(made, module) if fuse else made

    return cast(M, view(model))
