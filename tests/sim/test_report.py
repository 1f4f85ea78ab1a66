"""Risk: a report shows results that were not run, or cannot be read where it is opened."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from studies import BASELINE, SMALL, WARM

from warmserve_rt.sim.controllers.policies import POLICIES
from warmserve_rt.sim.report import sentences, table, terminal
from warmserve_rt.sim.report.report import render
from warmserve_rt.sim.study.digest import as_interval, digest, to_json
from warmserve_rt.sim.study.runner import Result, run

ASKED_FOR = (
    *("ttft_mean", "ttft_p50", "ttft_p95", "ttft_p99", "slo_miss", "hit_share"),
    *("loaded_bytes", "wasted_bytes", "gpu_hours"),
)


@pytest.fixture(scope="module")
def small() -> Result:
    return run(SMALL, 1)


@pytest.fixture(scope="module")
def numbers(small: Result) -> dict[str, Any]:
    return digest(small)


@pytest.fixture(scope="module")
def page(small: Result, numbers: dict[str, Any]) -> str:
    return render(small, numbers)


def test_summary_json_has_all_metrics_of_all_policies(numbers: dict[str, Any]) -> None:
    data = json.loads(to_json(numbers))
    assert set(data["policies"]) == set(POLICIES)
    for policy in data["policies"].values():
        for name in ASKED_FOR:
            metric = policy["metrics"][name]
            assert len(metric["by_seed"]) == 2
            assert metric["low"] <= metric["mean"] <= metric["high"]
        assert [each["goal"] for each in policy["highest_rate"]] == [0.99, 0.97]
        assert [each["rate"] for each in policy["attainment"]] == [0.25, 0.5]
    pairs = len(POLICIES) * (len(POLICIES) - 1) // 2
    assert len(data["paired"]) == pairs


def test_reversed_pairs_have_inverse_ratios(numbers: dict[str, Any]) -> None:
    there = sentences.ratio_of(numbers, "ttft_p99_ratio", BASELINE, WARM)
    back = sentences.ratio_of(numbers, "ttft_p99_ratio", WARM, BASELINE)
    assert there.mean == pytest.approx(1 / back.mean)
    assert there.low == pytest.approx(1 / (back.high or math.nan))
    ahead = sentences.ratio_of(numbers, "slo_miss_difference", BASELINE, WARM)
    behind = sentences.ratio_of(numbers, "slo_miss_difference", WARM, BASELINE)
    assert (ahead.mean, ahead.low) == (-behind.mean, -(behind.high or math.nan))


def test_the_engine_start_paragraph_quotes_the_runs_numbers(
    numbers: dict[str, Any], page: str
) -> None:
    told = " ".join(sentences.engine_start(numbers))
    assert "up to 50.8x" in told
    assert "engine start of 5 s" in told
    rows = {r["engine_start_s"]: r for r in numbers["engine_starts"] if r["policy"] == BASELINE}
    for start in (0.0, 5.0):
        assert sentences.times(as_interval(rows[start]["ttft_p99_over"][WARM])) in told
    assert rows[0.0]["ttft_p99"]["mean"] < rows[5.0]["ttft_p99"]["mean"]
    assert escape(told) in page


def test_engine_starts_that_were_not_run_are_not_reported(numbers: dict[str, Any]) -> None:
    kept = [row for row in numbers["engine_starts"] if row["engine_start_s"] == 5.0]
    told = " ".join(sentences.engine_start({**numbers, "engine_starts": kept}))
    assert "equal starts were not run" in told
    assert "accounts for a factor" not in told
    assert "No policy" in " ".join(sentences.engine_start({**numbers, "engine_starts": []}))


def test_an_uncertain_best_policy_is_reported_as_uncertain(
    numbers: dict[str, Any],
) -> None:
    def told(low: float) -> str:
        policies = {name: dict(numbers["policies"][name]) for name in (BASELINE, WARM)}
        for name, seconds in ((BASELINE, 8.0), (WARM, 4.0)):
            tail = {"mean": seconds, "low": None, "high": None}
            policies[name]["metrics"] = {**policies[name]["metrics"], "ttft_p99": tail}
        pair = {"policy": BASELINE, "over": WARM}
        ratio = {"mean": 2.0, "low": low, "high": 4.0}
        paired = [{**pair, "ttft_p99_ratio": ratio}]
        return " ".join(sentences.findings({**numbers, "policies": policies, "paired": paired}))

    assert f"{WARM} has the lowest P99 TTFT, 4 s" in told(1.5)
    assert "do not tell the two apart" in told(0.5)
    assert "do not tell the two apart" not in told(1.5)


class Tags(HTMLParser):
    """A parser that fails at a closing tag that does not match the last open tag."""

    VOID = frozenset({"meta", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [name for name, _ in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def well_formed(page: str) -> None:
    tags = Tags()
    tags.feed(page)
    tags.close()
    assert tags.open == []
    assert tags.links == []
    drawn = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawn) > 5
    for each in drawn:
        ElementTree.fromstring(each)
        assert "nan" not in re.sub(r"<title>.*?</title>|aria-label=\"[^\"]*\"", "", each)


def test_a_trace_runs_once_at_its_own_rate(tmp_path: Path) -> None:
    rows = "".join(f"{20 * i},{i % 3},100,20\n" for i in range(40))
    path = tmp_path / "<b>&trace.csv"
    path.write_text("t_s,model,input_tokens,output_tokens\n" + rows)
    study = replace(SMALL, workload=str(path), history_minutes=5, seeds=4)
    result = run(study, 1)
    assert result.study.seeds == 1
    assert len(result.workload.time) == 40 - 15
    assert {o.run.rate for o in result.outcomes} == {result.study.rate}
    data = digest(result)
    assert data["study"]["workload"] == "<b>&trace.csv"
    assert str(tmp_path) not in to_json(data)
    well_formed(render(result, data))


def test_the_report_is_well_formed_and_self_contained(page: str) -> None:
    well_formed(page)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<script|<link|<img", page)


def test_the_report_adapts_to_colour_scheme_and_screen(page: str) -> None:
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport" content="width=device-width' in page


def test_every_policy_is_in_every_part_of_the_report(page: str) -> None:
    for name, policy in POLICIES.items():
        assert page.count(f"</svg>{name}</li>") == 2
        assert policy.title in page
        assert (f"<summary>{name}</summary>" in page) is not policy.unlimited_memory


def strokes(page: str) -> dict[str, tuple[str, str]]:
    """Return the colour and the dashes of each name in the legend."""
    keys = re.findall(
        r"style=\"stroke:([^\"]*)\"(?: stroke-dasharray=\"([^\"]*)\")?/>"
        r"(?:<path[^>]*></path>)?</svg>([^<]*)<",
        page,
    )
    return {name: (colour, dash) for colour, dash, name in keys}


def test_every_policy_has_distinct_dashes(page: str) -> None:
    """A reader who sees no colours can tell the policies apart too."""
    found = strokes(page)
    assert set(found) == set(POLICIES)
    assert len({dash for _, dash in found.values()}) == len(POLICIES)
    assert len(set(found.values())) == len(POLICIES)
    lines = re.findall(
        r"<path class=\"line\" style=\"stroke:([^\"]*)\"(?: stroke-dasharray=\"([^\"]*)\")?", page
    )
    assert set(lines) <= set(found.values())


def test_every_policy_has_a_distinct_marker(page: str) -> None:
    drawn = re.findall(
        r'<path class="dot" style="([^"]*)" transform="[^"]*" d="([^"]*)"></path>', page
    )
    forms = {(outline, "stroke" in paint) for paint, outline in drawn}
    assert len(drawn) == len(forms) == len(POLICIES)


def told(numbers: dict[str, Any], tails: dict[str, float], ratio: float = 2.0) -> str:
    """Return the findings for policies with these P99s."""
    policies = {name: dict(numbers["policies"][name]) for name in tails}
    for name, seconds in tails.items():
        tail = {"mean": seconds, "low": None, "high": None}
        policies[name]["metrics"] = {**policies[name]["metrics"], "ttft_p99": tail}
    each = {"mean": ratio, "low": None, "high": None}
    paired = [
        {"policy": a, "over": b, "ttft_p99_ratio": each} for a in tails for b in tails if a != b
    ]
    return " ".join(sentences.findings({**numbers, "policies": policies, "paired": paired}))


def test_a_bound_that_is_no_better_is_not_reported_as_a_bound(
    numbers: dict[str, Any],
) -> None:
    better = told(numbers, {"scheduler": 4.0, "lru": 8.0, "h0": 2.0, "h1": 3.0})
    assert "h0, a bound with memory for everything, has a P99 of 2 s." in better
    assert "h1, a bound with knowledge of the future, has a P99 of 3 s." in better
    assert "scheduler has the lowest P99 TTFT" in better
    worse = told(numbers, {"scheduler": 4.0, "lru": 8.0, "h0": 61.0})
    assert "The P99 of h0, which has memory for everything, is no lower, 61 s" in worse
    assert "at most" not in worse


def test_findings_of_one_policy_make_no_comparison(numbers: dict[str, Any]) -> None:
    said = told(numbers, {"lru": 8.0})
    assert said.startswith("lru has a P99 TTFT of 8 s")
    assert "next" not in said
    assert "lowest" not in said


def test_unbounded_times_are_not_compared(numbers: dict[str, Any]) -> None:
    said = told(numbers, {"lru": 8.0, "sharing": math.inf}, math.inf)
    assert "The P99 of the next, sharing, is unbounded." in said
    said = told(numbers, {"lru": math.inf, "sharing": math.inf}, math.nan)
    assert said.startswith("No policy served all requests")
    same = told(numbers, {"lru": 8.0, "sharing": 8.0})
    assert "sharing has the same P99 TTFT." in same
    for text in (said, same):
        assert not re.search(r"\b(nan|inf|0x)\b", text)


def test_engine_starts_are_compared_if_the_ratio_is_defined(numbers: dict[str, Any]) -> None:
    def over(mean: float) -> dict[str, Any]:
        return {"mean": mean, "low": None, "high": None}

    def starts(with_start: dict[str, float], without: dict[str, float]) -> str:
        rows = [
            {
                "policy": BASELINE,
                "engine_start_s": seconds,
                "ttft_p99_over": {name: over(mean) for name, mean in each.items()},
            }
            for seconds, each in ((5.0, with_start), (0.0, without))
        ]
        policies = {name: numbers["policies"][name] for name in (BASELINE, *with_start)}
        data = {**numbers, "policies": policies, "engine_starts": rows}
        return " ".join(sentences.engine_start(data))

    said = starts({"lru": 3.0, "sharing": 0.0}, {"lru": 1.5, "sharing": 0.0})
    assert "has no ratio to that of sharing" in said
    assert "0x" not in said.replace("50.8x", "")
    assert "The engine start therefore accounts for a factor of 2." in said
    said = starts({"sharing": math.nan}, {"sharing": math.inf})
    assert "accounts for a factor" not in said
    said = starts({"lru": 3.0}, {"lru": 3.0})
    assert "The engine start makes no difference here." in said


def test_a_workload_of_any_file_name_can_be_written(small: Result) -> None:
    named = replace(small, workload=replace(small.workload, name="a\udcff\n<b>[red]"))
    data = digest(named)
    written = (to_json(data) + render(named, data)).encode()
    assert rb"a\udcff\n&lt;b&gt;[red]" in written


@pytest.mark.parametrize("columns", ["200", "80", "40"])
def test_the_terminal_shows_whole_numbers_at_any_width(
    numbers: dict[str, Any], columns: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    terminal.show(numbers)
    out = capsys.readouterr().out
    assert "…" not in out
    for row in table.rows(numbers):
        for value, more in row[1:]:
            assert value in out
            assert more in out
