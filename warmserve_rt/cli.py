"""The command line: ``warmserve-rt demo | live | inspect | simulate | cache``. Needs extras, demo
or sim, live both."""

from __future__ import annotations

import os
import sys
from contextlib import closing
from enum import Enum
from pathlib import Path
from typing import Annotated

try:
    import typer
except ModuleNotFoundError:
    extra = "sim" if sys.argv[1:2] == ["simulate"] else "demo"
    sys.exit(f"warmserve-rt needs typer: pip install 'warmserve_rt[{extra}]'")

from ._errors import WarmServeError
from .checkpoint import open_checkpoint
from .engines.vllm import command as cache
from .layers import build_layout
from .sim.command import simulate

app = typer.Typer(
    help="Keeps layers of many models warm in one device's memory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(simulate)
app.add_typer(cache.app, name="cache")


def _version(asked: bool) -> None:
    if asked:
        import warmserve_rt

        typer.echo(f"warmserve-rt {warmserve_rt.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Keeps layers of many models warm in one device's memory."""


class Engine(Enum):
    """What the demo serves with."""

    transformers = "transformers"
    vllm = "vllm"


@app.command()
def demo(
    json: Annotated[Path | None, typer.Option(help="Write the results here.")] = None,
    requests: Annotated[int, typer.Option(min=2, help="How many arrive.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the arrivals.")] = 0,
    engine: Annotated[Engine, typer.Option(help="What serves them.")] = Engine.transformers,
    mutate: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Serve five real models in an arena that holds half of them, beside other ways."""
    if engine is Engine.vllm:  # whose starts torch would speak of; read when it is imported
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        from .demo.run import run

        status = run(json, requests=requests, seed=seed, engine=engine.value, mutate=mutate)
    except ModuleNotFoundError as error:
        extras = "demo,vllm" if engine is Engine.vllm else "demo"
        sys.exit(f"warmserve-rt demo needs {error.name}: pip install 'warmserve_rt[{extras}]'")
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"warmserve-rt demo: {error}")
    raise typer.Exit(status)


@app.command()
def live(
    json: Annotated[Path | None, typer.Option(help="Write the results here.")] = None,
    requests: Annotated[int, typer.Option(min=2, help="About how many arrive.")] = 40,
    seconds: Annotated[float, typer.Option(help="In which they arrive.")] = 90.0,
    seed: Annotated[int, typer.Option(help="Of the arrivals.")] = 0,
    mutate: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Let the scheduler prewarm real models, and compare with what the simulator predicts."""
    try:
        from .demo.live import run

        status = run(json, requests=requests, seconds=seconds, seed=seed, mutate=mutate)
    except ModuleNotFoundError as error:
        sys.exit(f"warmserve-rt live needs {error.name}: pip install 'warmserve_rt[demo,sim]'")
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"warmserve-rt live: {error}")
    raise typer.Exit(status)


@app.command()
def inspect(checkpoint: Annotated[Path, typer.Argument(help="File or directory.")]) -> None:
    """Show the layers of a checkpoint, as a runtime would keep them."""
    from rich.console import Console
    from rich.table import Table

    try:
        with closing(open_checkpoint(checkpoint, allow_symlinks=True)) as opened:
            layout = build_layout(opened)
    except (WarmServeError, OSError) as error:
        raise SystemExit(f"warmserve-rt: {error}") from None
    table = Table("layer", "tensors", "MiB", title=str(checkpoint))
    for layer in layout.layers:
        table.add_row(layer.name, str(len(layer.tensors)), f"{layer.nbytes / 2**20:.1f}")
    table.add_section()
    table.add_row("all", str(len(layout.tensors)), f"{layout.nbytes / 2**20:.1f}")
    Console().print(table)


def main() -> None:
    """Entry point of ``warmserve-rt``."""
    app()


if __name__ == "__main__":
    main()
