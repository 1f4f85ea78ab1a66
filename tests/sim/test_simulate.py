"""Risk: a comparison shows results that were not run, changes from run to run, or leaves half of
its files behind."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from studies import BASELINE, SMALL, WARM
from typer.testing import CliRunner

import warmserve_rt.sim.report
from warmserve_rt.cli import app
from warmserve_rt.sim.controllers.policies import POLICIES
from warmserve_rt.sim.core.fleet import Fleet
from warmserve_rt.sim.report import sentences
from warmserve_rt.sim.report.report import render
from warmserve_rt.sim.study import runner
from warmserve_rt.sim.study.digest import digest, to_json
from warmserve_rt.sim.study.metrics import summary
from warmserve_rt.sim.study.run import simulate
from warmserve_rt.sim.study.runner import Result, run, runs
from warmserve_rt.sim.study.study import StudyError
from warmserve_rt.sim.study.timeline import Timeline

SMALL_ARGUMENTS = (
    *("--workload", "power-law", "--gpus", "4", "--models", "4", "--rate", "0.5"),
    *("--rates", "0.25", "--seeds", "2", "--minutes", "1", "--engine-starts", "0"),
)
HEADER = "t_s,model,input_tokens,output_tokens\n"


@pytest.fixture(scope="module")
def small() -> Result:
    return run(SMALL, 1)


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["simulate", *arguments])


def trace(path: Path, rows: str, header: str = HEADER) -> str:
    path.write_text(header + rows)
    return str(path)


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--rate -1", "per second, got -1"),
        ("--rate nan", "per second, got nan"),
        ("--rates 1,nan", "per second, got nan"),
        ("--rates 1,-2", "per second, got -2"),
        ("--rates 1,x", "--rates must be numbers"),
        ("--rate inf", "per second, got inf"),
        ("--rate 0", "per second, got 0"),
        ("--rate 1e-9 --rates 1e-9", "no requests"),
        ("--memory 10", "larger than every device"),
        ("--memory nan", "positive"),
        ("--gpus 2", "needs 4 devices"),
        ("--gpus 12", "12 devices in nodes of 8"),
        ("--gpus 0", "got 0 devices"),
        ("--bandwidth -1", "positive"),
        ("--bandwidth nan", "finite"),
        ("--memory inf", "finite"),
        ("--multipath 0", "positive"),
        ("--interference -1", "interference must be finite and not negative, got -1"),
        ("--slo-prefills 0.5 --slo-seconds 0", "impossible"),
        ("--slo-prefills nan", "finite"),
        ("--slo-seconds -1", "not negative"),
        ("--policies nosuch", "unknown policy 'nosuch'"),
        (f"--policies {WARM},{WARM}", "each policy must be given once"),
        ("--models many", "'many'"),
        ("--models -3", "at least one model, got -3"),
        ("--seeds 0", "seeds must be at least 1, got 0"),
        ("--minutes nan", "minutes must be positive and finite, got nan"),
        ("--minutes -1", "minutes must be positive and finite, got -1"),
        ("--engine-start -1", "got -1 s"),
        ("--engine-starts 0,nan", "got nan s"),
        ("--switch nan", "got nan s"),
        ("--jobs 0", "jobs must be at least 1 process, got 0"),
        ("--workload nosuch", "'nosuch' is neither a file nor a workload"),
    ],
)
def test_invalid_arguments_give_one_sentence_and_write_nothing(
    arguments: str, said: str, tmp_path: Path
) -> None:
    given = arguments.split()
    if "--workload" not in given:
        given += ["--workload", "azure"]
    out = tmp_path / "deep" / "out"
    refused(command(*given, "--out", str(out)), said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("0,0,5,5\n1,0,five,5\n", ":3: column input_tokens: 'five'"),
        ("0,0,5,5\n1,0,5,0\n", ":3: column output_tokens: '0'"),
        ("nan,0,5,5\n", ":2: column t_s: 'nan'"),
        ("5,0,5,5\n1,0,5,5\n", ":3: column t_s: '1'"),
        ("0,nobody,5,5\n", ":2: column model: 'nobody'"),
        ("0,0,5\n", ":2: 3 fields"),
        ("", "no requests"),
        ("0,0,5,5\n", "no history"),
        ("400,0,5,5\n700,0,5,5\n", "no history"),
    ],
)
def test_errors_in_traces_name_line_column_and_value(rows: str, said: str, tmp_path: Path) -> None:
    path = trace(tmp_path / "trace.csv", rows)
    refused(command("--workload", path, "--out", str(tmp_path / "out")), said)
    assert not (tmp_path / "out").exists()


def test_a_rate_beside_a_trace_is_refused(tmp_path: Path) -> None:
    path = trace(tmp_path / "trace.csv", "0,0,5,5\n400,0,5,5\n")
    out = str(tmp_path / "out")
    refused(command("--workload", path, "--history", "5", "--rate", "2", "--out", out), "its own")


def test_an_unusable_output_folder_is_refused_before_any_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "perform", None)
    (tmp_path / "out").write_text("mine")
    refused(command(*SMALL_ARGUMENTS, "--out", str(tmp_path / "out")), "is not a folder")
    assert (tmp_path / "out").read_text() == "mine"


def refused(result: Any, said: str) -> None:
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert result.stderr.startswith("warmserve-rt simulate: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    for name in ("warmserve_rt.sim.report.terminal", "warmserve_rt._terminal"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr(warmserve_rt.sim.report, "terminal", raising=False)
    result = command(*SMALL_ARGUMENTS, "--out", str(tmp_path / "out"))
    assert "needs rich: pip install 'warmserve_rt[sim]'" in str(result.exception or result.output)
    assert list(tmp_path.iterdir()) == []


# Repeatability.


def test_results_do_not_depend_on_processes_or_repetition(tmp_path: Path) -> None:
    texts = []
    for jobs in ("1", "2"):
        out = tmp_path / f"out{len(texts)}"
        result = command(*SMALL_ARGUMENTS, "--jobs", jobs, "--out", str(out))
        assert result.exit_code == 0, result.output
        assert sorted(each.name for each in out.iterdir()) == ["report.html", "summary.json"]
        texts.append([(out / name).read_bytes() for name in ("summary.json", "report.html")])
    assert texts[0] == texts[1]


def test_another_seed_gives_another_run(small: Result) -> None:
    of_policy = [o for o in small.outcomes if o.run.policy == BASELINE and o.run.detailed]
    assert of_policy[0].summary != of_policy[1].summary


@pytest.mark.parametrize("policy", list(POLICIES))
def test_an_observer_does_not_change_the_run(policy: str) -> None:
    workload = SMALL.build(0.5, 3)
    timeline = Timeline(workload.duration, samples=37)
    seen = simulate(policy, workload, SMALL.hardware, observers=[timeline])
    unseen = simulate(policy, workload, SMALL.hardware)
    assert np.array_equal(seen.first_token, unseen.first_token)
    assert seen.links.loaded_bytes == unseen.links.loaded_bytes
    assert replace(summary(seen), link_use=0.0) == replace(summary(unseen), link_use=0.0)


# Runs.


def test_every_policy_serves_the_same_requests(small: Result) -> None:
    by_run: dict[tuple[float, int], set[int]] = {}
    for outcome in small.outcomes:
        key = (outcome.run.rate, outcome.run.seed)
        by_run.setdefault(key, set()).add(outcome.summary.requests)
    assert all(len(requests) == 1 for requests in by_run.values())
    assert len(by_run) == 4


def test_only_policies_with_engine_starts_run_with_several() -> None:
    starts: dict[str, set[float]] = {}
    for each in runs(SMALL):
        starts.setdefault(each.policy, set()).add(each.engine_start_s)
    for policy, found in starts.items():
        assert found == ({0.0, 2.0, 5.0} if POLICIES[policy].engine_start else {5.0})


def test_memory_and_links_stay_within_their_capacity() -> None:
    workload = SMALL.build(0.5, 0)
    for policy, known in POLICIES.items():
        timeline = Timeline(workload.duration, samples=200)
        fleet = simulate(policy, workload, SMALL.hardware, observers=[timeline])
        assert len(timeline.times) > 190  # the fleet may finish earlier
        assert max(timeline.link_use) <= 1 + 1e-9
        could = SMALL.hardware.bandwidth * SMALL.hardware.devices * timeline.step
        assert sum(timeline.link_use) * could <= fleet.links.loaded_bytes * (1 + 1e-9)
        if not known.unlimited_memory:
            assert fleet.links.loaded_bytes > 0
            for device in timeline.devices:
                tracks = device.tracks.values()
                for i, kv in enumerate(device.kv):
                    there = sum(t.nbytes[i] for t in tracks if i < len(t.nbytes))
                    assert kv + there <= SMALL.hardware.memory * (1 + 1e-9)


def test_unserved_requests_are_counted_and_errors_are_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Idle:
        def begin(self, fleet: Fleet) -> None: ...
        def arrived(self, request: int, model: int) -> None: ...

    class Broken(Idle):
        def arrived(self, request: int, model: int) -> None:
            raise RuntimeError("a fault")

    alone = replace(SMALL, policies=(WARM,), rates=(), seeds=1, engine_starts_s=())

    def with_controller(make: Callable[[], Any]) -> Result:
        changed = {WARM: replace(POLICIES[WARM], make=make)}
        monkeypatch.setattr("warmserve_rt.sim.controllers.policies.POLICIES", changed)
        return run(alone, 1)

    result = with_controller(Idle)
    found = result.outcomes[0].summary
    assert found.unserved == found.requests > 0
    data = digest(result)
    assert json.loads(to_json(data))["policies"][WARM]["metrics"]["ttft_p99"]["mean"] == "inf"
    assert "count as infinite" in " ".join(sentences.findings(data))
    assert "unbounded" in render(result, data)
    with pytest.raises(RuntimeError, match="a fault"):
        with_controller(Broken)


# Errors during a study.


def test_a_study_that_fails_halfway_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = runner.perform, []

    def perform(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise StudyError("halfway")
        return real(*arguments)

    monkeypatch.setattr(runner, "perform", perform)
    refused(command(*SMALL_ARGUMENTS, "--jobs", "1", "--out", str(tmp_path / "out")), "halfway")
    assert list(tmp_path.iterdir()) == []
