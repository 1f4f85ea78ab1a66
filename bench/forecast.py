"""How far is the load forecast from the actual load, and does its hedge find the best expert?

The tenants are ServeGen's 313 clients, in windows of ten minutes over 14 days. Days 1 to 7 are
history. On days 8 to 14 every window is forecast from earlier ones, 10 minutes, 1 hour and 3 hours
ahead, by each expert alone and by the hedge over them. A tenant's rate stands for its concurrent
requests: the two differ by the factor of a request's duration, and all formulas here are
independent of scale.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from time import perf_counter
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lib.harness import Bench
from warmserve_rt.policy.ensemble import EXPERTS, Expert
from warmserve_rt.policy.forecast import Forecaster
from warmserve_rt.sim.workload.traces import SERVEGEN_MODELS, servegen

WINDOW, DAY, HISTORY = 600.0, 144, 7 * 144
HORIZONS = {"10m": 600.0, "1h": 3600.0, "3h": 10800.0}
QUANTILE = 0.9
ALL: tuple[Expert | Literal["hedge"], ...] = ("hedge", *EXPERTS)
Array = NDArray[np.float64]


def tenants() -> tuple[list[str], Array, Array]:
    """Return each tenant's model, its autocorrelation at one day, and its requests per second.

    The rates are an array [tenants, windows], with NaN in gaps of the model's recording.
    """
    traffic = servegen()
    models = [SERVEGEN_MODELS[model] for model in traffic.model]
    return models, traffic.acf_day.astype(np.float64), traffic.rates.astype(np.float64)


def forecasts(
    rates: Array, expert: Expert | Literal["hedge"]
) -> tuple[dict[str, Array], dict[str, Array], float]:
    """Return average and upper forecasts by horizon, and the mean seconds of a window.

    Each forecast is an array [series, windows], indexed by the window that it is for.
    """
    series, windows = rates.shape
    forecaster = Forecaster(
        series,
        window=WINDOW,
        horizons=tuple(HORIZONS.values()),
        quantile=QUANTILE,
        expert=expert,
    )
    averages = {name: np.full(rates.shape, np.nan) for name in HORIZONS}
    uppers = {name: np.full(rates.shape, np.nan) for name in HORIZONS}
    begin = perf_counter()
    for window in range(windows):
        # Only forecasts for windows after the history are made.
        for name, horizon in HORIZONS.items():
            target = window - 1 + round(horizon / WINDOW)
            if window and HISTORY <= target < windows:
                made = forecaster.forecast(window * WINDOW, horizon)
                averages[name][:, target], uppers[name][:, target] = made.average, made.upper
        values = rates[None, :, window]
        forecaster.observe_windows(window * WINDOW, values, values)
    return averages, uppers, (perf_counter() - begin) / windows


def wape(actual: Array, forecast: Array, of: NDArray[np.bool_]) -> float:
    """Return the sum of the absolute errors over the sum of the actual values."""
    return float(np.abs(forecast - actual)[of].sum() / actual[of].sum())


def pinball(actual: Array, upper: Array, of: NDArray[np.bool_]) -> float:
    """Return the quantile loss over the sum of the actual values."""
    over = (actual - upper)[of]
    return float(np.maximum(QUANTILE * over, (QUANTILE - 1) * over).sum() / actual[of].sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    bench = Bench.start("forecast", parser)
    models, daily, rates = tenants()
    if bench.args.quick:  # one day after the history
        rates = rates[:, : HISTORY + DAY]
    totals = {name: rates[np.array(models) == name].sum(0) for name in sorted(set(models))}
    series = np.vstack([rates, *totals.values()])

    tested = ~np.isnan(series)
    tested[:, :HISTORY] = False
    of_class = {
        "periodic": tested[: len(rates)] & (daily > 0.5)[:, None],
        "middle": tested[: len(rates)] & ((daily >= 0.1) & (daily <= 0.5))[:, None],
        "aperiodic": tested[: len(rates)] & (daily < 0.1)[:, None],
    }
    made: dict[str, dict[str, Array]] = {}
    uppers: dict[str, Array] = {}
    spent = 0.0
    for expert in ALL:
        made[expert], upper, seconds = forecasts(series, expert)
        if expert == "hedge":
            uppers, spent = upper, seconds

    for number, name in enumerate(totals, start=len(rates)):
        for label, by_horizon in made.items():
            error = wape(series[number], by_horizon["10m"][number], tested[number])
            bench.row(f"wape_{name}_{label}", error, "")
    report_hedge(bench, rates, made, of_class)
    report_upper(bench, rates, uppers, of_class)
    bench.row("window_316_series", spent * 1e6, "us")
    bench.finish()


def report_hedge(
    bench: Bench,
    rates: Array,
    made: Mapping[str, Mapping[str, Array]],
    of_class: Mapping[str, NDArray[np.bool_]],
) -> None:
    """Compare the hedge with the best expert in hindsight, for each class and horizon."""
    ratios = []
    for name, of in of_class.items():
        for horizon in HORIZONS:
            errors = {
                expert: wape(rates, by_horizon[horizon][: len(rates)], of)
                for expert, by_horizon in made.items()
            }
            hedge = errors["hedge"]
            ratios.append(hedge / min(errors[expert] for expert in EXPERTS))
            for expert, error in errors.items():
                bench.row(f"wape_{name}_{horizon}_{expert}", error, "")
            bench.row(f"hedge_vs_best_expert_{name}_{horizon}", ratios[-1], "x")
    bench.target("hedge_vs_best_expert_max", max(ratios), "x", "<=", 1.08)


def report_upper(
    bench: Bench,
    rates: Array,
    uppers: Mapping[str, Array],
    of_class: Mapping[str, NDArray[np.bool_]],
) -> None:
    """Report how often the upper forecast covered the actual load.

    An idle window that was forecast as idle is always covered, and mostly idle tenants have few
    other windows. The targets therefore leave these windows out; the rows "_with_idle" include
    them. The rows "_awake" choose windows without the forecast: those of tenants that had load
    within the last day.
    """
    awake = _awake(rates)
    kinds: dict[str, list[float]] = {"": [], "_with_idle": [], "_awake": []}
    hits, count = 0, 0
    for name, of in of_class.items():
        for horizon in HORIZONS:
            upper = uppers[horizon][: len(rates)]
            loaded = of & ((rates > 0) | (upper > 0))
            for kind, windows in zip(kinds, (loaded, of, of & awake), strict=True):
                covered = float((rates <= upper)[windows].mean())
                kinds[kind].append(covered)
                bench.row(f"upper_coverage{kind}_{name}_{horizon}", covered, "")
            hits += int((rates <= upper)[loaded].sum())
            count += int(loaded.sum())
            bench.row(f"pinball_{name}_{horizon}", pinball(rates, upper, of), "")
    for kind in ("_with_idle", "_awake"):
        bench.row(f"upper_coverage{kind}_min", min(kinds[kind]), "")
        bench.row(f"upper_coverage{kind}_max", max(kinds[kind]), "")
    bench.row("upper_coverage", hits / count, "")
    bench.target("upper_coverage_min", min(kinds[""]), "", ">=", 0.88)
    bench.target("upper_coverage_max", max(kinds[""]), "", "<=", 0.92)


def _awake(rates: Array) -> NDArray[np.bool_]:
    """Return whether there was load in the day up to and including each window."""
    sums = np.cumsum(np.nan_to_num(rates), axis=1)
    before = np.zeros_like(sums)
    before[:, DAY:] = sums[:, :-DAY]
    awake: NDArray[np.bool_] = sums - before > 1e-9
    return awake


if __name__ == "__main__":
    main()
