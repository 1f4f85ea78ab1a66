"""The workloads that a simulation can be asked for, by name or from a file.

Every builder is deterministic in its seed. Each model draws from a stream of its own, so that one
more model leaves the requests of the others as they were, where it leaves their rates.
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
from .requests import Stream, Workload, alone, check, join, shares, stream_rng
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
    """Replays of the Azure 2023 trace: of one ``service``, "conv" or "code", of "both" together, or
    by default of the conversation service for the first model and every second one after, and of
    the code service, with its long bursts, for the others.

    Model i has the share (i + 1)^-alpha of ``rate`` requests per second. The history are seven
    days, each of which has the rates of this one and other requests: the trace is an hour, so the
    hour repeats through the day, and what a forecast can learn from the past days is all there is.

    Raises ValueError for no models, a rate or duration that is negative or not finite, or a window
    that does not divide the day.
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
    """As ``azure``, from the Mooncake conversation trace: long prompts. Its times are known to 3 s;
    within those, requests are spread evenly."""
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
    """Stationary Poisson arrivals of which model i has the share (i + 1)^-alpha, with tokens from
    the conversations of the Azure trace. Raises as ``azure`` does."""
    check(models, rate, duration, window)
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
                service=alone(models[i], prompts.mean(), source.output.mean()),
                dispersion=np.ones(len(past)),
            )
        )
    return join("power-law", models, streams, duration, window)


def read_trace(path: str | Path, models: Sequence[ModelProfile]) -> Workload:
    """The requests of a file of columns t_s, model, input_tokens and output_tokens, as they are,
    and no history; the duration is the last request's time, rounded up to a second.

    Raises TraceError (a ValueError) for whatever is wrong with it, see ``read_columns``; OSError
    where it cannot be read; ValueError for no models.
    """
    check(models, 0.0, 1.0, 300.0)
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
        service=np.array([alone(each, prompt.mean(), output.mean()) for each in models]),
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
    """A workload by one of NAMES, or from the file of that path, whose rate and duration are its
    own. Raises ValueError for what is neither, and what the builders raise."""
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
    raise ValueError(f"{spec!r} is no workload and no file; there are {', '.join(NAMES)}")


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
    check(models, rate, duration, window)
    streams = []
    for i, share in enumerate(shares(len(models), alpha)):
        source, rng = sources[i], stream_rng(seed, i)
        replay = Replay(source, share * rate, rng)
        time, row = replay.run(duration)
        prompts = np.minimum(source.prompt, prompt_cap)
        service = alone(models[i], prompts.mean(), source.output.mean())
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
    return join(name, models, streams, duration, window)
