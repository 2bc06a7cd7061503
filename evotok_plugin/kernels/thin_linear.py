"""Linear layers over few rows on a CPU.

PyTorch computes such products with MKL. On an AMD EPYC it reads a large weight at a fraction of the memory's rate for 2
to 64 rows, on an Intel Xeon for 4 to 64 (`scripts/benchmark/linear_layers.py` measures it). oneDNN, which PyTorch also
includes, is faster, and faster still if it has a copy of the weight in its own layout: a packed weight. Packing takes
as long as about 16 products, so only a layer that is used again and again packs its weight. Packed weights are kept for
later answers of the same model while they take little of the memory.

R rows.
"""

import copy
import functools
import platform
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary


def _is_intel(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU is one of Intel's, for which MKL has its fastest kernels."""
    try:
        with cpuinfo.open(encoding="ascii", errors="replace") as file:
            return "GenuineIntel" in file.read(256)  # of the first core: on a large machine all take a while
    except OSError:  # not Linux
        return "GenuineIntel" in platform.processor()


@dataclass(frozen=True)
class Limits:
    """Where oneDNN is faster than PyTorch's linear layers in float32: by the elements of a weight, and by rows."""

    min_elements: int
    min_rows: int


_OTHERS, _INTEL_WITH_MKL = Limits(2**18, 1), Limits(1_000_000, 4)
LIMITS = _INTEL_WITH_MKL if torch.backends.mkl.is_available() and _is_intel() else _OTHERS
JOINED_ELEMENTS = 2**18  # of all weights that are joined without packing; more would take memory and save little time
MAX_ROWS = 128  # the largest number that was measured
PACK_AFTER = 16  # products
_PACKED_ROWS = 4  # oneDNN reads a packed weight faster for 4 rows than for 1 or 2: missing rows are zeros
_TYPICAL_ROWS = 16  # packing for any number between 2 and 32 gives the same layout
_RESERVE = 2**30  # bytes of memory that packing leaves free
_ALWAYS_FITS = 2**20  # bytes
_KEPT_SHARE = 0.25  # of the available memory, which packed weights may take after an answer

State = list[tuple[int, int]]


@dataclass(frozen=True)
class PackedWeights:
    """The rows of one or several weights in oneDNN's layout, and what tells whether the weights have changed since.

    PyTorch counts its own in-place operations, but not those on `weight.data`. Whatever is kept is therefore compared
    by a product with a fixed vector, which takes as long as reading the weights once.
    """

    packed: Tensor
    state: State
    products: list[Tensor]
    weights: list[weakref.ref[Tensor]]

    @classmethod
    def of(cls, weights: Sequence[Tensor]) -> "PackedWeights":
        """Pack the rows of weights (n, in_features) one after the other."""
        detached = [weight.detach() for weight in weights]
        packed = _pack(detached[0] if len(detached) == 1 else torch.cat(detached))
        return cls(packed, states(weights), [_probe(one) for one in weights], [weakref.ref(one) for one in weights])

    def belongs_to(self, weights: Sequence[Tensor]) -> bool:
        """Whether it was packed from these weights as they are now."""
        return (
            len(weights) == len(self.weights)
            and all(known() is one for known, one in zip(self.weights, weights, strict=True))
            and self.state == states(weights)
            and all(torch.equal(_probe(one), old) for one, old in zip(weights, self.products, strict=True))
        )


class KeptWeights:
    """Packed weights for later answers, by the first weight, as long as that exists; for several threads."""

    def __init__(self) -> None:
        self._kept, self._lock = WeakIdKeyDictionary(), threading.Lock()

    def find(self, weights: Sequence[Tensor]) -> PackedWeights | None:
        """Return what was packed from these weights if they are unchanged."""
        with self._lock:
            found = self._kept.get(weights[0])
        if found is None or found.belongs_to(weights):
            return found
        with self._lock:
            self._kept.pop(weights[0], None)
        return None

    def put(self, weights: Sequence[Tensor], packed: PackedWeights) -> None:
        """Keep packed weights if all that are kept take at most a quarter of the memory that would be available."""
        with self._lock:
            taken = sum(one.packed.nbytes for one in self._kept.values()) + _num_bytes(weights)
            if taken <= _KEPT_SHARE * (available_memory() + taken):
                self._kept[weights[0]] = packed

    def clear(self) -> None:
        """Free all that no layer is using."""
        with self._lock:
            self._kept.clear()


single_weights, joined_weights = KeptWeights(), KeptWeights()


class ThinLinear(nn.Linear):
    """A linear layer that computes products of few rows with oneDNN; equal to `nn.Linear` up to rounding.

    It shares the parameters of the layer that it was made from and is meant for inference: calls with gradients, under
    autocast or with many rows are those of `nn.Linear`.
    """

    _num_products: int
    _packed: Tensor | None
    _packed_from: tuple[int, int] | None  # address and version of the weight when it was packed

    @classmethod
    def of(cls, layer: nn.Linear) -> "ThinLinear":
        """Make a layer over the same parameters; `layer` itself is not changed."""
        made = copy.copy(layer)
        made.__class__ = cls
        thin = cast(ThinLinear, made)
        thin._num_products, thin._packed, thin._packed_from = 0, None, None
        return thin

    def forward(self, x: Tensor) -> Tensor:
        num_rows = x.numel() // self.in_features
        if (
            not min_rows(self.weight.dtype) <= num_rows <= MAX_ROWS
            or x.dtype != self.weight.dtype
            or x.device.type != "cpu"
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
        ):
            return super().forward(x)
        self._num_products += 1
        packed = self._packed_weight()
        if packed is None:
            return _unpacked_product(x, self.weight, self.bias)
        product = _packed_product(x.reshape(num_rows, self.in_features), packed, self.bias)
        return product.reshape(*x.shape[:-1], self.out_features)

    def _packed_weight(self) -> Tensor | None:
        """The packed weight, once the layer has been used often enough and while memory suffices."""
        (state,) = states([self.weight])
        if self._packed_from not in (None, state):  # the weight has changed since
            self._num_products, self._packed, self._packed_from = 1, None, None
        if self._packed_from is None and self._num_products == 1:
            found = single_weights.find([self.weight])
            if found is not None:
                self._packed_from, self._packed = state, found.packed
        if self._packed_from is None and self._num_products > PACK_AFTER:
            self._packed_from = state
            if _has_room(self.weight.nbytes):
                made = PackedWeights.of([self.weight])
                single_weights.put([self.weight], made)
                self._packed = made.packed
        return self._packed


class JoinedLinear:
    """Several linear layers with the same input, computed as one product of few rows; for inference.

    Small layers are joined at the first call, large ones when their weights are packed. Layers between the two limits,
    and large ones for so few rows that oneDNN is not faster, are called one after the other.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self._layers, self._num_products = layers, 0
        num_elements = sum(layer.weight.numel() for layer in layers)
        self._is_large = num_elements >= LIMITS.min_elements
        self._can_join = self._is_large or num_elements < JOINED_ELEMENTS
        self._parameters = [layer._parameters for layer in layers]  # faster to search than the layers' attributes
        self._weight: Tensor | None = None  # joined, and packed if it is large
        self._bias: Tensor | None = None
        self._is_packed = False
        self._joined_from: State | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return the outputs for x (R, D), one after the other: (R, sum of the widths)."""
        if not self._can_join or (self._is_large and len(x) < min_rows(x.dtype)):
            return self._separate(x)
        self._num_products += 1
        state = states([value for one in self._parameters for value in one.values() if value is not None])
        if state != self._joined_from:
            self._join(state)
        if self._weight is None:
            return self._separate(x)
        if self._is_packed:
            return _packed_product(x, self._weight, self._bias)
        return F.linear(x, self._weight, self._bias)

    def _separate(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self._layers], dim=-1)

    def _join(self, state: State) -> None:
        if self._joined_from is not None:  # a parameter has changed since
            self._num_products, self._weight, self._joined_from = 1, None, None
        weights = [one.weight for one in self._layers]
        found = joined_weights.find(weights) if self._is_large and self._num_products == 1 else None
        if found is None and self._is_large and self._num_products <= PACK_AFTER // 2:
            return  # it packs before the layers pack their own
        self._joined_from = state
        if found is None and not _has_room(2 * _num_bytes(weights)):
            return
        self._is_packed = self._is_large and _has_kernels(weights[0].dtype)
        if not self._is_packed:
            self._weight = torch.cat([one.detach() for one in weights])
        else:
            if found is None:
                found = PackedWeights.of(weights)
                joined_weights.put(weights, found)
            self._weight = found.packed
        biases: list[Tensor] = [
            one.weight.new_zeros(one.out_features) if one.bias is None else one.bias for one in self._layers
        ]
        self._bias = torch.cat(biases) if any(one.bias is not None for one in self._layers) else None


def can_be_thin(layer: nn.Module) -> bool:
    """Whether `ThinLinear` has an advantage for a layer: a large plain `nn.Linear` on a CPU, without hooks."""
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        return False
    weight = layer.weight
    if type(weight) is not nn.Parameter or weight.device.type != "cpu" or not weight.is_contiguous():
        return False
    return weight.numel() >= LIMITS.min_elements and _has_kernels(weight.dtype)


def min_rows(dtype: torch.dtype) -> int:
    """The number of rows from which oneDNN is faster for a weight of at least `LIMITS.min_elements`."""
    return LIMITS.min_rows if dtype == torch.float32 else 1


def thin_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """Compute `layer(x)` up to rounding for x (..., D) with few rows, without a packed weight.

    Calls the layer itself if gradients are enabled or oneDNN has no advantage (`can_be_thin`).
    """
    if type(layer) is nn.Linear and layer.weight.numel() < LIMITS.min_elements:
        return layer(x)  # the most frequent case first: a small layer takes no longer than the other questions
    num_rows = x.numel() // max(1, x.shape[-1])
    if (
        torch.is_grad_enabled()
        or not min_rows(x.dtype) <= num_rows <= MAX_ROWS
        or not can_be_thin(layer)
        or torch.is_autocast_enabled("cpu")
    ):
        return layer(x)
    assert isinstance(layer, nn.Linear)
    if x.dtype != layer.weight.dtype or x.device.type != "cpu":
        return layer(x)
    return _unpacked_product(x, layer.weight, layer.bias)


def states(weights: Sequence[Tensor]) -> State:
    """The addresses and version counters of weights: they show new memory, and PyTorch's in-place operations."""
    return [(weight.data_ptr(), weight._version) for weight in weights]


def _probe(weight: Tensor) -> Tensor:
    """The products of the rows of a weight with a vector that is always the same."""
    return torch.mv(weight.detach(), _vector(weight.shape[1]).to(weight.dtype))


@functools.cache
def _vector(size: int) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu") + 0.5


def _num_bytes(weights: Sequence[Tensor]) -> int:
    return sum(weight.nbytes for weight in weights)


def _packed_product(rows: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    num_rows = rows.shape[0]
    if num_rows < _PACKED_ROWS:
        rows = F.pad(rows, (0, 0, 0, _PACKED_ROWS - num_rows))
    return _product()(rows.contiguous(), packed, bias, "none", [], "")[:num_rows]


def _pack(weight: Tensor) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _TYPICAL_ROWS))


def _has_room(num_bytes: int) -> bool:
    if num_bytes < _ALWAYS_FITS or num_bytes + _RESERVE <= available_memory():
        return True
    for kept in (single_weights, joined_weights):
        kept.clear()
    return num_bytes + _RESERVE <= available_memory()


def _unpacked_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] < 2:  # MKL reads the weight at the memory's rate
        return F.linear(x, weight, bias)
    product = _product()(rows.contiguous(), weight, bias, "none", [], "")
    return product.reshape(*x.shape[:-1], weight.shape[0])


def _product() -> Callable[..., Tensor]:
    return cast(Callable[..., Tensor], torch.ops.mkldnn._linear_pointwise)


@functools.cache
def _has_kernels(dtype: torch.dtype) -> bool:
    """Whether this PyTorch has the operators, which are not part of its public interface, and they are right."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, generator=generator).to(dtype) for size in ((4, 64), (96, 64)))
    with torch.no_grad():
        expected = F.linear(x.float(), weight.float())
        try:
            if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
                return False
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS)
            found = [_product()(x, one, None, "none", [], "").float() for one in (weight, packed)]
        except (AttributeError, RuntimeError, TypeError):
            return False
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    return all(one.shape == expected.shape and bool(((one - expected).abs() < tolerance).all()) for one in found)


def available_memory() -> float:
    """The bytes of memory that can still be allocated; infinite if the system does not say so."""
    limits = [_meminfo_available()]
    try:
        group = Path("/sys/fs/cgroup")
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no limit, or one of another version of cgroups
        pass
    return min(limits)


def _meminfo_available() -> float:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii", errors="replace").splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return float("inf")
