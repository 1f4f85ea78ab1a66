"""Zero-copy tensors at a model's addresses, for torch, numpy, CuPy or DLPack.

A tensor whose dtype the framework or DLPack does not support is exposed as bytes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from warmserve_rt import _native
from warmserve_rt._errors import StaleView, WarmServeError
from warmserve_rt.checkpoint import CHUNK, TYPES

from .torch_sharing import refuse_sharing

if TYPE_CHECKING:
    from warmserve_rt.checkpoint.layout import Layout, TensorSpec

_CUDA = 2  # DLPack device type
_UINT8 = (1, 8, 1)  # DLPack type: code, bits, lanes
_NUMPY_KINDS = {0: "i", 1: "u", 2: "f", 5: "c", 6: "?"}  # by DLPack type code
_NUMPY_NAMES = {  # dtypes that numpy and CuPy support
    dtype.name: kind if kind == "?" else f"{kind}{known[1] // 8}"
    for dtype, known in zip(TYPES, _native.dlpack_types(), strict=True)
    if known and (kind := _NUMPY_KINDS.get(known[0]))
}
_NUMBERS = {dtype.name: number for number, dtype in enumerate(TYPES)}

Framework: TypeAlias = Literal["torch", "numpy", "cupy", "dlpack"]
Tensors = Mapping[str, Any]


def checked_framework(name: Framework | None, *, cuda: bool) -> Framework:
    """Return the framework to use.

    Parameters
    ----------
    name : framework or None
        For None: torch if it is installed; otherwise numpy on the host, and on CUDA cupy if it is
        installed or else dlpack.
    cuda : bool
        Whether the device is a CUDA device.

    Raises
    ------
    ValueError
        The framework is unknown or cannot see the device's memory.
    """
    if name is None:
        fitting: tuple[Framework, ...] = ("torch", "cupy", "dlpack") if cuda else ("torch", "numpy")
        return next(
            (found for found in fitting[:-1] if importlib.util.find_spec(found)), fitting[-1]
        )
    _maker(name)
    if name == ("numpy" if cuda else "cupy"):
        raise ValueError(f"tensors must not be {name!r}: it cannot see this device's memory")
    return name


def native_view(model: _native.Model, spec: TensorSpec, *, as_bytes: bool = False) -> _native.View:
    """Return a DLPack producer for one tensor, with ``as_bytes`` as uint8 of shape
    ``(nbytes,)``."""
    return model.tensor(
        spec.layer, spec.offset, spec.shape, spec.nbytes, _NUMBERS[spec.dtype.name], as_bytes
    )


def native_bytes(model: _native.Model, layer: int, first: int, last: int) -> _native.View:
    """Return a DLPack producer of the layer's bytes ``[first, last)``, as uint8."""
    return model.view(layer, first, [last - first], last - first, *_UINT8)


def _device_type(model: _native.Model) -> int:
    return native_bytes(model, 0, 0, 0).__dlpack_device__()[0]


def _torch_tensors(model: _native.Model, layout: Layout) -> dict[str, Any]:
    import torch
    from torch.utils.dlpack import from_dlpack

    tensors: dict[str, Any] = {}
    if len(layout) and _device_type(model) == _CUDA:
        if torch.version.cuda is None:
            raise WarmServeError(
                f"torch {torch.__version__} is a build without CUDA and cannot see the device: "
                "install a build with CUDA, or choose tensors='cupy' or 'dlpack'"
            )
        refuse_sharing(model, layout)
    for layer in range(len(layout)):
        count = layout.native.layer(layer)[2]
        for first in range(0, count, CHUNK):
            names, capsules = model.capsules(layout.native, layer, first, first + CHUNK)
            for name, capsule in zip(names, capsules, strict=True):
                tensors[name] = from_dlpack(capsule)
    return tensors


def _numpy_tensor(model: _native.Model, spec: TensorSpec) -> Any:
    return np.from_dlpack(native_view(model, spec, as_bytes=spec.dtype.name not in _NUMPY_NAMES))


def _cupy_tensor(model: _native.Model, spec: TensorSpec) -> Any:
    """Wrap the address itself. CuPy's import of a DLPack capsule needs a CUDA runtime of its own;
    this gives the same array without one."""
    known = spec.dtype.name in _NUMPY_NAMES
    view = native_view(model, spec, as_bytes=not known)
    kind, ordinal = view.__dlpack_device__()
    if kind != _CUDA:
        raise ValueError("tensors must not be 'cupy': it cannot see this device's memory")
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
        raise ValueError(f"tensors must be one of {sorted(_MAKERS)}, got {name!r}")
    return _MAKERS[name]


def make_tensors(model: _native.Model, layout: Layout, framework: Framework) -> dict[str, Any]:
    """Return all tensors of a model at its addresses, whether or not memory is mapped there.

    Each tensor has its checkpoint's shape and dtype. A dtype that the framework does not support
    (bf16, fp8, fp4 and fp6 in numpy and CuPy; fp6 in torch) becomes uint8 of shape ``(nbytes,)``.
    "dlpack" returns the DLPack producers themselves.
    """
    return _maker(framework)(model, layout)


class LeasedTensors(Mapping[str, Any]):
    """A model's tensors by name, usable while a lease holds their layers.

    Looking up a tensor raises StaleView after the release, for a layer outside the lease, and
    before its layer has been waited for. The tensors themselves are unchecked: reading one outside
    of a lease faults if its layer is not resident.
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
        """``here(layer)``: whether a layer may be used now. None: every layer, while held."""
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
                raise StaleView(
                    f"{name!r} may be used after wait({layer}) on a lease that holds it"
                )
        return tensor

    def __iter__(self) -> Iterator[str]:
        self._check()
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
