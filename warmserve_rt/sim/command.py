"""``warmserve-rt simulate``. It imports its dependencies when it runs; other commands need none."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from warmserve_rt.sim.study.study import Study

RATE, RATES, MINUTES = 1.0, "0.25,0.5,1,2", 10.0


def simulate(
    workload: Annotated[
        str, typer.Option(help="azure, mooncake, power-law, servegen-periodic, ... or a CSV file.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for report.html and summary.json.")],
    gpus: Annotated[int, typer.Option(help="GPUs of the fleet.")] = 16,
    node_gpus: Annotated[int, typer.Option(help="GPUs of a node, at most.")] = 8,
    models: Annotated[
        str, typer.Option(help="Number of models, or 'paper' for the paper's four.")
    ] = "24",
    policies: Annotated[str, typer.Option(help="'all', or names separated by commas.")] = "all",
    seeds: Annotated[int, typer.Option(help="Paired runs of each policy; a file has one.")] = 5,
    rate: Annotated[
        float | None, typer.Option(help=f"Requests per second of all models. ({RATE:g})")
    ] = None,
    rates: Annotated[
        str | None, typer.Option(help=f"Rates among which the highest is sought. ({RATES})")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help=f"Minutes in which requests arrive. ({MINUTES:g})")
    ] = None,
    history: Annotated[
        float, typer.Option(help="First minutes of a file that are its history.")
    ] = 0,
    memory: Annotated[float, typer.Option(help="GB of a GPU for layers and KV caches.")] = 72.0,
    bandwidth: Annotated[float, typer.Option(help="GB/s of a GPU's host link.")] = 25.0,
    multipath: Annotated[int, typer.Option(help="Host links that one load may use.")] = 1,
    interference: Annotated[
        float, typer.Option(help="Relative slowdown of work for each busy neighbour on a GPU.")
    ] = 0.35,
    engine_start: Annotated[
        float, typer.Option(help="Seconds to start an engine, for policies without a waiting one.")
    ] = 5.0,
    engine_starts: Annotated[
        str, typer.Option(help="Engine starts to compare, in seconds with commas; '' for none.")
    ] = "0,2,5,10",
    switch: Annotated[float, typer.Option(help="Seconds that every start takes.")] = 0.01,
    slo_prefills: Annotated[
        float, typer.Option(help="Prefill times until a first token is due,")
    ] = 5.0,
    slo_seconds: Annotated[float, typer.Option(help="plus these seconds.")] = 0.2,
    jobs: Annotated[
        int | None, typer.Option(help="Number of processes; changes no result. (one per CPU)")
    ] = None,
) -> None:
    """Compare policies on a simulated fleet; print a table, and write a report and numbers."""
    try:
        from warmserve_rt._terminal import plain
        from warmserve_rt.sim.controllers.policies import POLICIES
        from warmserve_rt.sim.core.devices import Hardware
        from warmserve_rt.sim.report import terminal
        from warmserve_rt.sim.report.atomic_output import check_folder, write_files
        from warmserve_rt.sim.report.report import render
        from warmserve_rt.sim.study.digest import digest, to_json
        from warmserve_rt.sim.study.metrics import Slo
        from warmserve_rt.sim.study.study import Study, StudyError
    except ModuleNotFoundError as error:
        sys.exit(f"warmserve-rt simulate needs {error.name}: pip install 'warmserve_rt[sim]'")

    def make_study() -> Study:
        if Path(workload).is_file() and not (rate is None and rates is None and minutes is None):
            raise StudyError(
                f"{workload} has its own rate and duration: omit --rate, --rates and --minutes"
            )
        return Study(
            workload=workload,
            hardware=Hardware(
                devices=gpus,
                node_devices=max(1, min(gpus, node_gpus)),
                memory=memory * 1e9,
                bandwidth=bandwidth * 1e9,
                multipath=multipath,
                interference=interference,
            ),
            models=int(models) if models.removeprefix("-").isdecimal() else models,
            policies=tuple(POLICIES) if policies == "all" else tuple(_words(policies)),
            rate=RATE if rate is None else rate,
            rates=_numbers("rates", RATES if rates is None else rates),
            seeds=seeds,
            minutes=MINUTES if minutes is None else minutes,
            history_minutes=history,
            switch_s=switch,
            engine_start_s=engine_start,
            engine_starts_s=_numbers("engine-starts", engine_starts),
            slo=Slo(slo_prefills, slo_seconds),
        )

    try:
        try:
            study = make_study()
            check_folder(out)
        except (ValueError, OSError) as error:
            raise StudyError(str(error)) from None
        result = terminal.run(study, _cpus() if jobs is None else jobs)
    except StudyError as error:
        print(f"warmserve-rt simulate: {plain(error)}", file=sys.stderr)
        raise typer.Exit(2) from None
    data = digest(result)
    try:
        write_files({"summary.json": to_json(data), "report.html": render(result, data)}, out)
    except OSError as error:
        sys.exit(f"warmserve-rt simulate: {plain(error)}")
    terminal.show(data)
    print(f"report.html and summary.json are in {plain(out)}")


def _numbers(option: str, words: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, _words(words)))
    except ValueError:
        raise ValueError(f"--{option} must be numbers separated by commas, got {words!r}") from None


def _words(words: str) -> list[str]:
    """Return the words between commas; an empty list for an empty text."""
    return [word.strip() for word in words.split(",")] if words.strip() else []


def _cpus() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0))
