"""Read the recorded traffic of the package. data/README.md gives sources and licences."""

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
    """A recording of requests in order of time. Arrays are read-only.

    ``time``: seconds in [0, ``duration``), float64[n]. ``prompt`` and ``output``: tokens, int32[n].
    ``step``: times were recorded in steps of this many seconds; 0 if they are exact.
    """

    name: str
    time: NDArray[np.float64]
    prompt: NDArray[np.int32]
    output: NDArray[np.int32]
    duration: float
    step: float = 0.0

    @property
    def rate(self) -> float:
        """Return the mean requests per second."""
        return len(self.time) / self.duration


@dataclass(frozen=True, eq=False)
class ServeGen:
    """313 clients of three models in 2,016 windows of 600 s. Arrays are read-only.

    Attributes
    ----------
    model
        The index of each client's model in SERVEGEN_MODELS; int[clients].
    client
        The client's number in the source; int[clients].
    rates
        Requests per second; float32[clients, windows]. 0 if the client is silent, NaN if the
        model's recording has a gap.
    cvs
        The coefficient of variation of the times between arrivals; float32[clients, windows]. NaN
        unless the rate is positive.
    weibull
        Whether the family of these times is Weibull, otherwise Gamma; bool[clients, windows].
    acf_10min, acf_day, acf_week
        The autocorrelation of the rate; float32[clients]. NaN if it is undefined.
    tokens
        Prompt and output tokens at QUANTILES; float64[clients, 2, 9].
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
        """Return the rows of the clients of one of CLASSES.

        The daily autocorrelation is above 0.5 (periodic), from 0.1 to 0.5 (middle) or below 0.1
        (aperiodic). The 6 clients for which it is undefined are in no class.

        Raises
        ------
        ValueError
            If there is no such class.
        """
        day = self.acf_day
        classes = {"periodic": day > 0.5, "aperiodic": day < 0.1}
        classes["middle"] = (day >= 0.1) & (day <= 0.5)
        if name not in classes:
            raise ValueError(f"{name!r} is no class of clients: choose one of {', '.join(CLASSES)}")
        return np.flatnonzero(classes[name])


@cache
def azure(service: str | None = None) -> Trace:
    """Return the Azure 2023 trace of the "code" service, of the "conv" service, or (None) of both.

    Raises
    ------
    ValueError
        If there is no such service.
    """
    if service not in ("code", "conv", None):
        raise ValueError(f"{service!r} is no service of the Azure trace: choose code or conv")
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
    """Return the Mooncake conversation trace, whose times are in steps of 3 s."""
    data = _read("mooncake")
    time = np.cumsum(data["gap_ms"].astype(np.int64)) / 1000
    return _trace("mooncake", time, data["prompt"], data["output"], 3540.0, 3.0)


@cache
def servegen() -> ServeGen:
    """Return the clients of ServeGen's three largest models."""
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
    """Return the requests per second of ServeGen's three models, [models, windows]: the sums over
    their clients, NaN in a gap of the recording."""
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
    """Join low and high bytes into numbers. Compressed apart they are a fifth smaller."""
    numbers = planes.astype(np.int64)
    joined: NDArray[np.int64] = numbers[0] + 256 * numbers[1]
    return joined


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    array.flags.writeable = False
    return array
