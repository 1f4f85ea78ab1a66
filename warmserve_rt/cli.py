"""The command line: ``warmserve-rt demo | live | inspect | size | simulate | cache | memory``.

All commands need typer. demo and live need the extra "demo", simulate and live the extra "sim".
"""

from __future__ import annotations

import os
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

try:
    import typer
except ModuleNotFoundError:
    EXTRAS = {"simulate": "sim", "demo": "demo", "live": "demo,sim"}
    extra = EXTRAS.get("".join(sys.argv[1:2]))
    sys.exit(
        "warmserve-rt needs typer: pip install "
        + (f"'warmserve_rt[{extra}]'" if extra else "typer")
    )

from warmserve_rt.engines.vllm import command as cache
from warmserve_rt.sim.command import simulate

from . import memory_command
from ._errors import WarmServeError
from ._units import parse_bytes

if TYPE_CHECKING:
    from warmserve_rt.checkpoint.sizes import Sizes

app = typer.Typer(
    help="Keep layers of many models warm in one device's memory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(simulate)
app.add_typer(cache.app, name="cache")
app.add_typer(memory_command.app, name="memory")
Granule = Annotated[str, typer.Option(help="Bytes of a granule: 2MiB on the host, 16MiB on CUDA.")]
MaxPadding = Annotated[
    float,
    typer.Option(
        min=0,
        max=1,
        help="Most of a layer's granules that may stay unused: 1 on the host, 0.05 on CUDA.",
    ),
]
Dtype = Annotated[str | None, typer.Option(help="Cast weights to bfloat16, float16 or float32.")]


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
    """Keep layers of many models warm in one device's memory."""


class Engine(Enum):
    """Engines that the demo can serve with."""

    transformers = "transformers"
    vllm = "vllm"


@app.command()
def demo(
    json: Annotated[Path | None, typer.Option(help="Write the results here.")] = None,
    requests: Annotated[int, typer.Option(min=2, help="Number of requests.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the arrivals.")] = 0,
    engine: Annotated[
        Engine, typer.Option(help="Engine that serves the models.")
    ] = Engine.transformers,
    mutate: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Serve five real models in an arena that holds half of them; compare other ways to serve."""
    if engine is Engine.vllm:  # torch would log vLLM's starts; read when torch is imported
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        from warmserve_rt.demo.run import run

        status = run(json, requests=requests, seed=seed, engine=engine.value, mutate=mutate)
    except ModuleNotFoundError as error:
        extras = "demo,vllm" if engine is Engine.vllm else "demo"
        sys.exit(f"warmserve-rt demo needs {error.name}: pip install 'warmserve_rt[{extras}]'")
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"warmserve-rt demo: {_plain(error)}")
    raise typer.Exit(status)


@app.command()
def live(
    json: Annotated[Path | None, typer.Option(help="Write the results here.")] = None,
    requests: Annotated[int, typer.Option(min=2, help="Number of requests.")] = 40,
    seconds: Annotated[
        float, typer.Option(min=0.1, max=540, help="Seconds in which they arrive.")
    ] = 90.0,
    seed: Annotated[int, typer.Option(help="Seed of the arrivals.")] = 0,
    mutate: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Let the scheduler prewarm real models, and compare with the simulator's prediction."""
    try:
        from warmserve_rt.demo.live import run

        status = run(json, requests=requests, seconds=seconds, seed=seed, mutate=mutate)
    except ModuleNotFoundError as error:
        sys.exit(f"warmserve-rt live needs {error.name}: pip install 'warmserve_rt[demo,sim]'")
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"warmserve-rt live: {_plain(error)}")
    raise typer.Exit(status)


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="File or directory.")],
    granule: Granule = "2MiB",
    max_padding: MaxPadding = 1.0,
    dtype: Dtype = None,
) -> None:
    """Show the layers of a checkpoint, as a runtime would lay them out, and its files."""
    from warmserve_rt.checkpoint.sizes import dtypes_of

    from ._terminal import make_console, plain, print_table

    (sizes,), _ = _measure([checkpoint], granule, max_padding, dtype)
    layers = [
        [
            (layer.name, ""),
            (str(len(layer.tensors)), ""),
            (", ".join(dtypes_of(sizes, layer.index)), ""),
            (_mib(layer.nbytes), ""),
            (str(count), ""),
        ]
        for layer, count in zip(sizes.layout.layers, sizes.granules, strict=True)
    ]
    layout = sizes.layout
    every = sorted({name for each in layout.layers for name in dtypes_of(sizes, each.index)})
    total = ("all", str(len(layout.tensors)), ", ".join(every), _mib(layout.nbytes))
    layers.append([(each, "") for each in (*total, str(sizes.total))])
    console = make_console()
    headings = ("layer", "tensors", "dtypes", "MiB", "granules")
    print_table(console, headings, layers, title=plain(checkpoint), sum_row=True)
    files = [[(Path(name).name, ""), (_mib(nbytes), "")] for name, nbytes in sizes.files]
    print_table(console, ("file", "MiB"), files)


@app.command()
def size(
    checkpoints: Annotated[list[Path], typer.Argument(help="Files or directories.")],
    granule: Granule = "2MiB",
    max_padding: MaxPadding = 1.0,
    dtype: Dtype = None,
) -> None:
    """Show how large an arena must be to hold all layers of all these checkpoints."""
    from ._terminal import make_console, print_table

    found, nbytes = _measure(checkpoints, granule, max_padding, dtype)
    rows = [(each.path, each.layout.nbytes, each.total) for each in found]
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    print_table(
        make_console(),
        ("checkpoint", "bytes of layers", "granules", "arena bytes", "arena GiB"),
        [
            [
                (path, ""),
                (str(layers), ""),
                (str(count), ""),
                (str(count * nbytes), ""),
                (f"{count * nbytes / 2**30:.3f}", ""),
            ]
            for path, layers, count in rows
        ],
        sum_row=True,
    )


def _measure(
    paths: list[Path], granule: str, max_padding: float, dtype: str | None
) -> tuple[list[Sizes], int]:
    """Return the sizes of each checkpoint, and the bytes of a granule."""
    try:
        from ._terminal import plain
    except ModuleNotFoundError as error:
        sys.exit(f"warmserve-rt needs {error.name}: pip install {error.name}")
    from warmserve_rt.checkpoint.dtypes import target_dtype
    from warmserve_rt.checkpoint.sizes import measure

    try:
        nbytes = parse_bytes(granule, "granule")
        if nbytes < 1 or nbytes % (2 << 20):
            raise ValueError(f"granule must be a positive multiple of 2MiB, got {granule!r}")
        if dtype is not None:
            target_dtype(dtype)
    except ValueError as error:
        raise typer.BadParameter(plain(error)) from None
    try:
        found = [measure(path, nbytes, dtype, max_padding=max_padding) for path in paths]
        return found, nbytes
    except (WarmServeError, OSError, ValueError) as error:
        raise SystemExit(f"warmserve-rt: {plain(error)}") from None


def _plain(error: Exception) -> str:
    from ._terminal import plain

    return plain(error)


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f}"


def main() -> None:
    """Run the ``warmserve-rt`` command."""
    try:
        from ._terminal import replace_unencodable

        replace_unencodable()
    except ModuleNotFoundError:  # the command reports what it needs
        pass
    app()


if __name__ == "__main__":
    main()
