"""Recorded traffic that is misread, or replayed with artificial bursts, misleads every forecast."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from warmserve_rt.sim.workload import traces
from warmserve_rt.sim.workload.arrivals import divide_windows, renewal


def test_data_files_are_in_the_package_and_small():
    data = files("warmserve_rt.sim.workload") / "data"
    archives = [file for file in data.iterdir() if file.name.endswith(".npz")]
    assert {file.name for file in archives} == {"azure2023.npz", "mooncake.npz", "servegen.npz"}
    assert sum(len(file.read_bytes()) for file in archives) < 1_000_000
    text = (data / "README.md").read_text()
    assert all(file.name in text for file in archives)
    assert "CC-BY-4.0" in text
    assert "Apache-2.0" in text


def test_traces_match_the_recordings():
    both, code, conv = traces.azure(), traces.azure("code"), traces.azure("conv")
    assert (len(both.time), len(code.time), len(conv.time)) == (28_185, 8_819, 19_366)
    assert both.time[:3].tolist() == [0.0, 4.315, 4.542]
    assert (both.prompt[:3].tolist(), both.output[:3].tolist()) == ([374, 396, 879], [44, 109, 55])
    assert (code.time[-1], code.prompt[-1], code.output[-1]) == (3513.247, 549, 173)
    assert both.duration > both.time[-1]
    talk = traces.mooncake()
    assert (len(talk.time), talk.time[-1], talk.prompt[-1], talk.output[-1]) == (
        (12_031, pytest.approx(3536.999), 20_774, 508)
    )
    for trace in (both, code, conv, talk):
        assert (np.diff(trace.time) >= 0).all()
        with pytest.raises(ValueError, match="read-only"):
            trace.time[0] = 1


def test_servegen_matches_the_recording():
    traffic = traces.servegen()
    assert traffic.rates.shape == traffic.cvs.shape == traffic.weibull.shape == (313, 2016)
    assert np.bincount(traffic.model).tolist() == [162, 108, 43]
    active = traffic.rates > 0
    assert active.sum() == 246_319
    assert traffic.weibull.sum() == 60_240
    assert np.array_equal(np.isnan(traffic.cvs), ~active)
    assert np.nanmedian(traffic.cvs) == pytest.approx(1.230, rel=0.005)
    assert [len(traffic.of_class(name)) for name in traces.CLASSES] == [80, 89, 138]
    # The first two clients of m-large, as the record describes them.
    assert traffic.rates[:2].mean(axis=1) == pytest.approx([0.5584, 0.2990], rel=1e-3)
    assert traffic.rates[:2].max(axis=1) == pytest.approx([4.79, 8.087], rel=5e-3)
    assert traffic.acf_day[:2] == pytest.approx([0.286, 0.633])
    assert (np.diff(traffic.tokens, axis=2) >= 0).all()


def test_servegen_models_are_sums_with_gaps_that_are_not_idle_time():
    total = traces.servegen_models()
    assert total.shape == (3, 2016)
    assert np.isnan(total).sum(axis=1).tolist() == [0, 84, 37]
    assert total[:, 0] == pytest.approx([212.78, 986.57, 809.738], rel=0.004)


def test_unknown_services_and_classes_are_refused():
    with pytest.raises(ValueError, match="'chat' is no service"):
        traces.azure("chat")
    with pytest.raises(ValueError, match="'weekly' is no class of clients: choose one of periodic"):
        traces.servegen().of_class("weekly")


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 60), min_size=1, max_size=12),
    cv=st.floats(0.001, 2000),
    weibull=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_a_renewal_process_has_the_given_number_of_arrivals(counts, cv, weibull, seed):
    n = np.array(counts)
    rng = np.random.default_rng(seed)
    time = renewal(n, np.full(len(n), cv), np.full(len(n), weibull), 600.0, rng)
    assert (np.diff(time) >= 0).all()
    assert np.array_equal(np.bincount((time // 600).astype(int), minlength=len(n)), n)
    parts = divide_windows(n, np.full(len(n), cv), 3, rng)
    assert np.array_equal(parts.reshape(-1, 3).sum(axis=1), n)


@pytest.mark.parametrize("weibull", [False, True])
@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_a_renewal_process_has_its_cv(cv: float, weibull: bool):
    n = np.full(40, 5000)
    rng = np.random.default_rng(1)
    gaps = np.diff(renewal(n, np.full(40, cv), np.full(40, weibull), 600.0, rng))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


def test_arrivals_are_uniform_within_a_window():
    """Clumps at the edges of windows would make all tenants burst together."""
    n = np.full(4000, 10)
    rng = np.random.default_rng(2)
    time = renewal(n, np.full(4000, 6.0), np.zeros(4000, bool), 600.0, rng)
    tenths = np.bincount((time % 600 // 60).astype(int), minlength=10)
    assert tenths / tenths.mean() == pytest.approx(np.ones(10), abs=0.2)


def test_divided_windows_vary_as_a_renewal_process_does():
    rng = np.random.default_rng(3)
    n, cv = np.full(20_000, 400), np.full(20_000, 3.0)
    first = divide_windows(n, cv, 2, rng).reshape(-1, 2)[:, 0]
    assert first.var() == pytest.approx(9 * 400 / 4, rel=0.1)
