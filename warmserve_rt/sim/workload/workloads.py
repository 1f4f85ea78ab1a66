"""Build the workloads of a simulation, by name or from a file.

Every builder is deterministic in its seed. Each model draws from its own random stream. An
additional model therefore leaves the requests of the others unchanged if it leaves their rates
unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from warmserve_rt.policy.profile import ModelProfile

from . import traces
from .arrivals import DAY, PAST_DAYS, Replay
from .requests import (
    Stream,
    Workload,
    check_arguments,
    join_streams,
    seconds_alone,
    shares,
    stream_rng,
)
from .tenants import servegen
from .trace_file import TraceError, read_columns

__all__ = [
    "NAMES",
    "TraceError",
    "Workload",
    "azure",
    "mooncake",
    "parse",
    "power_law",
    "read_trace",
    "servegen",
    "shares",
]


def azure(
    models: Sequence[ModelProfile],
    rate: float,
    duration: float,
    seed: int,
    alpha: float = 0.5,
    prompt_cap: int = 1024,
    window: float = 300.0,
    service: str | None = None,
) -> Workload:
    """Build a workload of replays of the Azure 2023 trace.

    Model i has the share (i + 1)^-alpha of the rate. The history has seven days with the rates of
    this day and other requests. The trace is one hour long, so that the hour repeats through the
    day; a forecast can learn no more than these days show.

    Parameters
    ----------
    models
        The profiles of the models.
    rate
        Requests per second of all models together.
    duration
        Seconds in which requests arrive.
    seed
        The seed of all draws.
    alpha
        The exponent of the models' shares.
    prompt_cap
        The largest number of prompt tokens; longer prompts are cut.
    window
        Seconds of a history window; must divide the day.
    service
        "conv", "code", or "both" together for all models. By default the first model and every
        second one after it have the conversation service, and the others the code service with its
        long bursts.

    Raises
    ------
    ValueError
        If there are no models, if the rate or the duration is negative or not finite, or if the
        window does not divide the day.
    """
    kinds = [
        traces.azure(None if service == "both" else service or ("code" if i % 2 else "conv"))
        for i in range(len(models))
    ]
    name = f"azure-{service}" if service else "azure"
    return _replayed(name, kinds, models, rate, duration, seed, alpha, prompt_cap, window)


def mooncake(
    models: Sequence[ModelProfile],
    rate: float,
    duration: float,
    seed: int,
    alpha: float = 0.5,
    prompt_cap: int = 8192,
    window: float = 300.0,
) -> Workload:
    """Build a workload as ``azure`` does, from the Mooncake conversation trace with long prompts.

    The times of the trace are known to 3 s; requests are spread evenly within them.
    """
    kinds = [traces.mooncake()] * len(models)
    return _replayed("mooncake", kinds, models, rate, duration, seed, alpha, prompt_cap, window)


def power_law(
    models: Sequence[ModelProfile],
    rate: float,
    duration: float,
    seed: int,
    alpha: float = 0.5,
    prompt_cap: int = 1024,
    window: float = 300.0,
) -> Workload:
    """Build a workload of stationary Poisson arrivals, of which model i has the share
    (i + 1)^-alpha.

    Tokens are drawn from the conversations of the Azure trace. Parameters and errors are those of
    ``azure``.
    """
    check_arguments(models, rate, duration, window)
    source = traces.azure("conv")
    streams = []
    for i, share in enumerate(shares(len(models), alpha)):
        rng = stream_rng(seed, i)
        time = np.sort(rng.uniform(0, duration, rng.poisson(share * rate * duration)))
        row = rng.integers(len(source.time), size=len(time))
        past = rng.poisson(share * rate * window, round(DAY / window) * PAST_DAYS)
        prompts = np.minimum(source.prompt, prompt_cap)
        streams.append(
            Stream(
                time=time,
                prompt=prompts[row].astype(np.int64),
                output=source.output[row].astype(np.int64),
                history=past / window,
                service=seconds_alone(models[i], prompts.mean(), source.output.mean()),
                dispersion=np.ones(len(past)),
            )
        )
    return join_streams("power-law", models, streams, duration, window)


def read_trace(path: str | Path, models: Sequence[ModelProfile]) -> Workload:
    """Return the requests of a file as a workload without a history.

    The duration is the time of the last request, rounded up to the next whole second.

    Parameters
    ----------
    path
        A file with columns t_s, model, input_tokens and output_tokens; see ``read_columns``.
    models
        The profiles of the models.

    Raises
    ------
    TraceError
        If the file is invalid. A subclass of ValueError.
    OSError
        If the file cannot be read.
    ValueError
        If there are no models.
    """
    check_arguments(models, 0.0, 1.0, 300.0)
    time, model, prompt, output = read_columns(path, [each.name for each in models])
    return Workload(
        name=Path(path).name,
        models=tuple(models),
        time=time,
        model=model,
        prompt=prompt,
        output=output,
        duration=math.floor(time[-1]) + 1.0,
        history_window=300.0,
        history=np.zeros((0, len(models))),
        service=np.array([seconds_alone(each, prompt.mean(), output.mean()) for each in models]),
        dispersion=np.ones((0, len(models))),
    )


NAMES = ("azure", "azure-conv", "mooncake", "power-law", *(f"servegen-{x}" for x in traces.CLASSES))


def parse(
    spec: str,
    models: Sequence[ModelProfile],
    rate: float,
    duration: float,
    seed: int,
    alpha: float = 0.5,
) -> Workload:
    """Build a workload by name or from a file.

    Parameters
    ----------
    spec
        One of NAMES, or the path of a file. A file has its own rate and duration.
    models, rate, duration, seed, alpha
        See ``azure``.

    Raises
    ------
    ValueError
        If ``spec`` is neither, or as the builders do.
    """
    builders: dict[str, Callable[..., Workload]] = {
        "azure": azure,
        "azure-conv": partial(azure, service="conv"),
        "mooncake": mooncake,
        "power-law": power_law,
    }
    if spec in builders:
        return builders[spec](models, rate, duration, seed, alpha)
    if spec in NAMES:
        mix = spec.removeprefix("servegen-")
        return servegen(mix, models, rate, duration, seed, alpha=alpha)
    if Path(spec).is_file():
        return read_trace(spec, models)
    raise ValueError(f"{spec!r} is neither a file nor a workload: choose one of {', '.join(NAMES)}")


def _replayed(
    name: str,
    sources: Sequence[traces.Trace],
    models: Sequence[ModelProfile],
    rate: float,
    duration: float,
    seed: int,
    alpha: float,
    prompt_cap: int,
    window: float,
) -> Workload:
    check_arguments(models, rate, duration, window)
    streams = []
    for i, share in enumerate(shares(len(models), alpha)):
        source, rng = sources[i], stream_rng(seed, i)
        replay = Replay(source, share * rate, rng)
        time, row = replay.run(duration)
        prompts = np.minimum(source.prompt, prompt_cap)
        service = seconds_alone(models[i], prompts.mean(), source.output.mean())
        past = replay.history(window)
        spread = replay.dispersion(min(service, window / 2), window)
        streams.append(
            Stream(
                time=time,
                prompt=prompts[row].astype(np.int64),
                output=source.output[row].astype(np.int64),
                history=past / window,
                service=service,
                dispersion=np.full(len(past), spread),
            )
        )
    return join_streams(name, models, streams, duration, window)
