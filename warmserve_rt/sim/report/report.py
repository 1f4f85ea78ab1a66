"""Render a study as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

from warmserve_rt.sim.controllers.policies import POLICIES
from warmserve_rt.sim.study.digest import as_interval
from warmserve_rt.sim.study.runner import Recording, Result
from warmserve_rt.sim.study.study import GOALS

from . import charts, sentences, table, time_charts


def render(result: Result, data: dict[str, Any]) -> str:
    """Return the HTML page of a result. ``data``: its digest."""
    style = (files("warmserve_rt.sim.report") / "report.css").read_text(encoding="utf-8")
    title = f"{data['workload']['name']} on {data['study']['hardware']['devices']} GPUs"
    body = "\n".join(
        [
            _head(data, title),
            _paragraphs(sentences.findings(data)),
            _summary(data),
            _distribution(data),
            _attainment(data),
            _pairs(data),
            _engine_starts(data),
            _links(result),
            _memory(result),
            _method(data),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}: simulation</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _head(data: dict[str, Any], title: str) -> str:
    study, hardware = data["study"], data["study"]["hardware"]
    total = data["workload"]["nbytes"] / 1e9
    memory = hardware["devices"] * hardware["memory"] / 1e9
    facts = (
        ("models", f"{len(data['workload']['models'])} ({sentences.number(total)} GB)"),
        ("GPU memory", f"{sentences.number(memory)} GB in all"),
        ("host link", f"{hardware['bandwidth'] / 1e9:g} GB/s"),
        ("rate", f"{study['rate']:.3g} requests/s"),
        ("duration", f"{study['minutes']:.3g} minutes"),
        ("seeds", f"{study['seeds']}"),
    )
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)
    return (
        f'<header><p class="kind">Simulation</p><h1>{escape(title)}</h1><dl>{items}</dl></header>'
    )


def _paragraphs(prose: Sequence[str], kind: str = "lead") -> str:
    return f'<p class="{kind}">{escape(" ".join(prose))}</p>' if prose else ""


def _figure(drawn: str, caption: str, key: str = "") -> str:
    plot = f'<div class="scroll" tabindex="0">{drawn}</div>'
    return f"<figure>{key}{plot}<figcaption>{escape(caption)}</figcaption></figure>"


def _table(headings: Sequence[str], rows: Sequence[Sequence[table.Cell]]) -> str:
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    lines = []
    for name, *cells in rows:
        line = "".join(f"<td>{_cell(cell)}</td>" for cell in cells)
        lines.append(f'<tr><th scope="row">{_cell(name)}</th>{line}</tr>')
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(cell: table.Cell) -> str:
    value, more = cell
    return escape(value) + (f"<small>{escape(more)}</small>" if more else "")


def _summary(data: dict[str, Any]) -> str:
    note = (
        "Means over seeds, with half of their 95 % intervals (Student's t). A rate is the highest "
        "of the grid at which the mean share within the SLO reaches the goal."
    )
    return (
        f"<section><h2>Summary</h2>{_table(table.HEADINGS, table.rows(data))}"
        f'<p class="note">{note}</p></section>'
    )


def _distribution(data: dict[str, Any]) -> str:
    curves = [(name, p["ttft_cdf"]) for name, p in data["policies"].items()]
    caption = (
        f"All seeds at {data['study']['rate']:.3g} requests per second. The time axis is "
        "logarithmic. Each step from 90 % to 99 % and beyond leaves a tenth of the requests above."
    )
    drawn = charts.distribution(curves)
    return (
        "<section><h2>Time to first token</h2>"
        f"{_figure(drawn, caption, charts.legend(list(data['policies'])))}</section>"
    )


def _attainment(data: dict[str, Any]) -> str:
    curves = [
        (name, [(a["rate"], a["mean"], a["low"], a["high"]) for a in p["attainment"]])
        for name, p in data["policies"].items()
    ]
    slo = data["study"]["slo"]
    caption = (
        f"A first token is due within {slo['prefills']:g} prefills of the request's own prompt and "
        f"{1000 * slo['seconds']:g} ms. Whiskers are 95 % intervals over seeds; the dashed lines "
        f"are {sentences.listed([f'{100 * goal:g} %' for goal in sorted(GOALS)])}."
    )
    drawn = charts.attainment(curves, GOALS)
    return (
        "<section><h2>Load that each policy can take</h2>"
        f"{_figure(drawn, caption, charts.legend(list(data['policies']), markers=True))}"
        f"{_paragraphs(sentences.rates(data), 'note')}</section>"
    )


def _pairs(data: dict[str, Any]) -> str:
    policies = data["policies"]
    if len(policies) < 2:
        return ""

    def matrix(metric: str) -> str:
        rows = [
            [(ours, ""), *(_pair(data, metric, ours, o) for o in policies)] for ours in policies
        ]
        return _table(["", *policies], rows)

    return (
        "<section><h2>Pairs</h2><h3>P99 TTFT of the row over that of the column</h3>"
        f"{matrix('ttft_p99_ratio')}<h3>Share over the SLO of the row minus that of the column</h3>"
        f'{matrix("slo_miss_difference")}<p class="note">Every policy serves the same requests of '
        "a seed, so that ratios (geometric means) and differences are taken seed by seed. The 95 % "
        "interval is below each value.</p></section>"
    )


def _pair(data: dict[str, Any], metric: str, ours: str, theirs: str) -> table.Cell:
    if ours == theirs:
        return "", ""
    each = sentences.ratio_of(data, metric, ours, theirs)
    if metric == "slo_miss_difference":
        if each.low is None or each.high is None:
            return f"{100 * each.mean:+.3g} pp", ""
        return f"{100 * each.mean:+.3g} pp", f"{100 * each.low:+.3g} to {100 * each.high:+.3g}"
    value, _, bounds = sentences.times(each).partition(" (")
    return value, bounds.rstrip(")")


def _engine_starts(data: dict[str, Any]) -> str:
    drawn = ""
    found = data["engine_starts"]
    if found:
        others = list(found[0]["ttft_p99_over"])
        rows = []
        for each in found:
            over = [sentences.times(as_interval(each["ttft_p99_over"][o])) for o in others]
            rows.append(
                [
                    (each["policy"], f"{each['engine_start_s']:g} s"),
                    (sentences.number(each["ttft_p99"]["mean"]), ""),
                    (table.percent(each["slo_miss"]["mean"]), ""),
                    *((o.partition(" (")[0], o.partition(" (")[2].rstrip(")")) for o in over),
                ]
            )
        headings = ("engine start", "P99 (s)", "over SLO")
        drawn = _table([*headings, *(f"P99 over {o}" for o in others)], rows)
    return (
        "<section><h2>Effect of the engine start</h2>"
        f"{_paragraphs(sentences.engine_start(data), 'text')}{drawn}</section>"
    )


def _recordings(result: Result) -> list[tuple[str, Recording]]:
    return [(o.run.policy, o.recording) for o in result.outcomes if o.recording]


def _links(result: Result) -> str:
    caption = "Bytes loaded, as a share of the capacity of all host links; the first seed."
    return (
        "<section><h2>Link use over time</h2>"
        f"{_figure(time_charts.link_use(_recordings(result)), caption)}</section>"
    )


def _memory(result: Result) -> str:
    capacity = result.study.hardware.memory
    parts = list[str]()
    for policy, recording in _recordings(result):
        if POLICIES[policy].unlimited_memory:
            continue
        opened = " open" if not parts else ""
        above = (
            "Bytes of each model's layers: strong while the model serves, faint while it is only "
            "kept. The KV cache is on top."
        )
        below = "The resident leading layers of each model: in a full row all are resident."
        parts.append(
            f"<details{opened}><summary>{escape(policy)}</summary>"
            f"{_figure(time_charts.memory(recording, capacity), above)}"
            f"{_figure(time_charts.layers(recording), below)}</details>"
        )
    if not parts:
        return ""
    note = "The GPU on which most models served in the run of the first seed."
    return (
        f'<section><h2>Memory of one GPU over time</h2><p class="note">{note}</p>'
        f"{''.join(parts)}</section>"
    )


def _method(data: dict[str, Any]) -> str:
    study, hardware = data["study"], data["study"]["hardware"]
    prose = [
        "A discrete-event simulation: links and decoding are fluid, prefills of an instance run "
        "one after the other, and service times are those of the model catalogue.",
        f"Nodes have {hardware['node_devices']} GPUs of {hardware['memory'] / 1e9:g} GB for layers "
        f"and KV caches; {_paths(hardware['multipath'])}.",
        f"A start takes {1000 * study['switch_s']:g} ms before its layers load or are used.",
        "Layer hits: the share of the layers needed by starts that were resident when the start "
        "began. Wasted: bytes loaded in the background and never used. GPU hours: hours of GPUs "
        "with an instance. Quantiles are by nearest rank, in each seed.",
        "The same arguments give the same numbers, byte for byte. Made with "
        + sentences.listed([f"{name} {number}" for name, number in data["versions"].items()])
        + ".",
    ]
    return f"<section><h2>Method</h2>{_paragraphs(prose, 'note')}</section>"


def _paths(multipath: int) -> str:
    if multipath == 1:
        return "a load uses its GPU's own host link"
    return (
        f"if a policy can use more than its GPU's own host link, a load may use {multipath} links"
    )
