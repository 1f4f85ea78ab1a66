"""Use the beginning of a workload without a history as its history."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from .workloads import Workload


def with_history(workload: Workload, seconds: float) -> Workload:
    """Return the workload with its first ``seconds`` as history and the rest as the run.

    The history is rounded down to whole windows. The dispersion is that of the counts in intervals
    as long as a request takes alone, over the whole history. If the history has no request, or
    fewer than two such intervals, the dispersion is that of a Poisson process.

    Parameters
    ----------
    workload
        A workload without a history.
    seconds
        The seconds that become the history.

    Raises
    ------
    ValueError
        If the history has no whole window, or the run has no request.
    """
    windows = math.floor(seconds / workload.history_window) if seconds > 0 else 0
    if windows < 1:
        raise ValueError(
            f"{workload.name} has no history to forecast from: give the number of first minutes "
            f"that are history (--history), at least {workload.history_window / 60:g}"
        )
    past = windows * workload.history_window
    begin = int(np.searchsorted(workload.time, past))
    if begin == len(workload.time):
        raise ValueError(f"{workload.name} has no requests after its first {past / 60:g} minutes")
    models = len(workload.models)
    history, dispersion = np.zeros((windows, models)), np.ones((windows, models))
    for model in range(models):
        times = workload.time[:begin][workload.model[:begin] == model]
        counts, _ = np.histogram(times, bins=windows, range=(0.0, past))
        history[:, model] = counts / workload.history_window
        intervals = math.floor(past / workload.service[model])
        if intervals > 1 and len(times):
            fine, _ = np.histogram(times, bins=intervals, range=(0.0, past))
            dispersion[:, model] = max(1.0, fine.var() / fine.mean())
    return replace(
        workload,
        time=workload.time[begin:] - past,
        model=workload.model[begin:],
        prompt=workload.prompt[begin:],
        output=workload.output[begin:],
        duration=workload.duration - past,
        history=history,
        dispersion=dispersion,
    )
