"""Choose which tensors are cast while they are loaded, and to which dtype.

Only plain floating-point weights are cast. The meaning of a quantised format is in its bytes and in
the floats that belong to them: rounding scales, zeros and biases again would dequantise to another
model.
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
# Not BOOL, I64 and U64: they are masks and counters, which plain models have too.
_QUANTISED = {"I8", "U8", "I16", "U16", "I32", "U32"} | {
    name for name in DTYPES if name.startswith(("F8_", "F6_", "F4"))
}


def target_dtype(dtype: object) -> DType:
    """Return the dtype for "float32", "float16", "bfloat16", a safetensors name such as "BF16", or
    a dtype of torch or numpy.

    Raises ValueError for any other dtype: values alone do not determine a packed format.
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
    """Return the tensors to cast, by name, with their target dtypes.

    Tensors of F32, F16 or BF16 are cast if their dtype differs from the target. A float belongs to
    a quantised tensor (8 to 32-bit integers, fp8, fp6 or fp4) and keeps its dtype in two cases:
    both names have the same prefix up to their last dot ("q.weight" and "q.scales"), or its name
    begins with the quantised tensor's name and a dot ("q.weight" and "q.weight.absmax").

    Parameters
    ----------
    tensors : mapping from names to entries
    dtype : dtype, or mapping from tensor names to dtypes
        With a mapping, only the tensors that it names are cast.

    Raises
    ------
    ValueError
        As for `target_dtype`; for a plain tensor of F64, which the message names; for a name in
        ``dtype`` that is not in the checkpoint.
    """
    if not isinstance(dtype, Mapping):
        targets = dict.fromkeys(tensors, target_dtype(dtype))
    else:
        targets = {name: target_dtype(each) for name, each in dtype.items()}
        if unknown := sorted(targets.keys() - tensors.keys()):
            raise ValueError(f"dtype must name tensors of the checkpoint, got {unknown[0]!r}")
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
                f"tensor {name!r} is F64, which cannot be cast to {targets[name].name}"
            )
        casts[name] = targets[name]
    return casts


def cast_kind(source: DType, target: DType) -> str:
    """Return the kernel's name for a cast, one of `kernels.CASTS`."""
    return f"{source.name}_to_{target.name}".lower()


def _module(name: str) -> str:
    return name.rpartition(".")[0]
