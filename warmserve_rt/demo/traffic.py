"""Requests for the demo's tenants: minutes of a recorded trace, compressed in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from warmserve_rt.policy.forecast import Forecaster
from warmserve_rt.policy.profile import ModelProfile
from warmserve_rt.sim.workload.requests import Workload, seconds_alone
from warmserve_rt.sim.workload.workloads import azure

from .lessons import QUESTIONS
from .workload import Request

# From one question to all of them: prompts of the different lengths that a small model can handle.
PROMPTS = tuple(" ".join(QUESTIONS[:count]) for count in range(1, len(QUESTIONS) + 1))
TRACE_S = 540.0  # seconds of the trace that are used
WINDOW_S = 300.0  # seconds of a window of its history


@dataclass(frozen=True, slots=True)
class Traffic:
    """The same requests for the simulation and for the real run.

    Request i of the ``workload`` is ``requests[i]`` and asks for ``outputs[i]`` tokens.
    """

    workload: Workload
    requests: list[Request]
    outputs: list[int]


def traffic(
    profiles: Sequence[ModelProfile],
    prompts: dict[str, list[int]],
    wanted: dict[tuple[str, str], list[int]],
    *,
    count: int,
    seconds: float,
    seed: int,
) -> Traffic:
    """Draw requests from nine minutes of the Azure trace of 2023, compressed in time.

    Every second tenant gets conversations, the others code. The past days are compressed by the
    same factor.

    Parameters
    ----------
    profiles : sequence of ModelProfile
        The tenants.
    prompts : mapping of prompt to token ids
        The token ids of PROMPTS. The rank of the trace's prompt length selects the prompt.
    wanted : mapping of (tenant, prompt) to token ids
        The expected answers. An output has the trace's length, but at least 2 tokens and at most
        those of the expected answer.
    count : int
        Number of requests.
    seconds : float
        Time into which the nine minutes are compressed.
    seed : int
        Seed of the choice.
    """
    faster = TRACE_S / seconds
    rate = count / TRACE_S
    recorded = drawn = azure(profiles, rate, TRACE_S, seed, window=WINDOW_S)
    while len(drawn.time) < count:
        rate *= 1.5
        drawn = azure(profiles, rate, TRACE_S, seed, window=WINDOW_S)
    # Keep exactly `count` of them, chosen at random from the nine minutes.
    kept = np.sort(np.random.default_rng(seed).choice(len(drawn.time), count, replace=False))
    parts = {part: getattr(drawn, part)[kept] for part in ("time", "model", "prompt", "output")}
    recorded = replace(recorded, **parts)
    total = len(recorded.time)
    rank = np.argsort(np.argsort(recorded.prompt, kind="stable")) * len(PROMPTS) // max(total, 1)
    requests, outputs = [], []
    for time, model, place, output in zip(
        recorded.time, recorded.model, rank, recorded.output, strict=True
    ):
        request = Request(float(time) / faster, profiles[model].name, PROMPTS[place])
        requests.append(request)
        outputs.append(min(max(int(output), 2), len(wanted[request.tenant, request.prompt])))
    lengths = np.array([len(prompts[request.prompt]) for request in requests], np.int32)
    mean = float(lengths.mean()), float(np.mean(outputs)) - 1
    workload = replace(
        recorded,
        name=f"{recorded.name}, {faster:g} times as fast",
        time=recorded.time / faster,
        prompt=lengths,
        output=np.array(outputs, np.int32),
        duration=seconds,
        history_window=WINDOW_S / faster,
        history=recorded.history * faster,
        service=np.array([seconds_alone(profile, *mean) for profile in profiles]),
    )
    return Traffic(workload, requests, outputs)


def forecaster(workload: Workload) -> Forecaster:
    """Return a forecaster that has observed the workload's compressed history."""
    window = workload.history_window
    made = Forecaster(
        len(workload.models),
        window=window,
        horizons=(window, 12 * window, 36 * window),
        period=86400 / WINDOW_S * window,
    )
    averages, peaks = workload.concurrency_history()
    made.observe_windows(-window * len(averages), averages, peaks)
    return made
