"""The models and devices of simulations, and their costs.

Bytes and KV sizes follow from the published shapes, in bf16. Times of the Llama-2 models are the
constants of the WarmServe paper (arXiv 2512.09472). The dependence of a prefill on the prompt's
length is measured (vLLM on an A100, 128 and 512 tokens) and scaled to the paper's figure at the
mean prompt. Times of the other models are derived from these, see `_profile`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import count, cycle, islice
from types import MappingProxyType

from warmserve_rt.policy.profile import ModelProfile

KIB = 1024
MEAN_PROMPT = 756  # tokens: mean of the Azure trace, capped at 1,024 as in the paper
HBM_BYTES_S = 2.039e12  # of an A100 80 GB, at which a decode step reads the weights


@dataclass(frozen=True)
class Gpu:
    """One device: its memory, and the bytes per second of its own link to the host."""

    name: str
    nbytes: int
    link_bytes_s: float


A100 = Gpu("a100-80gb", 80_000_000_000, 25e9)  # PCIe 4, pinned memory
H100 = Gpu("h100-80gb", 80_000_000_000, 52e9)  # PCIe 5, as measured by ServerlessLLM
GPUS: Mapping[str, Gpu] = MappingProxyType({gpu.name: gpu for gpu in (A100, H100)})


@dataclass(frozen=True)
class _Shape:
    """The sizes of a whole, undivided model. ``ends``: embedding and head together."""

    width: int
    layers: int
    layer: int
    ends: int
    kv_token: int

    @property
    def inner(self) -> float:
        """Return the bytes of the decoder layers on each device."""
        return self.layers * self.layer / self.width


def _llama2(width: int, layers: int, layer: int, total: int, kv_token: int) -> _Shape:
    """Return a shape from the paper's exact total: bytes outside the layers count as ends."""
    return _Shape(width, layers, layer, total - layers * layer, kv_token)


_SHAPES = {
    "llama2-7b": _llama2(1, 32, 404_766_720, 13_476_831_232, 512 * KIB),
    "llama2-13b": _llama2(2, 40, 634_408_960, 26_032_558_080, 800 * KIB),
    "llama2-70b": _llama2(4, 80, 1_711_308_800, 137_961_209_856, 320 * KIB),
    "llama3-8b": _Shape(1, 32, 436_200_000, 2_101_000_000, 128 * KIB),
    "llama3-70b": _Shape(4, 80, 1_711_300_000, 4_203_000_000, 320 * KIB),
    "qwen2.5-7b": _Shape(1, 28, 466_100_000, 2_180_000_000, 56 * KIB),
    "qwen2.5-72b": _Shape(4, 80, 1_755_400_000, 4_983_000_000, 320 * KIB),
    "qwen3-8b": _Shape(1, 36, 385_900_000, 2_489_000_000, 144 * KIB),
    "qwen3-32b": _Shape(2, 64, 975_200_000, 3_112_000_000, 256 * KIB),
}


@dataclass(frozen=True)
class _Times:
    """The paper's prefill and decode times, and the prefills measured at 128 and 512 tokens, in
    seconds.

    The paper has one prefill time for each model. It is taken as that of the mean prompt.
    """

    prefill: float
    decode: float
    at_128: float
    at_512: float

    def affine(self) -> tuple[float, float]:
        """Return intercept and slope of a prefill: the measured line, scaled to the paper's figure
        at the mean prompt."""
        slope = (self.at_512 - self.at_128) / 384
        start = self.at_128 - 128 * slope
        scale = self.prefill / (start + MEAN_PROMPT * slope)
        return start * scale, slope * scale


_TIMES = {
    "llama2-7b": _Times(0.035, 0.015, 0.016, 0.041),
    "llama2-13b": _Times(0.070, 0.020, 0.0247, 0.0475),
    "llama2-70b": _Times(0.100, 0.030, 0.050, 0.119),  # the measured points are of a 65B
}


def _profile(name: str) -> ModelProfile:
    """Return the profile of a model.

    If the paper has no times for it, they are derived from the model of the paper whose decoder
    layers are nearest in bytes per device. The prefill is bound by arithmetic and scales with these
    bytes. The decode step is that of the other model plus the time to read the additional bytes.
    """
    shape = _SHAPES[name]
    near = min(_TIMES, key=lambda other: abs(_SHAPES[other].inner - shape.inner))
    like = near if name not in _TIMES else name
    reference, times = _SHAPES[like], _TIMES[like]
    prefill, token = (x * shape.inner / reference.inner for x in times.affine())

    def split(nbytes: int) -> int:
        return -(-nbytes // shape.width)

    head = shape.ends // 2
    return ModelProfile(
        name=name,
        width=shape.width,
        layer_bytes=(
            split(shape.ends - head),
            *(split(shape.layer),) * shape.layers,
            split(head),
        ),
        kv_token_bytes=split(shape.kv_token),
        prefill_s=prefill,
        prefill_token_s=token,
        decode_s=times.decode + (shape.inner - reference.inner) / HBM_BYTES_S,
    )


MODELS: Mapping[str, ModelProfile] = MappingProxyType({name: _profile(name) for name in _SHAPES})


def model(base: str, name: str | None = None) -> ModelProfile:
    """Return a model of MODELS under its own name. Raise ValueError if there is no such model.

    Parameters
    ----------
    base
        The name in MODELS.
    name
        The name of the returned model; by default ``base``.
    """
    if base not in MODELS:
        raise ValueError(
            f"{base!r} is no model of the catalogue: choose one of {', '.join(MODELS)}"
        )
    return replace(MODELS[base], name=name or base)


def paper_models() -> tuple[ModelProfile, ...]:
    """Return the paper's four models: two copies of the 7B, the 13B and the 70B."""
    return _numbered(["llama2-7b", "llama2-7b", "llama2-13b", "llama2-70b"])


def mixed(n: int) -> tuple[ModelProfile, ...]:
    """Return n models. Among every eight, five are one device wide, two are two devices wide and
    one is four devices wide. The models of one width take turns.

    Raises
    ------
    ValueError
        If n is not positive.
    """
    if n < 1:
        raise ValueError(f"a catalogue must have at least one model, got {n}")
    turns = {
        width: cycle([name for name, shape in _SHAPES.items() if shape.width == width])
        for width in (1, 2, 4)
    }
    return _numbered([next(turns[width]) for width in islice(cycle((1, 2, 1, 1, 4, 1, 2, 1)), n)])


def _numbered(bases: list[str]) -> tuple[ModelProfile, ...]:
    numbers = {base: count() for base in bases}
    return tuple(model(base, f"{base}-{next(numbers[base])}") for base in bases)


@dataclass(frozen=True)
class MeasuredTimes:
    """Lines through measurements, in seconds.

    A prefill depends on its tokens (128 to 2,048, one request), and a decode step on its requests
    (1 to 64, 512 tokens each). ``prefill_error`` and ``decode_error``: the largest relative
    residual.
    """

    prefill_s: float
    prefill_token_s: float
    decode_s: float
    decode_request_s: float
    prefill_error: float
    decode_error: float


# Least squares of the relative residuals of medians of five or more runs. Two devices could not
# hold 64 requests, so that their steps end at 32. Longer prompts take more than the line gives: at
# 8,192 tokens 1.1, 1.5 and 1.7 times as much on two, four and eight A100s, 1.3, 1.6 and 2.4 times
# on H100s.
# Source: Splitwise's performance model, Azure/SplitwiseSim (mutinifni/splitwise-sim), MIT licence.
LLAMA2_70B_MEASURED: Mapping[tuple[str, int], MeasuredTimes] = MappingProxyType(
    {
        ("a100-80gb", 2): MeasuredTimes(37.51e-3, 317.6e-6, 57.23e-3, 488.5e-6, 0.053, 0.053),
        ("a100-80gb", 4): MeasuredTimes(37.89e-3, 177.7e-6, 43.22e-3, 399.4e-6, 0.062, 0.071),
        ("a100-80gb", 8): MeasuredTimes(45.17e-3, 105.6e-6, 43.72e-3, 392.5e-6, 0.103, 0.063),
        ("h100-80gb", 2): MeasuredTimes(25.69e-3, 126.1e-6, 36.73e-3, 449.0e-6, 0.136, 0.047),
        ("h100-80gb", 4): MeasuredTimes(33.94e-3, 69.90e-6, 28.68e-3, 326.4e-6, 0.170, 0.062),
        ("h100-80gb", 8): MeasuredTimes(42.94e-3, 37.55e-6, 29.74e-3, 306.1e-6, 0.180, 0.027),
    }
)


def measured_llama2_70b(gpu: str, width: int = 4, name: str = "llama2-70b") -> ModelProfile:
    """Return Llama-2-70B on ``width`` devices with the times that Splitwise measured.

    Parameters
    ----------
    gpu
        The name of the device in GPUS.
    width
        The number of devices.
    name
        The name of the returned model.

    Raises
    ------
    ValueError
        If this device and width were not measured.
    """
    times = LLAMA2_70B_MEASURED.get((gpu, width))
    if times is None:
        known = ", ".join(f"{each} x {by}" for each, by in LLAMA2_70B_MEASURED)
        raise ValueError(
            f"no measurements of llama2-70b on {gpu!r} x {width}: choose one of {known}"
        )
    whole = MODELS["llama2-70b"]
    share = whole.width / width
    return replace(
        whole,
        name=name,
        width=width,
        layer_bytes=tuple(round(nbytes * share) for nbytes in whole.layer_bytes),
        kv_token_bytes=round(whole.kv_token_bytes * share),
        prefill_s=times.prefill_s,
        prefill_token_s=times.prefill_token_s,
        decode_s=times.decode_s,
        decode_request_s=times.decode_request_s,
    )
