"""The options of `load`: options of `from_pretrained` and of the model's configuration."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from warmserve_rt._errors import CorruptCheckpoint

_OWN = ("name", "dtype", "layers", "writable", "allow_symlinks", "auto_class", "revision")
_MORE = ("variant", "subfolder", "trust_remote_code", "torch_dtype", "attn_implementation")
_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}

_NOT_HERE = "the weights stay in the runtime's arena"
_NO_NETWORK = "load() downloads nothing"
# Options of from_pretrained that load() accepts only with values that ask for what it does anyway:
# name -> (accepted values, reason why others are refused).
_ANYWAY: dict[str, tuple[tuple[Any, ...], str]] = {
    "low_cpu_mem_usage": ((None, True, False), ""),
    "local_files_only": ((None, True, False), ""),
    "use_safetensors": ((None, True), "load() reads only safetensors"),
    "weights_only": ((None, True), "load() reads only safetensors"),
    "gguf_file": ((None,), "load() reads only safetensors"),
    "from_tf": ((None, False), "load() reads only safetensors"),
    "from_flax": ((None, False), "load() reads only safetensors"),
    "device_map": ((None, "auto"), _NOT_HERE),
    "device_mesh": ((None,), _NOT_HERE),
    "max_memory": ((None,), _NOT_HERE),
    "offload_folder": ((None,), _NOT_HERE),
    "offload_buffers": ((None, False), _NOT_HERE),
    "tp_plan": ((None,), _NOT_HERE),
    "tp_size": ((None,), _NOT_HERE),
    "distributed_config": ((None,), _NOT_HERE),
    "state_dict": ((None,), "the weights are the checkpoint's"),
    "key_mapping": ((None,), "load() translates names as transformers does by default"),
    "ignore_mismatched_sizes": ((None, False), "every tensor must fit"),
    "output_loading_info": ((None, False), "load() returns only the module"),
    "quantization_config": ((None,), "load() quantizes nothing"),
    "token": ((None, False), _NO_NETWORK),
    "proxies": ((None,), _NO_NETWORK),
    "force_download": ((None, False), _NO_NETWORK),
    "resume_download": ((None, False), _NO_NETWORK),
    "cache_dir": ((None,), f"{_NO_NETWORK}, so pass the directory as path"),
}


def dtype_name(dtype: object, old: object = None) -> str | None:
    """Return the name of the dtype to cast to, or None for the checkpoint's own.

    Parameters
    ----------
    dtype : None, "auto", a name or a torch.dtype
        The option ``dtype``.
    old : same types
        The option ``torch_dtype``, which is transformers' former name of ``dtype``.

    Raises
    ------
    TypeError, ValueError
        An argument is not a dtype, or the two differ.
    """
    found, other = _dtype_name("dtype", dtype), _dtype_name("torch_dtype", old)
    if found and other and found != other:
        raise ValueError(
            f"dtype and torch_dtype (its former name) must agree, got {found} and {other}"
        )
    return found or other


def _dtype_name(option: str, dtype: object) -> str | None:
    if dtype is None or dtype == "auto":
        return None
    name = _DTYPES.get(dtype) if isinstance(dtype, torch.dtype) else dtype
    if isinstance(name, str) and name.removeprefix("torch.") in _DTYPES.values():
        return name.removeprefix("torch.")
    if isinstance(name, str) and name in ("F32", "F16", "BF16"):
        return {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[name]
    error = ValueError if isinstance(dtype, str | torch.dtype) else TypeError
    raise error(
        f"{option} must be None, 'auto', or float32, float16 or bfloat16 as a name or a "
        f"torch.dtype, got {dtype!r}"
    )


def configuration(
    path: str, options: Mapping[str, Any], *, revision: str | None, trust_remote_code: bool
) -> PreTrainedConfig:
    """Return the configuration of a model, changed by options.

    Parameters
    ----------
    path : str
        A model directory, or the id of a model in the Hugging Face cache.
    options : mapping of name to value
        Options of the configuration, and options of `from_pretrained` that `load` checks.
    revision, trust_remote_code
        As in `load`.

    Raises
    ------
    TypeError
        Neither `load` nor the configuration knows an option.
    ValueError
        `load` cannot do what an option asks for, or transformers does not know the model type.
    FileNotFoundError, NotADirectoryError, CorruptCheckpoint
        The directory or its config.json is missing or invalid.
    """
    left = dict(options)
    for name, (accepted, reason) in _ANYWAY.items():
        if name not in left:
            continue
        value = left.pop(name)
        if not any(value is each or (each == value and each is not None) for each in accepted):
            wanted = " or ".join(repr(each) for each in accepted)
            raise ValueError(f"{name} must be {wanted}, got {value!r}: {reason}")
    if os.path.exists(path):
        _check_file(path, trust_remote_code)
    where = {} if revision is None else {"revision": revision}
    try:
        found, unknown = AutoConfig.from_pretrained(
            path,
            local_files_only=True,
            return_unused_kwargs=True,
            trust_remote_code=trust_remote_code,
            **where,
            **left,
        )
    except OSError:
        if os.path.exists(path):
            raise
        raise FileNotFoundError(
            f"{path} is neither a directory nor the id of a model in the Hugging Face cache"
        ) from None
    settings: PreTrainedConfig = found
    for name in unknown:
        if name in left:
            near = difflib.get_close_matches(name, [*_OWN, *_MORE, *settings.to_dict()], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(
                f"neither load() nor {type(settings).__name__} has an option {name!r}{hint}"
            )
    return settings


def _check_file(path: str, trust_remote_code: bool) -> None:
    """Raise a one-sentence error for a bad config.json; transformers' own errors are long."""
    if not os.path.isdir(path):
        raise NotADirectoryError(
            f"{path} is a file: path must be the directory that has config.json and the weights"
        )
    file = os.path.join(path, "config.json")
    if not os.path.exists(file):
        raise FileNotFoundError(
            f"{path} has no config.json: load() accepts a Hugging Face model directory; "
            "Runtime.register() accepts any safetensors files"
        )
    try:
        with open(file, encoding="utf-8") as opened:
            values = json.load(opened)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{file} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise CorruptCheckpoint(f"{file} must hold a JSON object, got a {type(values).__name__}")
    kind = values.get("model_type")
    if "auto_map" in values:
        if not trust_remote_code and kind not in CONFIG_MAPPING:
            raise ValueError(
                f"{path} has code of its own, which load() runs only with trust_remote_code=True"
            )
    elif kind is None:
        raise CorruptCheckpoint(f"{file} has no 'model_type', which transformers needs")
    elif not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ValueError(f"{file}: the installed transformers does not know model type {kind!r}")


def quantization(path: str, settings: Any) -> str | None:
    """Return the method by which the weights, or a part of a composite model, are quantized.

    Returns None if they are not quantized.
    """
    parts = (settings, *(getattr(settings, key, None) for key in settings.sub_configs))
    for part in parts:
        found = getattr(part, "quantization_config", None)
        if found is not None:
            values = found if isinstance(found, dict) else vars(found)
            return str(values.get("quant_method", "by an unknown method"))
    return _modelopt(os.path.join(path, "hf_quant_config.json"))


def _modelopt(file: str) -> str | None:
    """Return the method in the file that NVIDIA's ModelOpt writes; transformers ignores it."""
    try:
        with open(file, encoding="utf-8") as opened:
            values = json.load(opened)
        method = values["quantization"]["quant_algo"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "modelopt"
    return None if method is None else f"modelopt {method}"
