"""Risk: a report cannot be read by some readers or in one of its colour schemes."""

from __future__ import annotations

import re
from pathlib import Path

from warmserve_rt.sim.report import table


def test_colours_have_contrast_in_both_schemes() -> None:
    """Text has a contrast of at least 4.5, lines and bands of 3 (WCAG 2.1, 1.4.3 and 1.4.11)."""
    style = (Path(table.__file__).parent / "report.css").read_text()
    grounds = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(grounds) == 2
    for ground in grounds:
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", ground))
        for name in ("ink", "quiet"):
            assert contrast(colours[name], colours["page"]) >= 4.5, name
        for name in (f"c{i}" for i in range(8)):
            assert contrast(colours[name], colours["page"]) >= 3, name


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
