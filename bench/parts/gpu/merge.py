"""Merges the results of bench/gpu.sh so far into one JSON file: ``merge.py WORK DEVICE OUT``.

It needs only the standard library, because the package may not be built.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

_BENCHES = ("experiments", "switch", "gpu", "driver_ops", "kernels")
_TAIL = 2000  # last characters of a failed step's output


def said(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def machine() -> dict[str, object]:
    wanted = (
        "name,driver_version,memory.total,pcie.link.gen.max,pcie.link.width.max,mig.mode.current"
    )
    cpu = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "uname": " ".join(platform.uname()),
        "cpu": cpu[0] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "gpus": said("nvidia-smi", f"--query-gpu={wanted}", "--format=csv,noheader").splitlines(),
        "nvcc": said("nvcc", "--version").rpartition("\n")[2],
    }


def steps(work: Path) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = {}
    for line in (work / "steps.tsv").read_text().splitlines():
        name, status, seconds = line.split("\t")
        found[name] = {"status": int(status), "seconds": int(seconds)}
        if int(status):
            log = work / f"{name}.log"
            found[name]["said"] = log.read_text(errors="replace")[-_TAIL:] if log.exists() else ""
    return found


def tests(work: Path) -> dict[str, Any]:
    """Return counts over all files, and the names of failed tests."""
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    names: list[str] = []
    for path in sorted(work.glob("tests-*.xml")):
        try:
            tree = ElementTree.parse(path)
        except ElementTree.ParseError:  # killed while it was written
            names.append(f"{path.stem.removeprefix('tests-')}: no results")
            continue
        for case in tree.iter("testcase"):
            if case.find("failure") is not None or case.find("error") is not None:
                counts["failed"] += 1
                names.append(f"{path.stem.removeprefix('tests-')}::{case.get('name')}")
            elif case.find("skipped") is not None:
                counts["skipped"] += 1
            else:
                counts["passed"] += 1
    if any(work.glob("tests-*.xml")) and not any(counts.values()):
        names.append("no test of this device was found")
    return {**counts, "failures": names}


def main() -> None:
    work, device, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    benches = {
        name: json.loads(path.read_text())
        for name in _BENCHES
        if (path := work / f"{name}.json").exists()
    }
    done, tested = steps(work), tests(work)
    experiments = benches.get("experiments", {})
    gpu = benches.get("gpu", {})
    facts = gpu or experiments
    report = {
        "simulated": device == "simcuda",
        "device": device,
        "gpu": facts.get("device", "unknown"),
        "driver_version": facts.get("driver_version", 0),
        "machine": machine(),
        "failed": {
            "steps": [name for name, step in done.items() if step["status"]],
            "parts": [
                name
                for name, part in {**experiments.get("parts", {}), **gpu.get("parts", {})}.items()
                if part["outcome"].startswith("failed")
            ],
            "refuted": [
                row["name"] for row in gpu.get("assumptions", []) if row["outcome"] == "refuted"
            ],
            "missed": [
                target["name"]
                for bench in benches.values()
                for target in bench["targets"]
                if not target["met"]
            ],
            "tests": tested["failures"],
        },
        "steps": done,
        "tests": tested,
        "benches": benches,
    }
    partial = out.with_name(out.name + ".partial")
    partial.write_text(json.dumps(report, indent=2) + "\n")
    partial.replace(out)


if __name__ == "__main__":
    main()
