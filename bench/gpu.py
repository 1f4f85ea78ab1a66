"""How does a CUDA device behave, and does the simulated device behave the same?

    python bench/gpu.py --device cuda:0
    python bench/gpu.py --device simcuda
    python bench/gpu.py --device cuda:0 --experiments [E1 E2 ...]

The bench measures copies at the device's limit, loads relative to it, swaps and leases. It compares
the bytes on the device in four ways. It also prints a table of the simulated driver's assumptions
about CUDA, each confirmed or refuted on the device. With --experiments it runs these instead, each
of which decides a question of design (parts/gpu/experiments). Each part and each experiment runs in
a process of its own, so that one that fails, hangs or breaks the device's context does not affect
the others.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from lib.harness import MIB, Bench, scratch, write_checkpoint
from parts.gpu import content, experiments, speed, with_torch
from parts.gpu.assumptions.run import run_all, table
from parts.gpu.part import NotRun, Part, checkpoints
from warmserve_rt.testing.simcuda import simulated_cuda

PARTS: dict[str, Callable[[Part], None]] = {
    "bandwidth": speed.bandwidth,
    "content": content.content,
    "digest": content.digest,
    "graph": content.graph,
    "capture": content.capture,
    "torch": with_torch.torch,
    "load": speed.load,
    "swap": speed.swap,
    "lease": speed.lease,
}
EXPERIMENTS = experiments.load_all()
WORK: Mapping[str, Callable[[Part], None]] = {**PARTS, **EXPERIMENTS}
PART_LIMIT = 60.0  # seconds
EXPERIMENTS_LIMIT = 480.0  # seconds for all of them on a GPU

# The simulated device copies at this rate, so that copies are still in flight at the next call.
# Calls take time, so that a cost model can be fitted: microseconds per call and per granule. They
# are so short that the simulator spins, because a sleep takes longer than requested.
SIMULATED: dict[str, Any] = {
    "memory": "8GiB",
    "h2d": 2e9,
    "costs": {
        "cuMemCreate": (20.0, 0.0),
        "cuMemMap": (5.0, 0.0),
        "cuMemSetAccess": (10.0, 0.15),
        "cuMemUnmap": (8.0, 0.1),
    },
}


@dataclass
class Report:
    """The fields that the JSON has in addition to a bench's."""

    simulated: bool
    device: str = "unknown"
    driver_version: int = 0
    parts: dict[str, dict[str, object]] = field(default_factory=dict)
    assumptions: list[dict[str, str]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def add(self, name: str, part: dict[str, object]) -> None:
        self.parts[name] = part
        if str(part["outcome"]).startswith("failed"):
            self.failed.append(name)

    def write(self, bench: Bench) -> None:
        """Write the JSON file. Called after each part, so that a later failure loses no results."""
        bench.finish()
        if path := bench.args.json:
            path.write_text(
                json.dumps(json.loads(path.read_text()) | asdict(self), indent=2) + "\n"
            )


@contextmanager
def environment(device: str) -> Iterator[Mapping[str, str]]:
    """Yield an environment in which ``libcuda.so.1`` is the device's driver."""
    if device == "simcuda":
        with simulated_cuda(**SIMULATED, check=False) as cuda:
            yield cuda.environment
    else:
        yield os.environ


def run_part(args: argparse.Namespace) -> None:
    """Run a part in this process, write its results and exit."""
    part = Part(args, args.folder, args.simulated)
    outcome = "ran"
    try:
        WORK[args.part](part)
    except NotRun as error:
        outcome = f"not run: {error}"
    part.save(outcome)
    sys.stdout.flush()
    os._exit(0)  # the driver frees what is left on the device when the process ends


def start_part(
    name: str,
    bench: Bench,
    folder: Path,
    env: Mapping[str, str],
    simulated: bool,
    limit: float = PART_LIMIT,
) -> dict[str, object]:
    """Run a part in a process, record its rows and return its outcome and duration."""
    out = folder / f"{name}.json"
    device = "cuda:0" if simulated else bench.args.device
    command = [sys.executable, __file__, "--part", name, "--device", device]
    command += ["--folder", str(folder), "--json", str(out), "--leases", str(bench.args.leases)]
    command += ["--simulated"] * simulated + ["--quick"] * bench.args.quick
    begin = monotonic()
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=limit)
        outcome = "" if process.returncode == 0 else f"failed: status {process.returncode}"
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        if isinstance(error, KeyboardInterrupt):
            raise
        outcome = f"failed: not finished after {limit:g} s"
    if said.strip():
        print(said.rstrip(), flush=True)
    found: dict[str, Any] = {"rows": [], "targets": [], "decides": []}
    if out.exists():
        found = json.loads(out.read_text())
    for row in found["rows"]:
        bench.row(*row)
    for target in found["targets"]:
        bench.target(*target)
    outcome = outcome or str(found.get("outcome") or "failed: no results")
    lines = said.strip().splitlines()
    if outcome.startswith("failed") and lines:
        outcome += f" ({lines[-1][:200]})"
    if outcome != "ran":
        print(f"  {name}: {outcome}", flush=True)
    taken = round(monotonic() - begin, 1)
    return {"outcome": outcome, "seconds": taken, "decides": found["decides"]}


def start_experiment(
    name: str, bench: Bench, folder: Path, env: Mapping[str, str], simulated: bool, left: float
) -> dict[str, object]:
    """Run an experiment and print its block; it must decide something, or say why it cannot."""
    experiment = EXPERIMENTS[name]
    print(experiment.heading(), flush=True)
    found: dict[str, Any] = {"outcome": "not run: no time was left", "seconds": 0.0, "decides": []}
    if left > 0:
        found = start_part(name, bench, folder, env, simulated, min(left, PART_LIMIT))
    if found["outcome"] == "ran" and not found["decides"]:
        found["outcome"] = "failed: it decided nothing"
    says = "would decide" if simulated else "decides"
    undecided = [] if found["outcome"] == "ran" else [_verdict(found["outcome"])]
    for sentence in (*found["decides"], *undecided):
        decided = not sentence.startswith(("FAILED", "NOT RUN"))
        print(experiments.wrapped(f"{says}: {sentence}" if decided else sentence), flush=True)
    if any(sentence.startswith("FAILED") for sentence in found["decides"]):
        found["outcome"] = "failed: a question was not answered"
    return {"question": experiment.question, "expected": experiment.expected, **found}


def _verdict(outcome: str) -> str:
    kind, _, why = outcome.partition(": ")
    return f"{kind.upper()}: {why}"


def device_facts(report: Report, env: Mapping[str, str]) -> None:
    """Read the device's name and driver version in another process, so that this one has no
    context on the device."""
    script = "from lib.cuda import Gpu; gpu = Gpu(); print(gpu.version, gpu.name)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=env, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{report.device}: cannot use the device:\n{done.stderr}")
    version, _, report.device = done.stdout.strip().partition(" ")
    report.driver_version = int(version)


def write_checkpoints(bench: Bench, folder: Path, simulated: bool, names: Set[str]) -> None:
    for name, llama in checkpoints(simulated, bench.args.quick).items():
        if name in names:
            nbytes = write_checkpoint(folder / f"{name}.safetensors", llama.shapes())
            bench.row(f"checkpoint_{name}_mib", nbytes / MIB, "MiB")


def run_experiments(report: Report, bench: Bench, folder: Path, env: Mapping[str, str]) -> None:
    names = bench.args.experiments or list(EXPERIMENTS)
    limit = math.inf if report.simulated else EXPERIMENTS_LIMIT
    begin = monotonic()
    needed = {checkpoint for name in names for checkpoint in EXPERIMENTS[name].checkpoints}
    write_checkpoints(bench, folder, report.simulated, needed)
    for name in names:
        left = limit - (monotonic() - begin)
        report.add(name, start_experiment(name, bench, folder, env, report.simulated, left))
        report.write(bench)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--leases", type=int, default=20_000, help="timed leases of each kind")
    parser.add_argument(
        "--rows", default="", metavar="TEXT", help="only assumptions with this text in the name"
    )
    parser.add_argument("--part", choices=WORK, metavar="NAME", help="run only this part")
    parser.add_argument(
        "--experiments", nargs="*", choices=EXPERIMENTS, metavar="NUMBER",
        help="run these experiments, or all, and nothing else",
    )  # fmt: skip
    parser.add_argument("--limit", type=float, default=180, help="seconds for the assumptions")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--simulated", action="store_true", help=argparse.SUPPRESS)
    bench = Bench.start("gpu", parser, leases=20, rows="granularity")
    if bench.args.device not in ("cuda:0", "simcuda"):
        parser.error("--device must be cuda:0, or simcuda, which needs no GPU")
    if bench.args.folder:
        run_part(bench.args)
    if bench.args.part in EXPERIMENTS:
        bench.args.experiments = [bench.args.part]
    simulated = bench.args.device == "simcuda"
    report = Report(simulated, bench.args.device)
    with environment(bench.args.device) as env, scratch() as folder:
        device_facts(report, env)
        print(f"{report.device}, driver {report.driver_version}", flush=True)
        if simulated:
            print("THIS IS THE SIMULATED DEVICE: the numbers below are not a GPU's", flush=True)
        if bench.args.experiments is not None:
            run_experiments(report, bench, folder, env)
            return
        if not bench.args.part:
            outcomes = run_all(env, only=bench.args.rows, limit=bench.args.limit)
            print(table(outcomes), flush=True)
            report.assumptions = [asdict(outcome) for outcome in outcomes]
            report.failed += [o.name for o in outcomes if o.outcome == "refuted"]
            report.write(bench)
        every = checkpoints(simulated, bench.args.quick)
        write_checkpoints(bench, folder, simulated, every.keys())
        for name in [bench.args.part] if bench.args.part else PARTS:
            report.add(name, start_part(name, bench, folder, env, simulated))
            report.write(bench)


if __name__ == "__main__":
    main()
