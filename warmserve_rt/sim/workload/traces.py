"""Recorded traffic that ships with the package. data/README.md gives sources and licences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files
from typing import Any

import numpy as np
from numpy.typing import NDArray

QUANTILES = (0.01, 0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99)
SERVEGEN_WINDOW = 600.0
SERVEGEN_DAYS = 14
SERVEGEN_MODELS = ("m-large", "m-mid", "m-small")
CLASSES = ("periodic", "middle", "aperiodic")

_CV_STEP, _CV_BIAS = 0.01, 600


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests in order of time: ``time`` float64[n] in seconds within [0, ``duration``),
    ``prompt`` and ``output`` int32[n] tokens. Arrays are read-only. Where ``step`` is not 0 the
    times were recorded in steps of so many seconds."""

    name: str
    time: NDArray[np.float64]
    prompt: NDArray[np.int32]
    output: NDArray[np.int32]
    duration: float
    step: float = 0.0

    @property
    def rate(self) -> float:
        """Requests per second."""
        return len(self.time) / self.duration


@dataclass(frozen=True, eq=False)
class ServeGen:
    """313 clients of three models in 2,016 windows of 600 s. Arrays are read-only.

    ``model`` int[clients] indexes SERVEGEN_MODELS, ``client`` is a client's number in the source.
    ``rates`` float32[clients, windows]: requests per second, 0 where silent, NaN where the model's
    recording has a gap. ``cvs`` float32 alike: coefficient of variation of the times between
    arrivals, NaN where the rate is not above 0. ``weibull`` bool alike: their family is Weibull,
    else Gamma. ``acf_10min``, ``acf_day``, ``acf_week`` float32[clients]: autocorrelation of the
    rate, NaN where undefined. ``tokens`` float64[clients, 2, 9]: prompt and output at QUANTILES.
    """

    model: NDArray[np.int64]
    client: NDArray[np.int64]
    rates: NDArray[np.float32]
    cvs: NDArray[np.float32]
    weibull: NDArray[np.bool_]
    acf_10min: NDArray[np.float32]
    acf_day: NDArray[np.float32]
    acf_week: NDArray[np.float32]
    tokens: NDArray[np.float64]

    def of_class(self, name: str) -> NDArray[np.int64]:
        """Rows of the clients of one of CLASSES: a daily autocorrelation above 0.5, from 0.1 to
        0.5, below 0.1. The 6 clients without one are in no class.

        Raises ValueError for another name."""
        day = self.acf_day
        classes = {"periodic": day > 0.5, "aperiodic": day < 0.1}
        classes["middle"] = (day >= 0.1) & (day <= 0.5)
        if name not in classes:
            raise ValueError(f"{name!r} is no class of clients; there are {', '.join(CLASSES)}")
        return np.flatnonzero(classes[name])


@cache
def azure(service: str | None = None) -> Trace:
    """The Azure 2023 trace: of the "code" service, of the "conv" service, or of both.

    Raises ValueError for another service."""
    if service not in ("code", "conv", None):
        raise ValueError(f"{service!r} is no service of the Azure trace; choose code or conv")
    data = _read("azure2023")
    time = np.cumsum(data["gap_ms"].astype(np.int64)) / 1000
    rows = np.ones(len(time), np.bool_)
    if service:
        code = np.unpackbits(data["code"], count=len(time)).astype(np.bool_)
        rows = code if service == "code" else ~code
    name = f"azure-{service}" if service else "azure"
    return _trace(name, time[rows], data["prompt"][rows], data["output"][rows], time[-1] + 0.001)


@cache
def mooncake() -> Trace:
    """The Mooncake conversation trace; its times are in steps of 3 s."""
    data = _read("mooncake")
    time = np.cumsum(data["gap_ms"].astype(np.int64)) / 1000
    return _trace("mooncake", time, data["prompt"], data["output"], 3540.0, 3.0)


@cache
def servegen() -> ServeGen:
    """The clients of ServeGen's three largest models."""
    data = _read("servegen")
    windows = round(SERVEGEN_DAYS * 86400 / SERVEGEN_WINDOW)
    active = np.unpackbits(data["active"], axis=1, count=windows).astype(np.bool_)
    model = data["model"].astype(np.int64)
    code = _join(data["count"])
    rates = np.zeros(active.shape, np.float32)
    rates[active] = code % 1000 * 10.0 ** (code // 1000) / SERVEGEN_WINDOW
    for each in range(len(SERVEGEN_MODELS)):
        gaps = ~active[model == each].any(axis=0)
        rates[np.ix_(model == each, gaps)] = np.nan
    cvs = np.full(active.shape, np.nan, np.float32)
    cvs[active] = np.exp((_join(data["cv"]) - _CV_BIAS) * _CV_STEP)
    weibull = np.zeros(active.shape, np.bool_)
    weibull[active] = np.unpackbits(data["weibull"], count=int(active.sum())).astype(np.bool_)
    acf = np.ascontiguousarray(data["acf"].T)
    arrays = (model, data["client"].astype(np.int64), rates, cvs, weibull, *acf)
    return ServeGen(*(_frozen(x) for x in (*arrays, data["tokens"].astype(np.float64))))


@cache
def servegen_models() -> NDArray[np.float32]:
    """Requests per second of ServeGen's three models, [models, windows]: the sum of their clients,
    NaN in a gap of the recording."""
    traffic = servegen()
    sums = [traffic.rates[traffic.model == each].sum(axis=0) for each in range(3)]
    return _frozen(np.stack(sums))


def _read(name: str) -> Mapping[str, NDArray[Any]]:
    with (
        as_file(files("warmserve_rt.sim.workload") / "data" / f"{name}.npz") as path,
        np.load(path) as data,
    ):
        return dict(data)


def _trace(
    name: str,
    time: NDArray[np.float64],
    prompt: NDArray[Any],
    output: NDArray[Any],
    duration: float,
    step: float = 0.0,
) -> Trace:
    prompt, output = (_frozen(x.astype(np.int32)) for x in (prompt, output))
    return Trace(name, _frozen(time), prompt, output, float(duration), step)


def _join(planes: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Low and high bytes as numbers; compressed apart they are a fifth smaller."""
    numbers = planes.astype(np.int64)
    joined: NDArray[np.int64] = numbers[0] + 256 * numbers[1]
    return joined


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    array.flags.writeable = False
    return array
