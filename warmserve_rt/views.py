"""Tensors over a model's addresses: torch or numpy, zero-copy by DLPack.

The dtypes that a framework lacks, or that DLPack cannot name, travel as bytes.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from . import _native
from ._errors import StaleView, WarmServeError
from .checkpoint import CHUNK, TYPES

if TYPE_CHECKING:
    from .layers import Layout, TensorSpec

_CUDA = 2  # of DLPack's device types
_NUMPY_KINDS = {0: "i", 1: "u", 2: "f", 5: "c", 6: "?"}  # by DLPack's type codes
_NUMPY_NAMES = {  # dtypes that numpy and cupy have
    dtype.name: kind if kind == "?" else f"{kind}{known[1] // 8}"
    for dtype, known in zip(TYPES, _native.dlpack_types(), strict=True)
    if known and (kind := _NUMPY_KINDS.get(known[0]))
}
_NUMBERS = {dtype.name: number for number, dtype in enumerate(TYPES)}

Framework: TypeAlias = Literal["torch", "numpy", "cupy", "dlpack"]
Tensors = Mapping[str, Any]


def checked_framework(name: Framework | None, *, cuda: bool) -> Framework:
    """The name, if tensors on the device can be made so; for None, torch where it is installed,
    else numpy on the host, and on CUDA cupy, if that is installed, or dlpack."""
    if name is None:
        fitting: tuple[Framework, ...] = ("torch", "cupy", "dlpack") if cuda else ("torch", "numpy")
        return next(
            (found for found in fitting[:-1] if importlib.util.find_spec(found)), fitting[-1]
        )
    _maker(name)
    if name == ("numpy" if cuda else "cupy"):
        raise ValueError(f"tensors as {name!r}: it cannot see this device's memory")
    return name


def native_view(model: _native.Model, spec: TensorSpec, *, as_bytes: bool = False) -> _native.View:
    """A DLPack producer for one tensor. ``as_bytes``: shape ``(nbytes,)`` of uint8."""
    return model.tensor(
        spec.layer, spec.offset, spec.shape, spec.nbytes, _NUMBERS[spec.dtype.name], as_bytes
    )


def _device_type(model: _native.Model) -> int:
    return model.view(0, 0, [0], 0, 1, 8, 1).__dlpack_device__()[0]


def _torch_tensors(model: _native.Model, layout: Layout) -> dict[str, Any]:
    import torch
    from torch.utils.dlpack import from_dlpack

    tensors: dict[str, Any] = {}
    if torch.version.cuda is None and len(layout) and _device_type(model) == _CUDA:
        raise WarmServeError(
            f"torch {torch.__version__} is a build without CUDA and cannot see the device: install "
            "one with it, or say tensors='cupy' or 'dlpack'"
        )
    for layer in range(len(layout)):
        for first in itertools.count(0, CHUNK):
            names, capsules = model.capsules(layout.native, layer, first, first + CHUNK)
            for name, capsule in zip(names, capsules, strict=True):
                tensors[name] = from_dlpack(capsule)
            if len(names) < CHUNK:
                break
    return tensors


def _numpy_tensor(model: _native.Model, spec: TensorSpec) -> Any:
    return np.from_dlpack(native_view(model, spec, as_bytes=spec.dtype.name not in _NUMPY_NAMES))


def _cupy_tensor(model: _native.Model, spec: TensorSpec) -> Any:
    """Over the address itself: what CuPy makes of a DLPack capsule needs a CUDA runtime of its
    own, and this is the same without."""
    known = spec.dtype.name in _NUMPY_NAMES
    view = native_view(model, spec, as_bytes=not known)
    kind, ordinal = view.__dlpack_device__()
    if kind != _CUDA:
        raise ValueError("tensors as 'cupy': it cannot see this device's memory")
    import cupy

    memory = cupy.cuda.UnownedMemory(view.address, max(view.nbytes, 1), view, ordinal)
    shape, dtype = (spec.shape, _NUMPY_NAMES[spec.dtype.name]) if known else (view.nbytes, "uint8")
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0))


def _one_by_one(
    make: Callable[[_native.Model, TensorSpec], Any],
) -> Callable[[_native.Model, Layout], dict[str, Any]]:
    return lambda model, layout: {
        spec.name: make(model, spec) for layer in layout.layers for spec in layer.tensors
    }


_MAKERS: dict[Framework, Callable[[_native.Model, Layout], dict[str, Any]]] = {
    "torch": _torch_tensors,
    "numpy": _one_by_one(_numpy_tensor),
    "cupy": _one_by_one(_cupy_tensor),
    "dlpack": _one_by_one(native_view),
}


def _maker(name: Framework) -> Callable[[_native.Model, Layout], dict[str, Any]]:
    if name not in _MAKERS:
        raise ValueError(f"tensors as {name!r}: choose from {sorted(_MAKERS)}")
    return _MAKERS[name]


def make_tensors(model: _native.Model, layout: Layout, framework: Framework) -> dict[str, Any]:
    """All tensors of a model, at its addresses, whether or not anything is behind them.

    Each has its checkpoint's shape and dtype; what the framework cannot express (bf16, fp8, fp4 and
    fp6 in numpy and cupy; fp6 in torch) is uint8 of shape ``(nbytes,)``. "dlpack": the producers
    themselves.
    """
    return _maker(framework)(model, layout)


class LeasedTensors(Mapping[str, Any]):
    """A model's tensors while a lease holds their layers. Looking one up that is not there raises
    StaleView: afterwards, of another layer, or before its layer has been waited for.

    The tensors themselves cannot know: reading one outside of a lease is a fault when its layer is
    not resident.
    """

    __slots__ = ("_held", "_here", "_layout", "_name", "_tensors")

    def __init__(
        self,
        name: str,
        layout: Layout,
        tensors: Tensors,
        held: Callable[[], bool],
        here: Callable[[int], bool] | None,
    ) -> None:
        """``here``: whether a layer may be used now; None: while it is held, all may."""
        self._name = name
        self._layout = layout
        self._tensors = tensors
        self._held = held
        self._here = here

    def _check(self) -> None:
        if not self._held():
            raise StaleView(f"the lease on {self._name!r} was released")

    def __getitem__(self, name: str) -> Any:
        self._check()
        tensor = self._tensors[name]
        if self._here:
            layer = self._layout.tensors[name].layer
            if not self._here(layer):
                raise StaleView(f"{name!r}: wait({layer}) on a lease that holds it comes first")
        return tensor

    def __iter__(self) -> Iterator[str]:
        self._check()
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
