"""Draw plots over the time of a run: the use of links and the memory of one device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from html import escape

from warmserve_rt.sim.study.runner import Recording
from warmserve_rt.sim.study.timeline import Track

from .charts import LEFT, RIGHT, TOP, WIDTH, Scale, axes, colour, linear, rule, svg, text

ROW = 17  # height of a model's row in pixels
NAMES = 112  # width of the column of names in pixels


def link_use(runs: Sequence[tuple[str, Recording]]) -> str:
    """Draw a strip for each name, all on the same scale."""
    height, gap = 54, 38
    most = max((max(recording.link_use) for _, recording in runs), default=0.0)
    most = max(0.05, min(1.0, most * 1.05))
    body, bottom = [], 0.0
    for place, (name, recording) in enumerate(runs):
        top = TOP + gap + place * (height + gap)
        bottom = top + height
        x = _minutes(recording.times)
        y = linear(0.0, most, bottom, top)
        ends = ((0.0, "0"), (most, f"{100 * most:.3g} %"))
        for value, label in ends:
            body.append(rule(x.first, y(value), x.last, y(value)))
            body.append(text(x.first - 8, y(value) + 4, label, "end"))
        edge = [
            (x(t / 60), y(use)) for t, use in zip(recording.times, recording.link_use, strict=True)
        ]
        path = f"M{edge[0][0]:.1f} {bottom:g}" + "".join(f"H{a:.1f}V{b:.1f}" for a, b in edge)
        body.append(
            f'<path class="area" style="fill:{colour(place)}" d="{path}V{bottom:g}Z">'
            f"<title>{escape(name)}</title></path>"
        )
        body.append(text(x.first, top - 8, name, "start", "title"))
        if place == len(runs) - 1:
            body += [text(x(v), bottom + 18, label, "middle") for v, label in x.ticks]
            body.append(text((x.first + x.last) / 2, bottom + 36, "minutes", "middle", "title"))
    return svg(bottom + 46, "Use of the host links over time by policy", body)


def memory(recording: Recording, capacity: float) -> str:
    """Draw the bytes of a device, stacked: a band for each model that it held, and the KV cache.

    Bands are strong while their model serves, and faint while it is only kept.
    """
    bottom = 300.0
    x = _minutes(recording.times)
    y = linear(0.0, capacity / 1e9, bottom, TOP + 26)
    if y(y.ticks[-1][0]) > y.last + 14:
        y = replace(y, ticks=(*y.ticks, (y.high, f"{y.high:g}")))
    body = axes(x, y, "minutes", f"memory of GPU {recording.device} (GB)")
    columns = [x(time / 60) for time in recording.times]
    floor = [0.0] * len(columns)
    for place, track in enumerate(recording.memory.tracks.values()):
        roof = [low + size / 1e9 for low, size in zip(floor, track.nbytes, strict=True)]
        lower, upper = [y(v) for v in floor], [y(v) for v in roof]
        strength = [
            int(size > 0) + int(on) for size, on in zip(track.nbytes, track.serving, strict=True)
        ]
        for begin, end, level in _runs(strength):
            kind = "serving" if level == 2 else "kept"
            state = "serves" if level == 2 else "is kept"
            shape = _band(columns, lower, upper, begin, end)
            body.append(
                f'<path class="band {kind}" style="fill:{colour(place)}" d="{shape}">'
                f"<title>{escape(_name(track))} {state}</title></path>"
            )
        body.append(_inscription(columns, lower, upper, _name(track)))
        floor = roof
    caches = [low + kv / 1e9 for low, kv in zip(floor, recording.memory.kv, strict=True)]
    lower, upper = [y(v) for v in floor], [y(v) for v in caches]
    for begin, end, _ in _runs([int(kv > 0) for kv in recording.memory.kv]):
        shape = _band(columns, lower, upper, begin, end)
        body.append(f'<path class="band cache" d="{shape}"><title>KV cache</title></path>')
    body.append(_inscription(columns, lower, upper, "KV cache"))
    return svg(bottom + 44, f"Memory of GPU {recording.device} by model over time", body)


def layers(recording: Recording) -> str:
    """Draw a row for each model: the number of its leading layers that are resident."""
    x = _minutes(recording.times, NAMES + 8)
    columns = [x(time / 60) for time in recording.times]
    body, bottom = [], float(TOP)
    for place, track in enumerate(recording.memory.tracks.values()):
        bottom = TOP + (place + 1) * ROW
        upper = [bottom - (ROW - 3) * k / track.layers_total for k in track.layers]
        lower = [bottom] * len(columns)
        strength = [
            int(k > 0) + int(on and k > 0)
            for k, on in zip(track.layers, track.serving, strict=True)
        ]
        body.append(rule(x.first, bottom, x.last, bottom))
        body.append(text(NAMES, bottom - 4, _name(track), "end"))
        for begin, end, level in _runs(strength):
            kind = "serving" if level == 2 else "kept"
            most = f"{max(track.layers[begin:end])} of {track.layers_total}"
            shape = _band(columns, lower, upper, begin, end)
            body.append(
                f'<path class="band {kind}" style="fill:{colour(place)}" d="{shape}"><title>'
                f"{escape(_name(track))}: up to {most} layers</title></path>"
            )
    body += [text(x(v), bottom + 18, label, "middle") for v, label in x.ticks]
    body.append(text((x.first + x.last) / 2, bottom + 36, "minutes", "middle", "title"))
    return svg(bottom + 44, f"Leading layers of each model on GPU {recording.device}", body)


def _minutes(times: Sequence[float], left: float = LEFT) -> Scale:
    return linear(0.0, max(times[-1], 1e-6) / 60, left, WIDTH - RIGHT)


def _name(track: Track) -> str:
    return f"{track.model} / {track.rank}" if track.rank else track.model


def _runs(levels: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield begin, end and level of each stretch of equal levels other than 0."""
    begin = 0
    for i in range(1, len(levels) + 1):
        if i == len(levels) or levels[i] != levels[begin]:
            if levels[begin]:
                yield begin, i, levels[begin]
            begin = i


def _band(
    columns: Sequence[float],
    lower: Sequence[float],
    upper: Sequence[float],
    begin: int,
    end: int,
) -> str:
    """Return a closed path in steps, in which each sample holds until the next one."""
    stop = columns[min(end, len(columns) - 1)]
    there = _steps(columns, upper, range(begin, end), stop)
    path = f"M{columns[begin]:.1f} {upper[begin]:.1f}{there}V{lower[end - 1]:.1f}"
    for i in range(end - 1, begin, -1):
        if lower[i - 1] != lower[i]:
            path += f"H{columns[i]:.1f}V{lower[i - 1]:.1f}"
    return path + f"H{columns[begin]:.1f}Z"


def _steps(columns: Sequence[float], heights: Sequence[float], places: range, stop: float) -> str:
    path = ""
    for i in places[1:]:
        if heights[i] != heights[i - 1]:
            path += f"H{columns[i]:.1f}V{heights[i]:.1f}"
    return path + f"H{stop:.1f}"


def _inscription(
    columns: Sequence[float], lower: Sequence[float], upper: Sequence[float], name: str
) -> str:
    """Return the name at the longest level and thick part of a band, or an empty text."""
    best, begin = (0.0, 0, 0), 0
    for i in range(1, len(columns) + 1):
        if i == len(columns) or (lower[i], upper[i]) != (lower[begin], upper[begin]):
            length = columns[min(i, len(columns) - 1)] - columns[begin]
            if lower[begin] - upper[begin] >= 13:
                best = max(best, (length, begin, min(i, len(columns) - 1)))
            begin = i
    length, begin, end = best
    if length < 6.6 * len(name) + 8:
        return ""
    middle = (columns[begin] + columns[end]) / 2
    return text(middle, (lower[begin] + upper[begin]) / 2 + 4, name, "middle", "inscription")
