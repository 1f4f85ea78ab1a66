"""Risk: the live run flatters: it compares nothing, cannot fail, or serves other requests than the
simulator predicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("numba")

import test_demo

from warmserve_rt.demo import live, live_serving, run, traffic
from warmserve_rt.demo.predicted import predict
from warmserve_rt.policy.profile import ModelProfile
from warmserve_rt.scheduling.scheduler import Scheduler

cast = test_demo.cast  # five tiny tenants
NAMES = test_demo.NAMES
LAYER = 10_000_000


def profiles(layers: int = 5) -> list[ModelProfile]:
    return [ModelProfile(name, 1, (LAYER,) * layers, 0, 0.1, 0, 0.01, batch=1) for name in NAMES]


def asked(**options: Any) -> traffic.Traffic:
    prompts = {prompt: [0] * (10 + place) for place, prompt in enumerate(traffic.PROMPTS)}
    wanted = {(name, prompt): [0] * 10 for name in NAMES for prompt in prompts}
    given = {"count": 60, "seconds": 60.0, "seed": 0, **options}
    return traffic.traffic(profiles(), prompts, wanted, **given)


def test_the_live_run_passes_and_reports(cast: dict[str, Path], tmp_path: Path) -> None:
    assert live.run(tmp_path / "out.json", requests=20, seconds=2.0) == 0
    out = json.loads((tmp_path / "out.json").read_text())
    assert (out["tokens_match"], out["bytes_match"], out["errors"]) == (True, True, [])
    assert out["requests"] > 2
    assert out["predicted"].keys() == out["measured"].keys() == live.ROWS.keys()
    for numbers in (out["predicted"], out["measured"]):
        assert 0 < numbers["ttft_p50_ms"] <= numbers["ttft_p95_ms"]
        assert 0 <= numbers["layer_hits"] <= 1


def test_the_live_run_fails_when_a_granule_is_swapped(
    cast: dict[str, Path], tmp_path: Path
) -> None:
    assert live.run(tmp_path / "out.json", requests=20, seconds=2.0, mutate=True) == 1
    assert json.loads((tmp_path / "out.json").read_text())["bytes_match"] is False


def test_the_live_run_fails_when_tokens_differ(
    cast: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run.reference, "_generate", lambda model, prompt, tokens: [1, 2, 3])
    assert live.run(tmp_path / "out.json", requests=20, seconds=1.0) == 1
    assert json.loads((tmp_path / "out.json").read_text())["tokens_match"] is False


@pytest.mark.parametrize("options", [{"requests": 1}, {"seconds": 0.0}, {"seconds": 1e4}])
def test_invalid_runs_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        live.run(**options)


def test_a_faster_replay_only_compresses_the_trace() -> None:
    """A trace replayed twice as fast has the same requests, at half the times."""
    slow, fast = asked(seconds=60.0), asked(seconds=30.0)
    assert np.allclose(slow.workload.time, 2 * fast.workload.time)
    assert [r.tenant for r in slow.requests] == [r.tenant for r in fast.requests]
    assert np.allclose(np.nanmean(2 * slow.workload.history), np.nanmean(fast.workload.history))
    assert fast.workload.duration == 30.0
    days = fast.workload.history_window * len(fast.workload.history)
    assert days == pytest.approx(7 * 86400 * 30 / traffic.TRACE_S)


def test_the_served_requests_are_the_predicted_ones() -> None:
    made = asked()
    workload = made.workload
    assert len(made.requests) == len(made.outputs) == len(workload.time)
    for i, request in enumerate(made.requests):
        assert request.time == workload.time[i]
        assert request.tenant == workload.models[workload.model[i]].name
        assert workload.prompt[i] == 10 + traffic.PROMPTS.index(request.prompt)
        assert 2 <= made.outputs[i] == workload.output[i] <= 10
    assert {request.prompt for request in made.requests} == set(traffic.PROMPTS)


def test_a_forecast_from_history_is_near_the_actual_load() -> None:
    workload = asked(count=400).workload
    expected = traffic.forecaster(workload).forecast(0.0, workload.history_window).average
    came = np.bincount(workload.model, minlength=5) / workload.duration * workload.service
    assert expected.sum() == pytest.approx(came.sum(), rel=0.5)


def outcome(arena: int, bandwidth: float = 1e9) -> Any:
    return predict(asked().workload, Scheduler(), arena=arena, bandwidth=bandwidth, switch_s=0.001)


def test_every_model_is_loaded_once_if_all_fit() -> None:
    everything = 5 * 5 * LAYER
    out = outcome(everything)
    assert out.hits > 0.9  # first starts find the layers that save time
    assert out.loaded == pytest.approx(everything, rel=0.01)


def test_a_change_of_model_loads_it_if_only_one_fits() -> None:
    """This holds however far the simulation's steps of KV cache exceed the arena."""
    workload = asked().workload
    out = outcome(5 * LAYER, bandwidth=20e6)  # 2.5 s for a model: no prefill hides it
    assert len(np.unique(workload.model)) * 5 * LAYER <= out.loaded
    assert out.hits < 0.9
    assert (out.ttft > 0).all()


def test_requests_of_the_given_tenant_are_served_first() -> None:
    line = live_serving.Line()
    for number, tenant in enumerate("ABAB"):
        line.put(number, tenant)
    assert [line.take("B"), line.take("B"), line.take("B"), line.take("A")] == [1, 3, 0, 2]
