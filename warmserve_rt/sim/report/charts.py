"""Draw plots as SVG text without a library, so that a report is self-contained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH = 680
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 44
COLOURS = 8  # the number of colours of the report's style sheet, from --c0 on
# There are more dashes than colours: a dash alone identifies a line, for colour-blind readers.
DASHES = (
    "", "9 4", "2 3", "10 3 2 3", "4 4", "16 5", "6 3 2 3 2 3", "1 5", "14 3 5 3", "3 8",
    "12 3 2 3 2 3 2 3", "5 2", "18 3 2 3", "8 2 1 2", "7 7", "20 8",
)  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """A map from values to pixels, linear in ``shape(value)``."""

    low: float
    high: float
    first: float
    last: float
    ticks: tuple[tuple[float, str], ...]
    shape: Callable[[float], float] = float

    def __call__(self, value: float) -> float:
        """Return the pixel of a value. Values beyond the ends are moved to the ends."""
        low, high = self.shape(self.low), self.shape(self.high)
        part = (self.shape(min(max(value, self.low), self.high)) - low) / (high - low)
        return self.first + part * (self.last - self.first)


def linear(low: float, high: float, first: float, last: float, unit: str = "") -> Scale:
    """Return a linear scale with about five round ticks."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 6)
    begin = math.ceil(low / step - 1e-9)
    values = [i * step for i in range(begin, math.floor(high / step + 1e-9) + 1)]
    return Scale(low, high, first, last, tuple((v, f"{v:.6g}{unit}") for v in values))


def logarithmic(low: float, high: float, first: float, last: float) -> Scale:
    """Return a logarithmic scale of seconds. Ticks are at 1, 2 and 5, or over a wide range at 1."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 2, 5) if math.log10(high / low) < 3 else (1,)
    values = [d * 10.0**e for e in exponents for d in digits]
    ticks = tuple((v, seconds(v)) for v in values if low <= v * 1.0001 and v <= high * 1.0001)
    return Scale(low, high, first, last, ticks, math.log10)


def nines(high: float, first: float, last: float) -> Scale:
    """Return a scale of shares up to ``high`` < 1: each step up leaves a tenth of the rest."""
    known = (0.0, 0.5, 0.8, 0.9, 0.97, 0.99, 0.999, 0.9999)
    ticks = tuple((share, f"{100 * share:.6g} %") for share in known if share <= high)
    return Scale(0.0, high, first, last, ticks, lambda share: -math.log10(1.0 - share))


def seconds(value: float) -> str:
    return f"{value:g} s" if value >= 1 else f"{1000 * value:g} ms"


def svg(height: float, label: str, body: Iterable[str]) -> str:
    """Return an SVG element. ``label``: the text for screen readers."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(label)}">'
        + "".join(body)
        + "</svg>"
    )


def text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{escape(words)}</text>'


def rule(x1: float, y1: float, x2: float, y2: float, kind: str = "grid") -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def axes(x: Scale, y: Scale, x_title: str, y_title: str) -> list[str]:
    """Return grid and ticks. The title of y is above its axis, so that it is not rotated."""
    parts = []
    for value, label in y.ticks:
        parts.append(rule(x.first, y(value), x.last, y(value)))
        parts.append(text(x.first - 8, y(value) + 4, label, "end"))
    for value, label in x.ticks:
        parts.append(rule(x(value), y.first, x(value), y.first + 4, "axis"))
        parts.append(text(x(value), y.first + 18, label, "middle"))
    parts.append(rule(x.first, y.first, x.last, y.first, "axis"))
    parts.append(text((x.first + x.last) / 2, y.first + 36, x_title, "middle", "title"))
    parts.append(text(4, y.last - 12, y_title, "start", "title"))
    return parts


def line(points: Sequence[tuple[float, float]], place: int, name: str) -> str:
    """Return a line. ``points``: in pixels; ``place``: chooses colour and dashes."""
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    dash = DASHES[place % len(DASHES)]
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<path class="line" style="stroke:{colour(place)}"{dashes} d="{path}">'
        f"<title>{escape(name)}</title></path>"
    )


def marker(x: float, y: float, place: int, title: str = "") -> str:
    """Return a marker. Its form tells the place without colour: six outlines, full or hollow."""
    outlines = (
        "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z",
        "M-4 -4H4V4H-4Z",
        "M0 -5.5L5.5 0L0 5.5L-5.5 0Z",
        "M0 -5L5 4H-5Z",
        "M0 5L5 -4H-5Z",
        "M-2 -5H2V-2H5V2H2V5H-2V2H-5V-2H-2Z",
    )
    outline = outlines[place % len(outlines)]
    hollow = place // len(outlines) % 2
    paint = f"fill:var(--page);stroke:{colour(place)}" if hollow else f"fill:{colour(place)}"
    inside = f"<title>{escape(title)}</title>" if title else ""
    return (
        f'<path class="dot" style="{paint}" transform="translate({x:.1f} {y:.1f})" '
        f'd="{outline}">{inside}</path>'
    )


def colour(place: int) -> str:
    return f"var(--c{place % COLOURS})"


def legend(names: Sequence[str], *, markers: bool = False) -> str:
    """Return HTML with a sample of each line, its marker if the plot has markers, and its name."""
    items = []
    for place, name in enumerate(names):
        dash = DASHES[place % len(DASHES)]
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        items.append(
            '<li><svg class="key" viewBox="0 -1 58 12" aria-hidden="true"><line x1="1" y1="5" '
            f'x2="57" y2="5" class="line" style="stroke:{colour(place)}"{dashes}/>'
            f"{marker(29, 5, place) if markers else ''}</svg>{escape(name)}</li>"
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def distribution(curves: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> str:
    """Draw for each name the shares of requests at or below times."""
    times = [time for _, points in curves for time, _ in points if time > 0]
    low, high = (min(times), max(times)) if times else (0.01, 1.0)
    low, high = low * 0.9, max(high, 10 * low)
    bottom = 340
    x = logarithmic(low, high, LEFT, WIDTH - RIGHT)
    y = nines(0.9995, bottom, TOP + 26)
    body = axes(x, y, "time to first token", "share of requests at or below")
    for place, (name, points) in enumerate(curves):
        points = [point for point in points if point[1] <= y.high]
        if points:
            steps = [(x(points[0][0]), y(0.0))]
            for (time, share), (later, _) in pairwise(points):
                steps += [(x(time), y(share)), (x(later), y(share))]
            steps.append((x(points[-1][0]), y(points[-1][1])))
            body.append(line(steps, place, name))
    return svg(bottom + BOTTOM, "Distribution of times to first token by policy", body)


def attainment(
    curves: Sequence[tuple[str, Sequence[tuple[float, float, float | None, float | None]]]],
    goals: Sequence[float],
) -> str:
    """Draw for each name the shares within the SLO at rates, with the ends of their intervals."""
    rates = sorted({point[0] for _, points in curves for point in points})
    margin = (rates[-1] - rates[0]) * 0.05 or rates[0] * 0.5
    bottom = 340
    x = linear(rates[0] - margin, rates[-1] + margin, LEFT, WIDTH - RIGHT)
    x = Scale(x.low, x.high, x.first, x.last, tuple((rate, f"{rate:.3g}") for rate in rates))
    y = nines(0.9995, bottom, TOP + 26)
    body = axes(x, y, "requests per second", "share of requests within the SLO")
    body += [rule(x.first, y(goal), x.last, y(goal), "goal") for goal in goals]
    for place, (name, points) in enumerate(curves):
        # Whiskers are side by side, wider apart if there is only one rate.
        shift = (2.5 if len(rates) > 1 else 24.0) * (place - (len(curves) - 1) / 2)
        ends = [(x(rate) + shift, y(share)) for rate, share, _, _ in points]
        for (at, _), (_, _, low, high) in zip(ends, points, strict=True):
            if low is not None and high is not None:
                body.append(
                    f'<line class="whisker" style="stroke:{colour(place)}" x1="{at:.1f}" '
                    f'x2="{at:.1f}" y1="{y(low):.1f}" y2="{y(high):.1f}"/>'
                )
        body.append(line(ends, place, name))
        for (at, height), (rate, share, _, _) in zip(ends, points, strict=True):
            title = f"{name}: {100 * share:.2f} % at {rate:g} requests per second"
            body.append(marker(at, height, place, title))
    return svg(bottom + BOTTOM, "Share of requests within the SLO by rate and policy", body)
