"""The vision tower in plain PyTorch: images in, semantic features out; requires only torch, safetensors, PIL and numpy.

It runs in environments whose transformers the rest of the project does not support, and shares its parts and their
weight names with `EvoTokModel`.

B images, N positions, D semantic_dim.
"""

import contextlib
import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evotok_plugin.common.weight_checks import HARMLESS, check_names, check_values
from evotok_plugin.common.weight_files import is_model_folder, named_weights, read_config
from evotok_plugin.encoder import EvoTokEncoder
from evotok_plugin.errors import UserError
from evotok_plugin.image_preparation import check_pixel_range, to_signed_range
from evotok_plugin.quantizers.choice import build_quantizer
from evotok_plugin.semantic_decoder import SemanticDecoder
from evotok_plugin.tokenizer_settings import TokenizerSettings, recorded_semantics

_TOKENIZER, _TOWER = "evotok", "evotok_vision"
_WITH_TOWER = "vision_config"  # key in the config.json of a model that contains a tower
_UNUSED = ("pixel_decoder.",)
_PREFIX = re.compile(r"^(?:model\.)?vision_tower\.")  # of the weights of a model that contains a tower
_MARK = "_is_hf_initialized"  # transformers does not initialize tensors and modules with this attribute


@dataclass(repr=False, eq=False)
class TowerSettings(TokenizerSettings):
    """Settings of a tokenizer, with the names that LLaVA reads.

    Attributes:
        pixel_range: values of a black and of a white pixel. With (0, 1) the tower accepts images in that range.
    """

    pixel_range: Sequence[float] = (-1.0, 1.0)

    @property
    def hidden_size(self) -> int:
        """D, width of the features."""
        return self.semantic_dim


def is_evotok_folder(name: "str | Path | None") -> bool:
    """Whether this is the folder of a tokenizer, of a tower, or of a model that contains an EvoTok tower."""
    if not name or not is_model_folder(name):
        return False
    try:
        return _tower_values(name).get("model_type") in (_TOKENIZER, _TOWER)
    except UserError:  # the folder of another tower may hold anything; LLaVA reports what is wrong with it
        return False


def read_settings(folder: "str | Path", pixel_range: "Sequence[float] | None" = None) -> TowerSettings:
    """Read the settings of the tower in a folder.

    Args:
        pixel_range: replaces that of the folder.

    Raises:
        UserError: config.json is missing or damaged, holds values that do not fit, or describes another model; or the
            semantic decoder was not trained.
    """
    values = _tower_values(folder)
    if values.get("model_type") not in (_TOKENIZER, _TOWER):
        raise UserError(
            f"{str(folder)!r} holds a {values.get('model_type', 'nameless')} vision tower, expected {_TOKENIZER} or "
            f"{_TOWER}; give the folder of a tokenizer"
        )
    trained = recorded_semantics(folder, values)
    known = {field.name for field in fields(TowerSettings)}
    settings = TowerSettings(**{key: value for key, value in values.items() if key in known})
    if trained is not None:
        settings.semantic_decoder_trained = trained
    if pixel_range is not None:
        settings.pixel_range = pixel_range
    try:
        settings.check()
        check_pixel_range(settings.pixel_range)
    except UserError as error:
        raise UserError(f"{Path(folder) / 'config.json'} cannot be used: {error}") from error
    settings.require_semantics(repr(str(folder)))
    return settings


def _tower_values(folder: "str | Path") -> dict[str, Any]:
    values = read_config(folder)
    inner = values.get(_WITH_TOWER)
    return inner if isinstance(inner, dict) else values


def _read_weights(folder: "str | Path") -> dict[str, Tensor]:
    """The weights of the tower in a folder by their names in a tokenizer."""
    weights = {}
    is_part = isinstance(read_config(folder).get(_WITH_TOWER), dict)
    with torch.device("cpu"):  # LLaVA may build the tower while another default device is set
        for name, _, load in named_weights(folder):
            own = _PREFIX.sub("", name)
            if (is_part and own == name) or own.startswith(_UNUSED) or any(re.search(p, own) for p in HARMLESS):
                continue
            weights[own] = load()
            if not weights[own].is_floating_point():
                raise UserError(f"{str(folder)!r} holds integers as {name}, expected floating-point weights")
    return weights


def _gathered(parameters: "list[nn.Parameter]") -> "contextlib.AbstractContextManager[Any]":
    """Give access to the values of parameters that DeepSpeed's ZeRO stage 3 has split."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return contextlib.nullcontext()
    return importlib.import_module("deepspeed").zero.GatheredParameters(parameters, modifier_rank=0)


class TowerNetwork(nn.Module):
    """Encoder, code search and semantic decoder of an EvoTok folder; images (B, 3, H, W) -> features (B, N, D).

    The weights come from the folder, also if the network is built inside `from_pretrained` of another model. That
    would create parameters without values, and initialize those that are not in its checkpoint at random. Codebooks
    always come from the folder, stay in float32 and are never updated; a trained encoder gets the gradient of the
    quantizer.

    Raises:
        UserError: files are missing or damaged, or weights are missing, unexpected, of another shape or not finite.
    """

    def __init__(self, folder: "str | Path", settings: TowerSettings) -> None:
        super().__init__()
        self.folder, self.config = str(folder), settings
        self.encoder = EvoTokEncoder(settings)
        # Not part of the state dict: a host must neither round nor replace codebooks.
        self.quantizer = build_quantizer(settings).fix(persistent=False)
        self.semantic_decoder = SemanticDecoder(settings)
        for module in self.modules():
            if module is not self:
                setattr(module, _MARK, True)
        self._fill(dict(self._tensors()))
        self.eval()

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.named_parameters()
        yield from self.named_buffers()

    @torch.no_grad()
    def _fill(self, wanted: Mapping[str, Tensor]) -> None:
        """Set tensors to the values of the folder; those without memory are replaced."""
        weights = _read_weights(self.folder)
        with _gathered(list(self.parameters())):
            check_names(dict(self._tensors()), weights, repr(self.folder))
            check_values(weights, repr(self.folder))
            for name, tensor in wanted.items():
                self._set(name, tensor, weights[name])

    def _set(self, name: str, tensor: Tensor, value: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        module, is_parameter = self.get_submodule(path), isinstance(tensor, nn.Parameter)
        value = value.to(tensor.dtype if is_parameter else torch.float32)
        if not tensor.is_meta and tensor.dtype == value.dtype:
            tensor.copy_(value)
        elif is_parameter:  # not by assignment: accelerate replaces the method that registers parameters
            module._parameters[leaf] = nn.Parameter(value, tensor.requires_grad)
        else:
            module._buffers[leaf] = value if tensor.is_meta else value.to(tensor.device)
        setattr(getattr(module, leaf), _MARK, True)

    @property
    def _is_hf_initialized(self) -> bool:
        """Read by transformers, after it has loaded a checkpoint, to decide whether to initialize this module.

        transformers 5 has by then replaced the buffers and all weights that the checkpoint lacks by new tensors without
        values, and marked those that it has loaded. transformers 4 leaves both in place.
        """
        if not all(hasattr(buffer, _MARK) for buffer in self.quantizer.buffers()):
            self._fill({name: tensor for name, tensor in self._tensors() if not getattr(tensor, _MARK, False)})
        return True

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value: bool) -> None:
        pass  # transformers sets it after it has asked

    def train(self, mode: bool = True) -> "TowerNetwork":
        """Set the mode of all parts but the quantizer, which stays in evaluation mode so that codebooks do not move."""
        super().train(mode)
        self.quantizer.eval()
        return self

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Semantic features (B, N, D) of images (B, 3, H, W) in the `pixel_range` of the settings.

        Raises:
            ValueError: height or width is not a multiple of the patch size.
        """
        grid, depth = self.config.grid_of(pixel_values.shape), self.config.semantic_depth
        pixel_values = to_signed_range(pixel_values, self.config.pixel_range).to(self.device, self.dtype)
        quantized = self.quantizer(self.encoder(pixel_values), depth)
        return self.semantic_decoder(quantized.latents_at(depth).to(self.dtype), grid)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights; codebooks are always in float32."""
        return self.semantic_decoder.class_token.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.semantic_decoder.class_token.device
