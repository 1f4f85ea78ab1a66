"""Holds csrc/ to the order in csrc/README.md: a file includes only what stands below it."""

import re
import sys
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"
INCLUDE = re.compile(r'^\s*#\s*include\s+(["<])([^">]+)[">]', re.MULTILINE)


def order() -> list[str]:
    """The units of the README's list, from top to bottom."""
    section = (CSRC / "README.md").read_text().split("## Include order")[1].split("\n## ")[0]
    return re.findall(r"^    (\w+)  ", section, re.MULTILINE)


def unit(path: str) -> str:
    """A folder is one unit, and so are a header and its source."""
    return path.split("/")[0] if "/" in path else path.rsplit(".", 1)[0]


def problems() -> list[str]:
    units = order()
    found = [f"the README lists no {name}" for name in ("driver", "bind") if name not in units]
    files = [path for path in sorted(CSRC.rglob("*")) if path.suffix in (".h", ".cpp")]
    for path in files:
        name = path.relative_to(CSRC).as_posix()
        own = unit(name)
        if own not in units:
            found.append(f"{name} is in no unit of csrc/README.md")
            continue
        for bracket, included in INCLUDE.findall(path.read_text()):
            if included.startswith("pybind11/") and own != "bind":
                found.append(f"{name} includes {included}: only bind/ knows Python")
            elif re.match(r"cuda|nv", included):
                found.append(f"{name} includes {included}: only a driver may know CUDA")
            elif bracket == '"' and unit(included) not in units:
                found.append(f"{name} includes {included}, which is in no unit")
            elif (
                bracket == '"'
                and unit(included) != own
                and units.index(unit(included)) <= units.index(own)
            ):
                found.append(f"{name} includes {included}, which stands above it")
    if not files:
        found.append("there is nothing in csrc/")
    return found


if __name__ == "__main__":
    sys.exit("\n".join(problems()) or None)
