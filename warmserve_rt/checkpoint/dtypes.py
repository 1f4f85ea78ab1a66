"""Which tensors are cast while they are loaded, and to what.

Only plain floating-point weights are. What a quantised format says is in its bytes, and in the
floats beside them: scales, zeros and biases rounded again would dequantise to another model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from warmserve_rt import _arguments as check
from warmserve_rt import _native

from . import DTYPES, DType, TensorEntry

DTypeLike: TypeAlias = Any
"""The name of a dtype, or a dtype of torch or numpy."""

_TARGETS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# BOOL, I64 and U64 are masks and counters, which stand beside plain weights.
_QUANTISED = {"I8", "U8", "I16", "U16", "I32", "U32"} | {
    name for name in DTYPES if name.startswith(("F8_", "F6_", "F4"))
}


def target_dtype(dtype: object) -> DType:
    """Returns the dtype named "float32", "float16" or "bfloat16", or as safetensors has it, "BF16".
    Accepts torch's dtypes, and numpy's.

    Raises ValueError for any other: a packed format cannot be made out of values alone.
    """
    name = dtype
    if isinstance(dtype, np.dtype) or (isinstance(dtype, type) and issubclass(dtype, np.generic)):
        name = np.dtype(dtype).name
    elif type(dtype).__module__ == "torch":
        name = str(dtype).removeprefix("torch.")
    found = _TARGETS.get(name, name) if isinstance(name, str) else None
    if found not in _TARGETS.values():
        wanted = check.either(tuple(_TARGETS))
        raise ValueError(f"dtype must be {wanted}, got {check.shown(dtype)}")
    return DTYPES[str(found)]


def planned_casts(
    tensors: Mapping[str, TensorEntry], dtype: DTypeLike | Mapping[str, DTypeLike]
) -> dict[str, DType]:
    """The tensors that are not of ``dtype`` but should be, by name, and that dtype; of a mapping,
    those that it names.

    These are of F32, F16 or BF16. A float belongs to a quantised tensor and stays as it is where
    one (of 8 to 32-bit integers, fp8, fp6 or fp4) has the same prefix up to the name's last dot
    ("q.weight" and "q.scales"), or has a name with which, and a dot, the float's begins ("q.weight"
    and "q.weight.absmax").

    Raises as `target_dtype`, and ValueError, which names the tensor, for a plain one of F64, and
    for one that a mapping names and the checkpoint has not.
    """
    if not isinstance(dtype, Mapping):
        targets = dict.fromkeys(tensors, target_dtype(dtype))
    else:
        targets = {name: target_dtype(each) for name, each in dtype.items()}
        if unknown := sorted(targets.keys() - tensors.keys()):
            raise ValueError(f"dtype: no tensor {unknown[0]!r} in the checkpoint")
    quantised = [name for name, entry in tensors.items() if entry.dtype.name in _QUANTISED]
    modules = {_module(name) for name in quantised}
    wanted = [
        name
        for name, target in targets.items()
        if tensors[name].dtype.name in ("F64", *_TARGETS.values()) and tensors[name].dtype != target
    ]
    belongs = _native.under_stems(wanted, quantised)
    casts = {}
    for name, below in zip(wanted, belongs, strict=True):
        if below or _module(name) in modules:
            continue
        if tensors[name].dtype.name == "F64":
            raise ValueError(
                f"tensor {name!r} is F64, of which there is no cast to {targets[name].name}"
            )
        casts[name] = targets[name]
    return casts


def cast_kind(source: DType, target: DType) -> str:
    """The kernel's name for a cast: one of `kernels.CASTS`."""
    return f"{source.name}_to_{target.name}".lower()


def _module(name: str) -> str:
    return name.rpartition(".")[0]
