"""Tensors over a model's addresses: torch or numpy, zero-copy by DLPack.

The dtypes that a framework lacks, or that DLPack cannot name, travel as bytes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from ._errors import StaleView, WarmServeError

if TYPE_CHECKING:
    from . import _native
    from .layers import Layout, TensorSpec

# DLPack type codes, by the names of the safetensors format.
_INT, _UINT, _FLOAT, _BFLOAT, _COMPLEX, _BOOL = 0, 1, 2, 4, 5, 6
_DLPACK: dict[str, tuple[int, int, int]] = {  # code, bits, lanes
    "BOOL": (_BOOL, 8, 1),
    "U8": (_UINT, 8, 1),
    "I8": (_INT, 8, 1),
    "U16": (_UINT, 16, 1),
    "I16": (_INT, 16, 1),
    "U32": (_UINT, 32, 1),
    "I32": (_INT, 32, 1),
    "U64": (_UINT, 64, 1),
    "I64": (_INT, 64, 1),
    "F16": (_FLOAT, 16, 1),
    "BF16": (_BFLOAT, 16, 1),
    "F32": (_FLOAT, 32, 1),
    "F64": (_FLOAT, 64, 1),
    "C64": (_COMPLEX, 64, 1),
    "F8_E4M3": (10, 8, 1),
    "F8_E4M3FNUZ": (11, 8, 1),
    "F8_E5M2": (12, 8, 1),
    "F8_E5M2FNUZ": (13, 8, 1),
    "F8_E8M0": (14, 8, 1),
    "F4": (17, 4, 2),  # two to a byte, so the last dimension counts pairs
}
_BYTES = (_UINT, 8, 1)
_CUDA = 2  # of DLPack's device types
_KINDS = {_BOOL: "?", _INT: "i", _UINT: "u", _FLOAT: "f", _COMPLEX: "c"}
_NUMPY_NAMES = {  # dtypes that numpy and cupy have
    name: "?" if code == _BOOL else f"{_KINDS[code]}{bits // 8}"
    for name, (code, bits, _) in _DLPACK.items()
    if code in _KINDS
}
_NUMPY = frozenset(_NUMPY_NAMES)

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
    shape = list(spec.shape)
    kind = _DLPACK.get(spec.dtype.name, _BYTES)
    if spec.dtype.name == "F4":
        whole_pairs = bool(shape) and shape[-1] % 2 == 0
        as_bytes = as_bytes or not whole_pairs
        if whole_pairs:
            shape[-1] //= 2
    if as_bytes or spec.dtype.name not in _DLPACK:
        kind, shape = _BYTES, [spec.nbytes]
    return model.view(spec.layer, spec.offset, shape, spec.nbytes, *kind)


def _torch_tensor(model: _native.Model, spec: TensorSpec) -> Any:
    import torch
    from torch.utils.dlpack import from_dlpack

    view = native_view(model, spec)
    if view.__dlpack_device__()[0] == _CUDA and torch.version.cuda is None:
        raise WarmServeError(
            f"torch {torch.__version__} is a build without CUDA and cannot see the device: install "
            "one with it, or say tensors='cupy' or 'dlpack'"
        )
    return from_dlpack(view)


def _numpy_tensor(model: _native.Model, spec: TensorSpec) -> Any:
    return np.from_dlpack(native_view(model, spec, as_bytes=spec.dtype.name not in _NUMPY))


def _cupy_tensor(model: _native.Model, spec: TensorSpec) -> Any:
    """Over the address itself: what CuPy makes of a DLPack capsule needs a CUDA runtime of its
    own, and this is the same without."""
    known = spec.dtype.name in _NUMPY
    view = native_view(model, spec, as_bytes=not known)
    kind, ordinal = view.__dlpack_device__()
    if kind != _CUDA:
        raise ValueError("tensors as 'cupy': it cannot see this device's memory")
    import cupy

    memory = cupy.cuda.UnownedMemory(view.address, max(view.nbytes, 1), view, ordinal)
    shape, dtype = (spec.shape, _NUMPY_NAMES[spec.dtype.name]) if known else (view.nbytes, "uint8")
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0))


_MAKERS: dict[Framework, Callable[[_native.Model, TensorSpec], Any]] = {
    "torch": _torch_tensor,
    "numpy": _numpy_tensor,
    "cupy": _cupy_tensor,
    "dlpack": native_view,
}


def _maker(name: Framework) -> Callable[[_native.Model, TensorSpec], Any]:
    if name not in _MAKERS:
        raise ValueError(f"tensors as {name!r}: choose from {sorted(_MAKERS)}")
    return _MAKERS[name]


def make_tensors(model: _native.Model, layout: Layout, framework: Framework) -> dict[str, Any]:
    """All tensors of a model, at its addresses, whether or not anything is behind them.

    Each has its checkpoint's shape and dtype; what the framework cannot express (bf16, fp8, fp4 and
    fp6 in numpy and cupy; fp6 in torch) is uint8 of shape ``(nbytes,)``. "dlpack": the producers
    themselves.
    """
    make = _maker(framework)
    return {name: make(model, spec) for name, spec in layout.tensors.items()}


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
