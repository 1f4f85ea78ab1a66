"""Measures the costs of serving on this machine, for the scheduler and the simulator."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from warmserve_rt import Lease, Runtime
from warmserve_rt.policy.pipeline import first_token_by_prefix
from warmserve_rt.policy.profile import ModelProfile

from .transformers_rows import generate

ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Costs:
    """The costs of serving one model.

    Attributes
    ----------
    bandwidth : float
        Loading, in bytes per second.
    switch_s : float
        Seconds that a first token of a cold model takes beyond perfectly overlapped loading and
        computing: the lease, pages touched for the first time, and the slowdown of computing while
        layers load.
    prefill_s, prefill_token_s : float
        Seconds of a prefill, and in addition for each of its tokens.
    decode_s : float
        Seconds of a decode step.
    check_s : float
        Seconds of comparing a leased model with its file.
    """

    bandwidth: float
    switch_s: float
    prefill_s: float
    prefill_token_s: float
    decode_s: float
    check_s: float

    def numbers(self) -> dict[str, float]:
        return {name: float(f"{value:.4g}") for name, value in asdict(self).items()}


def measure(
    runtime: Runtime,
    modules: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    check: Callable[[str], bool],
    tokens: int,
) -> Costs:
    """Measure the costs as medians over several rounds on an idle runtime.

    No layer is resident afterwards.

    Parameters
    ----------
    runtime : Runtime
        The runtime with the models.
    modules : mapping of name to module
        The models by name; the first ``ROUNDS`` of them are measured.
    prompts : sequence of token ids
        Prompts of different lengths.
    check : callable
        Compares the bytes of a leased tenant.
    tokens : int
        Tokens of an answer.
    """
    loads, checks, steps, cold = [], [], [], []
    prefills: list[tuple[int, float]] = []
    for name, module in list(modules.items())[:ROUNDS]:
        _evict(runtime, modules)
        nbytes = runtime.model(name).nbytes
        loads.append(nbytes / _seconds(partial(_hold, runtime.lease(name))))
        with runtime.lease(name):
            for prompt in prompts:
                begun = time.monotonic()
                at = [time.monotonic() - begun for _ in generate(module, list(prompt), tokens, -1)]
                prefills.append((len(prompt), at[0]))
                steps.append((at[-1] - at[0]) / (len(at) - 1))
            checks.append(_seconds(partial(check, name)))
        for prompt in prompts:
            _evict(runtime, modules)
            begun = time.monotonic()
            with runtime.lease(name, streaming=True):
                next(generate(module, list(prompt), 1, -1))
                cold.append((len(prompt), time.monotonic() - begun))
    _evict(runtime, modules)
    lengths = sorted({length for length, _ in prefills})
    medians = [np.median([s for n, s in prefills if n == length]) for length in lengths]
    slope, base = np.polyfit(lengths, medians, 1) if len(lengths) > 1 else (0.0, medians[0])
    if slope < 0 or base < 0:  # the noise exceeds the effect of the prompt's length
        slope, base = 0.0, float(np.median(medians))
    bandwidth = float(np.median(loads))
    moved = np.array([layer.nbytes for layer in runtime.model(name).layers]) / bandwidth
    ideal = ModelProfile(name, 1, (1,) * len(moved), 0, float(base), float(slope), 0.0)
    extra = [
        seconds - first_token_by_prefix(moved, ideal.compute(ideal.prefill(length)))[0]
        for length, seconds in cold
    ]
    return Costs(
        bandwidth=bandwidth,
        switch_s=max(float(np.median(extra)), 0.0),
        prefill_s=float(base),
        prefill_token_s=float(slope),
        decode_s=float(np.median(steps)),
        check_s=float(np.median(checks)),
    )


def _evict(runtime: Runtime, names: Iterable[str]) -> None:
    for name in names:
        runtime.evict(name)


def _hold(lease: Lease) -> None:
    with lease:
        pass


def _seconds(call: Callable[[], object]) -> float:
    begun = time.monotonic()
    call()
    return time.monotonic() - begun
