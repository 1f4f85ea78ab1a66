"""Check the load forecast: its formulas, and the effects of time, gaps, restarts and bad input."""

from __future__ import annotations

import math
import operator
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from warmserve_rt.policy.ensemble import EXPERTS
from warmserve_rt.policy.forecast import Forecast, Forecaster

WINDOW, SLOTS = 300.0, 6
PERIOD = WINDOW * SLOTS
HORIZONS = (WINDOW, 3 * WINDOW, 8 * WINDOW)
Array = NDArray[np.float64]

loads = st.one_of(st.just(0.0), st.just(math.nan), st.floats(0.0, 100.0))
histories = st.lists(st.tuples(loads, loads), min_size=1, max_size=40)


def small(models: int = 1, **options: object) -> Forecaster:
    """Return a forecaster whose days have six windows."""
    given: dict[str, object] = {"window": WINDOW, "horizons": HORIZONS, "period": PERIOD}
    return Forecaster(models, **{**given, **options})  # type: ignore[arg-type]


def learn(forecaster: Forecaster, values: Array, start: float = 0.0) -> float:
    """Teach windows [windows, models] with peaks of twice the averages; return their end (s)."""
    forecaster.observe_windows(start, values, 2 * values)
    return start + len(values) * WINDOW


def same(one: Forecast, other: Forecast) -> bool:
    return all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("average", "peak", "upper")
    )


def is_sane(made: Forecast) -> bool:
    """Return whether all values are finite and not negative, and no average is above its peak."""
    values = np.stack([made.average, made.peak, made.upper])
    return bool(np.isfinite(values).all() and (values >= 0).all()) and bool(
        (made.average <= made.peak).all()
    )


def papers(values: list[float], ahead: int) -> float:
    """Return the forecast of the paper's predictor, as its text states it, window by window."""
    past: dict[int, list[float]] = {}
    errors: list[float] = []
    last = 0.0
    for number, value in enumerate(values):
        days = past.setdefault(number % SLOTS, [])
        unknown = math.isnan(value)
        errors.append(math.nan if unknown or not days else value - sum(days) / len(days))
        if not unknown:
            days.append(value)
            last = value
    days = past.get((len(values) - 1 + ahead) % SLOTS, [])
    if not days:
        return last
    weighted = [
        (0.5**age, error)
        for age, error in enumerate(reversed(errors[-10:]))
        if not math.isnan(error)
    ]
    recent = sum(w * e for w, e in weighted) / sum(w for w, _ in weighted) if weighted else 0.0
    return max(sum(days) / len(days) + recent, 0.0)


@settings(deadline=None)
@given(histories, st.integers(1, 9))
def test_the_paper_s_predictor_follows_its_formula(
    history: list[tuple[float, float]], ahead: int
) -> None:
    unknown = (math.nan, math.nan)
    known = [unknown if any(map(math.isnan, pair)) else pair for pair in history]
    forecaster = small(expert="paper")
    averages, peaks = (np.array(channel)[:, None] for channel in zip(*history, strict=True))
    forecaster.observe_windows(0.0, averages, peaks)
    made = forecaster.forecast(len(history) * WINDOW, ahead * WINDOW)
    if known.count(unknown) == len(known):
        assert made.average[0] == made.peak[0] == 0  # the level, because no window is known
        return
    average, peak = (papers([pair[i] for pair in known], ahead) for i in (0, 1))
    assert made.average[0] == pytest.approx(average, abs=1e-9)
    assert made.peak[0] == pytest.approx(max(peak, average), abs=1e-9)


@pytest.mark.parametrize(
    ("expert", "expected"),
    [
        ("last", [8.0, 8.0]),
        ("seasonal", [8.0 + (5.0 - 6.0) / 2, 8.0 + (1.0 - 6.0) / 2]),
        ("daily", [5.0, 1.0]),
    ],
)
def test_each_expert_forecasts_by_its_formula(expert: str, expected: list[float]) -> None:
    day = np.array([[9.0], [6.0], [5.0], [1.0], [4.0], [4.0]])
    forecaster = small(expert=expert)
    now = learn(forecaster, np.vstack([day, [[9.0], [8.0]]]))
    made = [forecaster.forecast(now, ahead * WINDOW).average[0] for ahead in (1, 2)]
    assert made == pytest.approx(expected)


def test_the_recent_level_halves_its_distance_in_twenty_minutes() -> None:
    forecaster = small(expert="recent")
    now = learn(forecaster, np.array([[0.0]] + [[8.0]] * 4))
    assert forecaster.forecast(now, WINDOW).average[0] == pytest.approx(4.0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(loads, loads, loads), min_size=1, max_size=40))
def test_models_are_forecast_independently(rows: list[tuple[float, float, float]]) -> None:
    values = np.array(rows)
    together = small(3)
    now = learn(together, values)
    for horizon in (100.0, WINDOW, 700.0, 9 * WINDOW):
        made = together.forecast(now, horizon)
        for model in range(3):
            alone = small()
            learn(alone, values[:, [model]])
            single = alone.forecast(now, horizon)
            assert made.average[model] == pytest.approx(single.average[0], abs=1e-9)
            assert made.peak[model] == pytest.approx(single.peak[0], abs=1e-9)
            assert made.upper[model] == pytest.approx(single.upper[0], abs=1e-9)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.floats(0.0, 400.0), st.integers(0, 50)),
        min_size=1,
        max_size=60,
    )
)
def test_events_give_the_windows_of_a_step_signal(
    events: list[tuple[int, float, int]],
) -> None:
    live, steps, now = small(2), [[(0.0, 0.0)], [(0.0, 0.0)]], 0.0
    live.advance(0.0)
    for model, later, concurrent in events:
        now += later
        live.observe(model, now, concurrent)
        steps[model].append((now, float(concurrent)))
    windows = math.floor(now / WINDOW) + 1
    averages, peaks = np.zeros((windows, 2)), np.zeros((windows, 2))
    for model, signal in enumerate(steps):
        ends = [time for time, _ in signal[1:]] + [windows * WINDOW]
        for (begin, level), end in zip(signal, ends, strict=True):
            for window in range(windows):
                low, high = window * WINDOW, (window + 1) * WINDOW
                averages[window, model] += level * max(min(end, high) - max(begin, low), 0) / WINDOW
                if begin < high and end >= low:  # also at its first instant
                    peaks[window, model] = max(peaks[window, model], level)
    told = small(2)
    told.observe_windows(0.0, averages, peaks)
    end = windows * WINDOW
    for horizon in HORIZONS:
        one, other = live.forecast(end, horizon), told.forecast(end, horizon)
        assert one.average == pytest.approx(other.average, abs=1e-6)
        assert one.peak == pytest.approx(other.peak, abs=1e-6)


def test_no_load_gives_a_forecast_of_exactly_zero() -> None:
    forecaster = small(2)
    now = learn(forecaster, np.zeros((3 * SLOTS, 2)))
    for horizon in (1.0, WINDOW, 500.0, 100 * WINDOW):
        made = forecaster.forecast(now, horizon)
        assert not made.average.any()
        assert not made.peak.any()
        assert not made.upper.any()


def test_a_low_quantile_is_not_below_zero_when_load_ends() -> None:
    forecaster = small(expert="last", quantile=0.1)
    now = learn(forecaster, np.random.default_rng(0).uniform(20, 50, (100, 1)))
    made = forecaster.forecast(now, WINDOW)
    assert made.upper[0] < made.average[0] - 1
    now = learn(forecaster, np.zeros((1, 1)), now)
    assert forecaster.forecast(now, WINDOW).upper[0] == 0


def test_the_forecast_forgets_ended_load_and_follows_its_return() -> None:
    forecaster = Forecaster(1)
    now = learn(forecaster, np.full((288, 1), 10.0))
    now = learn(forecaster, np.zeros((7 * 288, 1)), now)
    made = forecaster.forecast(now, 300.0)
    assert made.average[0] < 0.01
    assert made.upper[0] < 0.1
    now = learn(forecaster, np.full((6, 1), 10.0), now)
    assert forecaster.forecast(now, 300.0).average[0] == pytest.approx(10.0, rel=0.1)


def test_without_a_window_the_level_is_the_forecast() -> None:
    forecaster = Forecaster(2)
    forecaster.observe(1, 1000.0, 7)
    for horizon in (1.0, 300.0, 40_000.0):
        made = forecaster.forecast(1010.0, horizon)
        assert made.average.tolist() == made.peak.tolist() == made.upper.tolist() == [0.0, 7.0]


def test_on_the_first_day_the_last_value_is_the_forecast() -> None:
    forecaster = Forecaster(1)
    now = learn(forecaster, np.array([[4.0], [4.0], [4.0]]))
    for horizon in (300.0, 5000.0, 10_800.0):
        made = forecaster.forecast(now, horizon)
        assert made.average[0] == pytest.approx(4.0)
        assert made.peak[0] == pytest.approx(8.0)


def test_the_current_level_dominates_the_next_seconds() -> None:
    forecaster = small(expert="last")
    now = learn(forecaster, np.full((SLOTS, 1), 2.0))
    forecaster.observe(0, now, 12)
    made = [forecaster.forecast(now, horizon).average[0] for horizon in (1e-3, 75.0, 150.0, 300.0)]
    assert made == pytest.approx([12.0, 9.5, 7.0, 2.0], abs=1e-3)


def test_a_forecast_does_not_leap_where_a_window_or_a_learnt_horizon_ends() -> None:
    forecaster = small()
    random = np.random.default_rng(3)
    now = learn(forecaster, random.uniform(0, 50, (30, 1)))
    forecaster.observe(0, now, 33)
    ends = set(HORIZONS) | {2 * WINDOW, 10 * WINDOW}
    for end in ends:
        before, after = (forecaster.forecast(now, end + step) for step in (-1e-6, 1e-6))
        for name in ("average", "peak", "upper"):
            assert getattr(before, name) == pytest.approx(getattr(after, name), abs=1e-4)
    late = forecaster.forecast(now + WINDOW - 1e-6, WINDOW)  # also in the middle of a window
    assert late.average[0] == pytest.approx(
        forecaster.forecast(now, 2 * WINDOW).average[0], abs=1e-4
    )


def test_history_may_begin_at_a_window_up_to_rounding() -> None:
    forecaster = Forecaster(1, window=0.1, horizons=(0.1,), period=0.6, expert="daily")
    forecaster.observe_windows(0.3, [[float(slot)] for slot in range(6)], np.zeros((6, 1)))
    made = [forecaster.forecast(0.9, 0.1 * ahead).average[0] for ahead in range(1, 7)]
    assert made == pytest.approx([0, 1, 2, 3, 4, 5], abs=1e-6)  # as a float, 0.3 / 0.1 is below 3


def test_a_gap_in_history_teaches_nothing() -> None:
    day = np.array([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]])
    gap = np.full((SLOTS, 1), np.nan)
    forecaster = small(expert="daily")
    now = learn(forecaster, np.vstack([day, gap, gap]))
    made = [forecaster.forecast(now, (ahead + 1) * WINDOW).average[0] for ahead in range(SLOTS)]
    assert made == pytest.approx(day[:, 0])


@pytest.mark.parametrize("windows", [4, 10_000_000_000])
def test_a_long_silence_is_unknown_and_costs_no_more_than_a_short_one(windows: int) -> None:
    forecaster = small(expert="daily")
    now = learn(forecaster, np.full((SLOTS, 1), 6.0))
    forecaster.observe(0, now, 0)
    now += windows * WINDOW
    forecaster.advance(now)  # window by window, this would take days
    for ahead in range(SLOTS):
        made = forecaster.forecast(now, (ahead + 1) * WINDOW)
        assert made.average[0] == pytest.approx(6.0)


def test_a_silence_does_not_change_the_forecast() -> None:
    forecaster = small()
    now = learn(forecaster, np.random.default_rng(0).uniform(0, 50, (40, 1)))
    before = [forecaster.forecast(now, (5 + ahead) * WINDOW) for ahead in (1, 2, 4)]
    forecaster.advance(now + 5 * WINDOW)
    after = [forecaster.forecast(now + 5 * WINDOW, ahead * WINDOW) for ahead in (1, 2, 4)]
    assert all(map(same, before, after))


@pytest.mark.parametrize("windows", [2, 9, 12, 33])
def test_the_paper_s_predictor_treats_omitted_windows_as_unknown(windows: int) -> None:
    random = np.random.default_rng(windows)
    old, new, gap = (
        random.uniform(0, 9, (15, 1)),
        random.uniform(0, 9, (2, 1)),
        np.empty((windows, 1)),
    )
    told, skipped = small(expert="paper"), small(expert="paper")
    gap[:] = np.nan
    now = learn(told, np.vstack([old, gap, new]))
    learn(skipped, new, learn(skipped, old) + windows * WINDOW)
    for ahead in (1, 2, 7):
        one, other = (each.forecast(now, ahead * WINDOW) for each in (told, skipped))
        assert one.average == pytest.approx(other.average)
        assert one.peak == pytest.approx(other.peak)


def test_a_window_that_was_never_forecast_is_not_scored() -> None:
    forecaster = small(expert="last")
    now = learn(forecaster, np.random.default_rng(0).uniform(20, 50, (40, 1)))

    def margins() -> list[float]:
        made = [forecaster.forecast(now, horizon) for horizon in HORIZONS]
        return [each.upper[0] - each.average[0] for each in made]

    before = margins()
    now = learn(forecaster, np.array([[9000.0]]), now + 50 * WINDOW)
    assert margins() == pytest.approx(before)


def test_in_a_short_silence_the_level_holds() -> None:
    forecaster = small(expert="last")
    forecaster.observe(0, 0.0, 6)
    forecaster.advance(3 * WINDOW)
    forecaster.observe(0, 3 * WINDOW, 0)
    assert forecaster.forecast(3 * WINDOW, WINDOW).average[0] == pytest.approx(6.0)


@pytest.mark.parametrize(("joined", "average"), [(100.0, 8.0), (200.0, 1.0)])
def test_a_window_joined_late_counts_if_half_was_seen(joined: float, average: float) -> None:
    forecaster = small(expert="last")
    now = learn(forecaster, np.full((2, 1), 1.0))
    forecaster.observe(0, now + joined, 8)
    assert forecaster.forecast(now + WINDOW, WINDOW).average[0] == pytest.approx(average)


def test_time_between_history_and_the_first_call_does_not_count_as_zero_load() -> None:
    forecaster = small(expert="last")
    now = learn(forecaster, np.full((2, 1), 5.0)) + 2 * WINDOW
    assert forecaster.forecast(now, WINDOW).average[0] == pytest.approx(5.0)


def test_a_clock_set_back_a_little_counts_no_time_twice() -> None:
    forecaster = small(expert="last")
    forecaster.observe(0, 0.0, 10)
    forecaster.observe(0, 200.0, 4)
    forecaster.observe(0, 150.0, 8)  # 50 s back
    forecaster.observe(0, 200.0, 4)
    forecaster.advance(WINDOW)
    forecaster.observe(0, WINDOW - 1, 4)  # in a window that has closed
    made = forecaster.forecast(WINDOW, WINDOW)
    assert made.average[0] == pytest.approx((200 * 10 + 100 * 4) / 300)
    assert made.peak[0] == 10
    forecaster.observe(0, WINDOW + 100, 7)
    forecaster.observe(0, WINDOW - 1, 7)
    made = forecaster.forecast(2 * WINDOW, WINDOW)
    assert made.average[0] == pytest.approx((100 * 4 + 200 * 7) / 300)


def test_a_clock_set_back_by_hours_keeps_what_was_learnt_and_the_time_of_day() -> None:
    day = np.array([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]])
    forecaster = small(expert="daily")
    now = learn(forecaster, np.vstack([day, day]))
    forecaster.advance(now)
    back = now - 4 * WINDOW
    made = [forecaster.forecast(back, ahead * WINDOW).average[0] for ahead in (1, 2, 3)]
    assert made == pytest.approx([3.0, 4.0, 5.0])
    forecaster.observe(0, back, 9)
    forecaster.advance(back + WINDOW)
    forecaster.observe(0, back + WINDOW, 0)
    made = [forecaster.forecast(back + WINDOW, 6 * WINDOW).average[0]]
    assert made == pytest.approx([(3.0 + 3.0 + 9.0) / 3])  # the slot has one more day


times = st.floats(-1e9, 1e9)
calls = st.tuples(st.sampled_from(["observe", "advance"]), times | st.floats(0.0, 3000.0), loads)


@settings(deadline=None)
@given(st.lists(calls, max_size=30), times)
def test_a_forecast_is_finite_for_any_sequence_of_times(
    made: list[tuple[str, float, float]], now: float
) -> None:
    forecaster = small(2)
    for call, time, concurrent in made:
        if call == "advance":
            forecaster.advance(time)
        else:
            forecaster.observe(1, time, 0.0 if math.isnan(concurrent) else concurrent)
    for horizon in (1.0, *HORIZONS, 1e7):
        assert is_sane(forecaster.forecast(now, horizon))


@pytest.mark.parametrize("quantile", [0.1, 0.7])
def test_the_hedge_and_its_upper_forecast_follow_their_formulas(quantile: float) -> None:
    random = np.random.default_rng(5)
    values = random.gamma(0.6, 10.0, 60) * (random.random(60) > 0.3)
    values[random.random(60) < 0.1] = np.nan
    values[:20] = 0.0
    fade = 0.5 ** (WINDOW / (12 * 3600))
    for ahead in (1, 3):
        losses, offset, spread, weight = [0.0] * len(EXPERTS), 1.0, 0.0, 0.0
        waiting: list[tuple[list[float], float, float]] = []
        experts = [small(expert=expert) for expert in EXPERTS]
        hedge = small(quantile=quantile)
        for number, value in enumerate(values):
            for each in (hedge, *experts):
                each.observe_windows(number * WINDOW, [[value]], [[value]])
            if len(waiting) == ahead:
                alone, average, upper = waiting.pop(0)
                if not math.isnan(value):
                    losses = [
                        fade * loss + abs(value - each)
                        for loss, each in zip(losses, alone, strict=True)
                    ]
                    if value > 0 or upper > 0:
                        offset += 0.05 * ((value > upper) - (1 - quantile))
                    spread = fade * spread + (1 - fade) * abs(value - average)
                    weight = fade * weight + (1 - fade)
            now = (number + 1) * WINDOW
            alone = [each.forecast(now, ahead * WINDOW).average[0] for each in experts]
            shares = [(min(losses) / loss) ** 8 if loss else 1.0 for loss in losses]
            average = sum(map(operator.mul, shares, alone)) / sum(shares)
            upper = max(average + (offset * spread / weight if weight else 0.0), 0.0)
            made = hedge.forecast(now, ahead * WINDOW)
            if not np.isnan(values[: number + 1]).all():
                assert made.average[0] == pytest.approx(average)
                assert made.upper[0] == pytest.approx(upper, abs=1e-9)
            waiting.append((alone, average, upper))


def test_the_mean_over_past_days_covers_the_given_number_of_days() -> None:
    forecaster = small(expert="daily", days=2)
    now = learn(forecaster, np.repeat([2.0, 4.0, 8.0], SLOTS)[:, None])
    assert forecaster.forecast(now, WINDOW).average[0] == pytest.approx(3 + (8 - 3) / 2)


def series(*, seasonal: bool) -> Array:
    """Return twelve days of load [half hours, 20 models].

    The load has Poisson counts around a daily wave, or around a random walk.
    """
    random = np.random.default_rng(1)
    time = np.arange(12 * 48)[:, None]
    if seasonal:
        level = 30 + 25 * np.sin(2 * np.pi * time / 48 + np.arange(20))
    else:
        level = np.exp(3 + 0.1 * np.cumsum(random.standard_normal((len(time), 20)), axis=0))
    return random.poisson(level).astype(np.float64)


@pytest.mark.parametrize("seasonal", [True, False])
def test_the_hedge_is_near_the_best_expert_and_the_upper_forecast_is_calibrated(
    seasonal: bool,
) -> None:
    values, half_hour = series(seasonal=seasonal), 1800.0
    history = 3 * 48
    errors: dict[tuple[int, str], float] = {}
    for expert in ("hedge", *EXPERTS):
        forecaster = Forecaster(
            20, window=half_hour, horizons=(half_hour, 3 * half_hour), expert=expert
        )
        forecaster.observe_windows(0.0, values[:history], values[:history])
        covered: dict[int, list[NDArray[np.bool_]]] = {1: [], 3: []}
        for number in range(history, len(values) - 3):
            for ahead, hits in covered.items():
                made = forecaster.forecast(number * half_hour, ahead * half_hour)
                actual = values[number + ahead - 1]
                error = float(np.abs(made.average - actual).sum())
                errors[ahead, expert] = errors.get((ahead, expert), 0.0) + error
                hits.append(actual <= made.upper)
            row = values[[number]]
            forecaster.observe_windows(number * half_hour, row, row)
        if expert == "hedge":
            for hits in covered.values():
                assert 0.88 <= np.mean(hits) <= 0.92
    for ahead in (1, 3):
        best = min(errors[ahead, expert] for expert in EXPERTS)
        assert errors[ahead, "hedge"] <= 1.05 * best
        assert max(errors[ahead, expert] for expert in EXPERTS) > 1.2 * best  # the experts differ


def test_a_saved_forecaster_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    forecaster = small(3, quantile=0.8)
    now = learn(forecaster, random.uniform(0, 9, (20, 3)))
    for step in range(40):
        forecaster.observe(step % 3, now + 17.0 * step, step % 5)
    forecaster.save(tmp_path / "state")
    loaded = Forecaster.load(tmp_path / "state")
    for step in range(40, 200):
        for each in (forecaster, loaded):
            each.observe(step % 3, now + 17.0 * step, step % 7)
        made = [each.forecast(now + 17.0 * step, 40.0 * step) for each in (forecaster, loaded)]
        assert same(*made)
    assert [each.name for each in tmp_path.iterdir()] == ["state"]


def test_an_empty_forecaster_can_be_saved_and_loaded(tmp_path: Path) -> None:
    small().save(tmp_path / "state")
    assert is_sane(Forecaster.load(tmp_path / "state").forecast(0.0, 1.0))


def test_a_save_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    small().save(path)
    before = path.read_bytes()

    def fail(file: object, **arrays: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="no space left"):
        small().save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def torn(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo("mean.npy")
    whole = bytearray(path.read_bytes())
    whole[entry.header_offset + 200] ^= 1
    path.write_bytes(whole)


def text(path: Path) -> None:
    path.write_text("load: 3\n")


def one_array(path: Path) -> None:
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))


def _changed(path: Path, change: Callable[[dict[str, NDArray[np.generic]]], None]) -> None:
    with np.load(path) as file:
        state = {name: file[name] for name in file.files}
    change(state)
    with open(path, "wb") as file:
        np.savez(file, **state)  # type: ignore[arg-type]


def other_arrays(path: Path) -> None:
    _changed(path, lambda state: state.clear())


def newer(path: Path) -> None:
    def change(state: dict[str, NDArray[np.generic]]) -> None:
        state["header"] = np.array(str(state["header"]).replace("forecaster 1", "forecaster 2"))

    _changed(path, change)


def missing(path: Path) -> None:
    _changed(path, lambda state: state.pop("loss"))  # type: ignore[arg-type,return-value]


def of_other_shape(path: Path) -> None:
    _changed(path, lambda state: state.update(mean=state["mean"][1:]))


def not_finite(path: Path) -> None:
    _changed(path, lambda state: state.update(spread=state["spread"] * np.nan))


def without_a_level(path: Path) -> None:
    _changed(path, lambda state: state.update(level=state["level"][1:]))


def of_other_models(path: Path) -> None:
    def change(state: dict[str, NDArray[np.generic]]) -> None:
        state["header"] = np.array(str(state["header"]).replace('"models": 2', '"models": 3'))

    _changed(path, change)


@pytest.mark.parametrize(
    "spoil",
    [
        torn, empty, flipped, text, one_array, other_arrays, newer, missing, of_other_shape,
        not_finite, without_a_level, of_other_models,
    ],
)  # fmt: skip
def test_a_file_that_is_no_forecaster_is_refused(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    path = tmp_path / "state"
    small(2).save(path)
    spoil(path)
    with pytest.raises(ValueError, match=r"is not a saved forecaster: ."):
        Forecaster.load(path)


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Forecaster.load(tmp_path / "state")


BAD_CALLS: dict[str, tuple[Callable[[Forecaster], object], str]] = {
    "model above": (lambda f: f.observe(2, 900.0, 1), "model must be a row below 2, got 2"),
    "model below": (lambda f: f.observe(-1, 900.0, 1), "model must be a row below 2, got -1"),
    "negative load": (lambda f: f.observe(0, 900.0, -1), "concurrent requests must .* got -1"),
    "NaN load": (lambda f: f.observe(0, 900.0, math.nan), "concurrent requests must .* got nan"),
    "infinite load": (lambda f: f.observe(0, 900.0, math.inf), "requests must .* got inf"),
    "NaN time": (lambda f: f.observe(0, math.nan, 1), "nan s is not a time"),
    "infinite time": (lambda f: f.observe(0, math.inf, 1), "inf s is not a time"),
    "time of no clock": (lambda f: f.observe(0, -1e300, 1), "is not a time"),
    "advance to NaN": (lambda f: f.advance(math.nan), "nan s is not a time"),
    "forecast at NaN": (lambda f: f.forecast(math.nan, 1.0), "nan s is not a time"),
    "no horizon": (lambda f: f.forecast(900.0, 0.0), "horizon must be .* got 0.0"),
    "negative horizon": (lambda f: f.forecast(900.0, -1.0), "horizon must be .* got -1.0"),
    "NaN horizon": (lambda f: f.forecast(900.0, math.nan), "horizon must be .* got nan"),
    "horizon beyond time": (lambda f: f.forecast(900.0, 1e300), "is not a time"),
    "history of one model": (
        lambda f: f.observe_windows(900.0, [[1.0]], [[1.0]]), "both be .windows, 2 models",
    ),
    "history without peaks": (
        lambda f: f.observe_windows(900.0, [[1.0, 1.0]], []), "both be .windows, 2 models",
    ),
    "history flat": (
        lambda f: f.observe_windows(900.0, [1.0, 1.0], [1.0, 1.0]), "both be .windows, 2 models",
    ),
    "negative history": (
        lambda f: f.observe_windows(900.0, [[1.0, -1.0]], [[1.0, 1.0]]), "not negative",
    ),
    "infinite history": (
        lambda f: f.observe_windows(900.0, [[1.0, 1.0]], [[1.0, math.inf]]), "finite",
    ),
    "history between windows": (
        lambda f: f.observe_windows(950.0, [[1.0, 1.0]], [[1.0, 1.0]]), "must begin a window",
    ),
    "history of the past": (
        lambda f: f.observe_windows(300.0, [[1.0, 1.0]], [[1.0, 1.0]]), "at or after 900",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_call_is_refused_and_teaches_nothing(name: str) -> None:
    call, sentence = BAD_CALLS[name]
    spoilt, clean = small(2), small(2)
    for each in (spoilt, clean):
        learn(each, np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
        each.observe(1, 900.0, 3)
    with pytest.raises(ValueError, match=sentence):
        call(spoilt)
    for now, horizon in ((910.0, 20.0), (1200.0, 600.0)):
        assert same(spoilt.forecast(now, horizon), clean.forecast(now, horizon))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"models": 0}, "0 models"),
        ({"days": 0}, "0 days"),
        ({"window": 0.0}, "window must be .* got 0.0"),
        ({"window": math.nan}, "window must be .* got nan"),
        ({"horizons": ()}, "at least one"),
        ({"horizons": (600.0, 300.0)}, "must rise"),
        ({"horizons": (300.0, 300.0)}, "must rise"),
        ({"horizons": (450.0,)}, "450.0 s is not a whole number of windows"),
        ({"horizons": (-300.0,)}, "-300.0 s is not a whole number of windows"),
        ({"horizons": (math.inf,)}, "inf s is not a whole number of windows"),
        ({"period": 1000.0}, "1000.0 s is not a whole number of windows"),
        ({"period": math.nan}, "nan s is not a whole number of windows"),
        ({"quantile": 0.0}, "quantile must be .* got 0.0"),
        ({"quantile": 1.0}, "quantile must be .* got 1.0"),
        ({"expert": "oracle"}, "expert must be one of hedge, .* got 'oracle'"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        small(**options)  # type: ignore[arg-type]
