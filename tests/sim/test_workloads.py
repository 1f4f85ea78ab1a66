"""A workload that differs from its description makes every comparison on it wrong."""

from __future__ import annotations

import numpy as np
import pytest

from warmserve_rt.sim.workload import catalogue, traces, workloads
from warmserve_rt.sim.workload.workloads import NAMES, Workload, parse, shares

MODELS = catalogue.mixed(8)


def arrays(workload: Workload) -> list[np.ndarray]:
    names = ("time", "model", "prompt", "output", "history", "service", "dispersion")
    return [getattr(workload, name) for name in names]


def scatter(time: np.ndarray, width: float, duration: float) -> float:
    """Return variance over mean of the number of requests in intervals of ``width`` seconds."""
    counts = np.bincount((time / width).astype(int), minlength=round(duration / width))
    return float(counts.var() / counts.mean())


# Every workload by name.


@pytest.mark.parametrize("name", NAMES)
def test_a_workload_is_well_formed(name: str):
    workload = parse(name, MODELS, 20, 1500, seed=3)
    time = workload.time
    assert (np.diff(time) >= 0).all()
    assert time[0] >= 0
    assert time[-1] < workload.duration == 1500
    assert set(np.unique(workload.model)) <= set(range(8))
    assert workload.output.min() >= 1
    assert workload.prompt.min() >= 1
    assert [a.dtype for a in arrays(workload)[:4]] == [np.float64, np.int32, np.int32, np.int32]
    assert workload.history.shape == workload.dispersion.shape == (7 * 288, 8)
    assert workload.history_window == 300
    averages, peaks = workload.concurrency_history()
    assert averages.shape == peaks.shape == workload.history.shape
    known = ~np.isnan(workload.history)
    assert (peaks >= averages)[known].all()
    assert np.array_equal(np.isnan(peaks), ~known)


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_determines_the_workload(name: str):
    first, again, other = (parse(name, MODELS, 20, 600, seed) for seed in (5, 5, 6))
    for a, b in zip(arrays(first), arrays(again), strict=True):
        assert a.tobytes() == b.tobytes()
    assert first.time.tobytes() != other.time.tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_the_total_rate_matches_the_argument(name: str):
    # The rate holds for the whole trace; a shorter run has the rate of its part of the trace.
    workload = parse(name, MODELS, 30, 3540, seed=1)
    assert len(workload.time) / 3540 == pytest.approx(30, rel=0.03)


@pytest.mark.parametrize("name", ["azure", "mooncake", "power-law"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.5])
def test_popularity_follows_the_power_law(name: str, alpha: float):
    workload = parse(name, MODELS, 30, 3540, seed=2, alpha=alpha)
    expected = shares(8, alpha) * len(workload.time)
    counts = np.bincount(workload.model, minlength=8)
    assert counts == pytest.approx(expected, rel=0.03, abs=4 * np.sqrt(expected.max()))
    assert shares(4, 1.0) == pytest.approx(np.array([12, 6, 4, 3]) / 25)


@pytest.mark.parametrize("mix", traces.CLASSES)
def test_tenants_have_their_share_over_the_recorded_days(mix: str):
    """This holds for the history only: in the run a tenant is as busy as it was in those hours."""
    whole = [workloads.servegen(mix, MODELS[:2], 10, 600, seed, alpha=1.0) for seed in range(24)]
    first, second = (np.mean([np.nanmean(w.history[:, i]) for w in whole]) for i in (0, 1))
    assert first > second > 0


@pytest.mark.parametrize("name", ["azure", "mooncake", "power-law"])
def test_an_additional_model_leaves_other_models_requests_unchanged(name: str):
    alone = parse(name, MODELS[:3], 10, 1200, seed=4)
    more = parse(name, MODELS[:4], 10 / shares(4, 0.5)[:3].sum(), 1200, seed=4)
    mine = more.model < 3
    assert np.array_equal(alone.time, more.time[mine])
    assert np.array_equal(alone.prompt, more.prompt[mine])
    assert np.array_equal(alone.history, more.history[:, :3])


def test_an_additional_tenant_leaves_other_tenants_requests_unchanged():
    few = workloads.servegen("periodic", MODELS[:3], 10, 600, 4, day=9, hour=10)
    more = workloads.servegen("periodic", MODELS[:4], 10, 600, 4, day=9, hour=10)
    ratio = np.nanmean(more.history, axis=0)[:3] / np.nanmean(few.history, axis=0)
    assert ratio == pytest.approx(ratio[0], rel=0.1), "the clients differ from before"
    assert ratio.max() < 1


# Bursts.


def test_thinning_keeps_bursts():
    """The code service at a quarter of its rate is still far from Poisson."""
    workload = workloads.azure(MODELS[:2], 1.5, 3500, seed=1, alpha=0.0)
    code = workload.time[workload.model == 1]
    assert len(code) / 3500 == pytest.approx(0.75, rel=0.15)
    assert scatter(code, 5, 3500) > 5
    poisson = workloads.power_law(MODELS[:1], 0.75, 3500, seed=1)
    assert scatter(poisson.time, 5, 3500) < 1.5


def test_a_replay_uses_the_smallest_sufficient_number_of_copies():
    workload = workloads.azure(MODELS[:2], 20, 3500, seed=1, alpha=0.0)
    assert scatter(workload.time[workload.model == 1], 5, 3500) > 20


def test_recording_steps_cause_no_bursts():
    """Mooncake's clock ticks every 3 s: ten requests at one tick are ten requests in 3 s."""
    workload = workloads.mooncake(MODELS[:1], 3, 3500, seed=1)
    assert len(np.unique(workload.time)) == len(workload.time)
    assert scatter(workload.time, 0.5, 3500) < 2


# History.


@pytest.mark.parametrize("name", ["azure", "mooncake", "power-law"])
def test_the_history_has_the_rates_of_the_run(name: str):
    workload = parse(name, MODELS, 40, 3600, seed=7)
    days = workload.history.reshape(7, 288, 8)
    windows = (workload.time // 300).astype(int)
    run = np.zeros((12, 8))
    np.add.at(run, (windows, workload.model), 1 / 300)
    past = days[:, :12].mean(axis=0)
    # Poisson noise of one count of the run and seven of the past.
    noise = np.sqrt(past * 300 * (1 + 1 / 7)) / 300
    assert (np.abs(run - past) / noise < 5).all()
    assert not np.array_equal(days[0], days[1])
    assert days.mean(axis=(0, 1)).sum() == pytest.approx(40, rel=0.03)


def test_the_history_ends_where_the_run_begins():
    """At the same scale, two runs of one client an hour apart see that hour from both sides."""
    early, late = (
        workloads.servegen("periodic", MODELS[:1], 20, 3600, 27, day=10, hour=hour)
        for hour in (9, 10)
    )
    before, after = early.history[12:, 0], late.history[:-12, 0]
    assert np.corrcoef(before, after)[0, 1] > 0.98
    scale = after.mean() / before.mean()
    assert late.history[-12:, 0].mean() / scale == pytest.approx(20, rel=0.1)


@pytest.mark.parametrize("window", [60.0, 200.0, 600.0, 1200.0, 2400.0])
def test_the_history_has_windows_of_any_fitting_length(window: float):
    replayed = workloads.azure(MODELS[:3], 9, 900, 1, window=window)
    tenants, usual = (
        workloads.servegen("middle", MODELS[:3], 9, 900, 1, day=9, hour=3, window=w)
        for w in (window, 300.0)
    )
    for workload in (replayed, tenants):
        assert workload.history.shape == (round(7 * 86400 / window), 3)
        assert workload.dispersion.shape == workload.history.shape
    assert np.nanmean(tenants.history) == pytest.approx(np.nanmean(usual.history), rel=0.1)


def test_gaps_in_the_recording_are_gaps_in_the_history():
    seen = [workloads.servegen("periodic", MODELS, 10, 600, seed) for seed in range(4)]
    assert any(np.isnan(workload.history).any() for workload in seen)
    for workload in seen:
        assert not np.isnan(workload.history).all(axis=1).any(), "no model has data in some window"


def test_concurrency_history_matches_a_fleet_without_queues():
    """Compare with the requests themselves, each served alone by unlimited servers."""
    for name, tolerance in (("power-law", 0.12), ("azure", 0.25)):
        workload = parse(name, MODELS[:4], 20, 3600, seed=9)
        average, peak = (x.reshape(7, 288, 4)[:, :12] for x in workload.concurrency_history())
        for i, model in enumerate(workload.models):
            mine = workload.model == i
            start = workload.time[mine]
            seconds = np.array(
                [
                    model.prefill(p) + o * model.decode(1)
                    for p, o in zip(workload.prompt[mine], workload.output[mine], strict=True)
                ]
            )
            events = np.concatenate([start, start + seconds])
            order = np.argsort(events, kind="stable")
            level = np.cumsum(np.repeat([1, -1], len(start))[order])
            window = (events[order] // 300).astype(int)
            highest = [level[window == w].max() for w in range(12)]
            assert average[:, :, i].mean() == pytest.approx(seconds.sum() / 3600, rel=0.1)
            assert peak[:, :, i].mean() == pytest.approx(np.mean(highest), rel=tolerance)


# Bad input.


@pytest.mark.parametrize("name", NAMES)
def test_invalid_arguments_are_refused(name: str):
    for rate in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"requests per second, got {rate}"):
            parse(name, MODELS, rate, 60, 0)
    for duration in (0, -5, float("nan"), float("inf")):
        with pytest.raises(
            ValueError, match=f"duration must be finite and positive seconds, got {duration}"
        ):
            parse(name, MODELS, 1, duration, 0)
    with pytest.raises(ValueError, match="must have at least one model, got none"):
        parse(name, (), 1, 60, 0)
    with pytest.raises(ValueError, match="two models have the name 'llama2-7b-0'"):
        parse(name, (MODELS[0], MODELS[0]), 1, 60, 0)


def test_windows_that_do_not_divide_the_day_are_refused():
    with pytest.raises(ValueError, match=r"a whole number of windows, got windows of 7\.0 s"):
        workloads.azure(MODELS, 1, 60, 0, window=7.0)
    with pytest.raises(ValueError, match="must divide ServeGen's 600 s"):
        workloads.servegen("middle", MODELS, 1, 60, 0, window=400.0)


def test_runs_outside_the_record_are_refused():
    for day in (7, 15):
        with pytest.raises(ValueError, match=f"day must be from 8 to 14, got {day}"):
            workloads.servegen("periodic", MODELS, 1, 60, 0, day=day)
    for hour in (-1, 24, float("nan")):
        with pytest.raises(ValueError, match=f"hour must be at least 0 and below 24, got {hour}"):
            workloads.servegen("periodic", MODELS, 1, 60, 0, hour=hour)
    with pytest.raises(ValueError, match="past the end of day 14"):
        workloads.servegen("periodic", MODELS, 1, 7200, 0, day=14, hour=23)
    with pytest.raises(ValueError, match="from day 10, hour 9, every tenant is silent"):
        workloads.servegen("periodic", MODELS[:1], 1, 3600, 11, day=10, hour=9.1)
    with pytest.raises(ValueError, match="'daily' is no class of clients"):
        workloads.servegen("daily", MODELS, 1, 60, 0)


def test_an_unknown_name_lists_the_names():
    with pytest.raises(
        ValueError, match="'azur' is neither a file nor a workload: choose one of azure,"
    ):
        parse("azur", MODELS, 1, 60, 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_rate_of_zero_gives_no_requests(name: str):
    workload = parse(name, MODELS, 0, 60, 0)
    assert len(workload.time) == 0
    assert np.nansum(workload.history) == 0
    assert np.nansum(workload.concurrency_history()[1]) == 0
