"""Risk: an experiment breaks, and only the person who has a GPU for ten minutes notices."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gpu
from lib.cuda import NotRun
from lib.harness import Bench
from parts.gpu.experiments import load_all
from parts.gpu.part import Part

BENCH = Path(__file__).resolve().parents[2] / "bench"
EXPERIMENTS = load_all()
NOT_RUN = {"E8", "E11"}  # the simulated device does not compute, and belongs to one process


def test_every_experiment_gives_a_block_with_a_verdict(tmp_path: Path) -> None:
    out = tmp_path / "experiments.json"
    options = ["--device", "simcuda", "--quick", "--experiments", "--json", out]
    done = subprocess.run(
        [sys.executable, BENCH / "gpu.py", *options],
        cwd="/",  # so that it imports the installed package
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    report = json.loads(out.read_text())
    assert report["failed"] == [], done.stdout
    assert list(report["parts"]) == list(EXPERIMENTS)
    blocks = dict(re.findall(r"\n(E\d+): (.*?)(?=\nE\d+: |\Z)", done.stdout, re.DOTALL))
    for number, experiment in EXPERIMENTS.items():
        said = " ".join(blocks[number].split())
        assert said.startswith(f"{experiment.question} expected: {experiment.expected}"), said
        ran = report["parts"][number]["outcome"] == "ran"
        assert ran != (number in NOT_RUN), said
        assert re.search(" (would decide: |NOT RUN)" if ran else " NOT RUN: ", said), said
        names = [name for name in report["results"] if name.startswith(f"{number.lower()}_")]
        assert names or not ran


def test_all_twelve_are_described_in_the_readme() -> None:
    assert list(EXPERIMENTS) == [f"E{number}" for number in range(1, 13)]
    readme = (BENCH / "README.md").read_text()
    for number, experiment in EXPERIMENTS.items():
        assert f"| {number} | {experiment.question} | {experiment.expected} |" in readme


def test_a_question_that_fails_does_not_end_the_experiment(tmp_path: Path) -> None:
    args = argparse.Namespace(quick=True, json=tmp_path / "part.json")
    part = Part(args, tmp_path, simulated=True, prefix="e0_")
    with part.question("the first"):
        part.row("figure", 1, "us")
        raise NotRun("it cannot")
    with part.question("the second"):
        raise ZeroDivisionError("it failed")
    part.decide("the third holds")
    saved = json.loads(args.json.read_text())
    assert saved["rows"] == [["e0_figure", 1, "us"]]
    assert saved["decides"] == [
        "NOT RUN, the first: it cannot",
        "FAILED, the second: ZeroDivisionError: it failed",
        "the third holds",
    ]
    assert saved["outcome"] == ""


def test_experiments_that_fail_say_so_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = {
        "E1": {"outcome": "failed: status -6", "decides": ["a half"]},
        "E2": {"outcome": "ran", "decides": []},
        "E3": {"outcome": "ran", "decides": ["FAILED, a part: OSError: no"]},
        "E4": {"outcome": "not run: no such thing", "decides": []},
        "E5": {"outcome": "ran", "decides": ["all"]},
    }
    monkeypatch.setattr(gpu, "start_part", lambda name, *_: {"seconds": 1.0, **ends[name]})
    args = argparse.Namespace(experiments=list(ends), quick=True, json=None)
    report = gpu.Report(simulated=False)
    gpu.run_experiments(report, Bench("gpu", args), tmp_path, {})
    said = [block.splitlines()[-1].strip() for block in capsys.readouterr().out.split("\nE")[1:]]
    assert said == [
        "FAILED: status -6",
        "FAILED: it decided nothing",
        "FAILED, a part: OSError: no",
        "NOT RUN: no such thing",
        "decides: all",
    ]
    assert report.failed == ["E1", "E2", "E3"]
    monkeypatch.setattr(gpu, "EXPERIMENTS_LIMIT", 0.0)
    gpu.run_experiments(report, Bench("gpu", args), tmp_path, {})
    assert report.parts["E5"]["outcome"] == "not run: no time was left"


def test_an_unknown_experiment_is_refused() -> None:
    command = [sys.executable, BENCH / "gpu.py", "--device", "simcuda", "--experiments", "E0"]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "invalid choice: 'E0'" in done.stderr
