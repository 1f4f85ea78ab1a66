"""Checks the include order of csrc/README.md: a file of csrc/ includes only files below it.

The README lists the folders from top to bottom and, for some folders, their files. simcuda/ is
beside this order.
"""

import re
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"
INCLUDE = re.compile(r'^\s*#\s*include\s+(["<])([^">]+)[">]', re.MULTILINE)
SOURCES = (".h", ".cpp", ".inl", ".cu")

BESIDE = "simcuda"
BESIDE_INCLUDES = ("simcuda/", "driver/cuda/abi.h", "kernels/", "base/")
CUDA_ABI, KNOW_CUDA = "driver/cuda/abi.h", ("driver/cuda/", "simcuda/")


def order() -> list[str]:
    """Return the units of the README's list, from top to bottom.

    A unit is a folder or, if the files of the folder are listed, a header with its source.
    """
    section = (CSRC / "README.md").read_text().split("## Include order")[1].split("\n## ")[0]
    units: list[str] = []
    folder = ""
    for inner, name in re.findall(r"^ {4}(  )?(\w+)  ", section, re.MULTILINE):
        if not inner:
            folder = name
        elif units[-1] == folder:
            units.pop()
        units.append(f"{folder}/{name}" if inner else name)
    return units


def unit(path: str, units: list[str]) -> str | None:
    parts = path.rsplit(".", 1)[0].split("/")
    names = ("/".join(parts[:2]), parts[0])
    return next((name for name in names if name in units), None)


def misplaced(path: str, included: str, units: list[str]) -> str | None:
    """Return the problem with an include of another file of csrc/, or None."""
    if included == CUDA_ABI and not path.startswith(KNOW_CUDA):
        return "only driver/cuda/ and simcuda/ may use CUDA"
    if path.startswith(f"{BESIDE}/"):
        allowed = included.startswith(BESIDE_INCLUDES)
        return None if allowed else f"{BESIDE}/ may include only {', '.join(BESIDE_INCLUDES[1:])}"
    if included.startswith(f"{BESIDE}/"):
        return f"no layer may include {BESIDE}/"
    ours, theirs = unit(path, units), unit(included, units)
    if theirs is None:
        return "which is missing from the list in csrc/README.md"
    if ours == theirs:
        return None
    folders = [tuple(file.split("/")[:-1]) for file in (path, included)]
    if folders[0][0] == folders[1][0] and all(len(folder) > 1 for folder in folders):
        return "folders of one layer may not include each other"
    if ours is not None and units.index(theirs) < units.index(ours):
        return "which is above it"
    return None


def problems() -> list[str]:
    units = order()
    files = {
        path.relative_to(CSRC).as_posix(): INCLUDE.findall(path.read_text())
        for path in sorted(CSRC.rglob("*"))
        if path.suffix in SOURCES
    }
    found = [
        f"the README lists {name}, which does not exist"
        for name in units
        if not (CSRC / name).is_dir() and not any(unit(file, units) == name for file in files)
    ]
    graph: dict[str, set[str]] = {}
    for name, includes in files.items():
        if unit(name, units) is None and not name.startswith(f"{BESIDE}/"):
            found.append(f"{name} is missing from the list in csrc/README.md")
        for bracket, included in includes:
            if included.startswith("pybind11/") and not name.startswith("bind/"):
                found.append(f"{name} includes {included}: only bind/ may use Python")
            elif re.match(r"cuda|nv", included) and not name.endswith(".cu"):
                found.append(f"{name} includes {included}: include {CUDA_ABI}, which declares CUDA")
            elif bracket == '"' and included not in files:
                found.append(f"{name} includes {included}, which does not exist")
            elif bracket == '"' and (why := misplaced(name, included, units)):
                found.append(f"{name} includes {included}: {why}")
            # A .inl file is a part of the source that includes it.
            if bracket == '"' and name.endswith((".h", ".cpp")):
                stem, other = (re.sub(r"\.(h|cpp)$", "", file) for file in (name, included))
                if stem != other:
                    graph.setdefault(stem, set()).add(other)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"a cycle of includes: {' <- '.join(error.args[1])}")
    if not files:
        found.append("csrc/ has no sources")
    return found


if __name__ == "__main__":
    sys.exit("\n".join(problems()) or None)
