"""Networks of timm as teachers: `timm:NAME`, or `timm:NAME:FILE` with the weights in a safetensors file.

Layers are indices of timm's `forward_intermediates`: the stages of a CNN, the blocks of a ViT.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from evotok_plugin.common.foreign_files import reading
from evotok_plugin.common.weight_checks import load_strictly
from evotok_plugin.errors import UserError
from evotok_plugin.teachers.tower import TeacherTower

PREFIX = "timm:"


class TimmTower(TeacherTower):
    """A network of timm with `forward_intermediates`; `network_name` is its name in timm."""

    def __init__(self, network: Any, network_name: str, name: str) -> None:
        super().__init__()
        self.network, self.network_name, self.name = network.eval().requires_grad_(False), network_name, name
        self._info = (
            network.feature_info.get_dicts() if hasattr(network.feature_info, "get_dicts") else network.feature_info
        )
        is_vit = len({one["reduction"] for one in self._info}) == 1 and len(self._info) > 1
        self.default_layer = -2 if is_vit else -1
        self.set_normalization(network.pretrained_cfg["mean"], network.pretrained_cfg["std"])
        self.layers = (self.default_layer % self.num_layers,)

    @property
    def num_layers(self) -> int:
        return len(self._info)

    def stride(self, layer: int) -> int:
        return int(self._info[layer]["reduction"])

    def width(self, layer: int) -> int:
        return int(self._info[layer]["num_chs"])

    def keep_layers(self, layers: Sequence[int]) -> None:
        for layer in layers:
            self.check_layer(layer)
        self.layers = tuple(layer % self.num_layers for layer in layers)

    def used_weights(self) -> dict[str, Tensor]:
        return dict(self.network.state_dict())

    def feature_maps(self, pixels: Tensor) -> list[Tensor]:
        wanted = sorted(set(self.layers))
        maps = self.network.forward_intermediates(
            pixels, indices=wanted, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        by_layer = dict(zip(wanted, maps, strict=True))
        return [by_layer[layer] for layer in self.layers]


def create_timm_network(name: str, **options: Any) -> Any:
    """Create a network of timm by its name.

    Raises:
        UserError: timm is not installed or does not have the network, or it has no `forward_intermediates`.
    """
    try:
        import timm
    except ImportError as error:
        raise UserError(f"timm:{name} requires timm: pip install timm") from error
    try:
        try:  # ViTs interpolate their position embeddings with this option; CNNs do not have it
            network = timm.create_model(name, num_classes=0, dynamic_img_size=True, **options)
        except TypeError:
            network = timm.create_model(name, num_classes=0, **options)
    except Exception as error:  # timm raises errors of many types for unknown names and failed downloads
        raise UserError(
            f"timm cannot create {name!r}: {error}; timm.list_models() lists the names, timm:NAME:FILE takes the "
            "weights from a safetensors file"
        ) from error
    if not hasattr(network, "forward_intermediates"):
        raise UserError(f"timm's {name} does not give the features of its layers (forward_intermediates); use another")
    return network


def load_timm_tower(spec: str) -> TimmTower:
    """Load the teacher `timm:NAME` (weights from the hub) or `timm:NAME:FILE` (weights from a file).

    Raises:
        UserError: the network does not exist, or the weights are missing, damaged or do not fit.
    """
    from safetensors.torch import load_file

    name, _, file = spec.removeprefix(PREFIX).partition(":")
    if not file:
        return TimmTower(create_timm_network(name, pretrained=True), name, spec)
    if not file.endswith(".safetensors"):
        raise UserError(
            f"{file}: expected weights in a safetensors file; convert others first (docs/teachers.md has the command), "
            "since opening a pickled file can run code"
        )
    if not Path(file).is_file():
        raise UserError(f"{file} does not exist; expected a safetensors file with the weights of {name}")
    network = create_timm_network(name, pretrained=False)
    with reading(file):
        weights = load_file(file)
    # num_classes=0 removes the classifier.
    head = network.pretrained_cfg.get("classifier") or "classifier"
    heads = tuple(f"{one}." for one in ([head] if isinstance(head, str) else head))
    weights = {key: value for key, value in weights.items() if not key.startswith(heads)}
    load_strictly(network, weights, file, f"give the weights of timm's {name}")
    return TimmTower(network, name, spec)
