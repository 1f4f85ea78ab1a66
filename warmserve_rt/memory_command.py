"""``warmserve-rt memory serve | status``: a broker, and the state of one.

This module needs neither torch nor numba.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._errors import WarmServeError
from ._text import plain
from ._units import format_bytes

if TYPE_CHECKING:
    from rich.console import Console

    from .core.broker_status import BrokerClient, BrokerStatus

app = typer.Typer(
    help="Serve one arena to all processes of this user, and show who uses it.",
    no_args_is_help=True,
)
Socket = Annotated[
    Path | None,
    typer.Argument(
        help="The broker's socket. ($XDG_RUNTIME_DIR/warmserve-rt/broker.sock, or else "
        "/tmp/warmserve-rt-UID/broker.sock)",
        show_default=False,
    ),
]


@app.command()
def serve(
    path: Socket = None,
    *,
    arena: Annotated[str, typer.Option(help="Memory for layers: '8GiB', or '50%' of all memory.")],
    granule: Annotated[str, typer.Option(help="Bytes of a granule: a multiple of 2MiB.")] = "2MiB",
    loaders: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Threads that load. (one less than CPUs, 8 at most)"),
    ] = None,
    patience: Annotated[
        float, typer.Option(min=0, help="Seconds that an eviction waits for a client's answer.")
    ] = 0.1,
) -> None:
    """Serve an arena of host memory until SIGTERM or Ctrl-C.

    The memory is held by a process of its own, the keeper. If the broker dies, the keeper starts it
    again. Clients continue, and layers in the arena are not loaded again.
    """
    from .core.broker import Broker
    from .core.broker_connection import default_path
    from .core.keeper import fork_broker
    from .core.runtime import Runtime

    where = path or default_path()
    logging.basicConfig(format="warmserve-rt memory: %(message)s")  # of the keeper, to stderr
    with _reported():
        _refuse_if_served(where)  # before memory is taken
        kept = fork_broker(*_granules(arena, granule))
        _end_at_sigterm()
        # The interpreter closes it at exit, unless clients still map layers.
        runtime = Runtime(
            "host",
            kept.nbytes,
            granule=kept.granule_bytes,
            loaders=loaders,
            tensors="numpy",
            driver=kept.driver(),
        )
        with Broker(runtime, where, patience=patience, kept=kept) as broker:
            shown = plain(broker.path)
            print(f"serving {format_bytes(runtime.snapshot().arena_bytes)} at {shown}")
            print(f'Runtime("host", broker="{shown}") leases from it.', flush=True)
            kept.wait()


@app.command()
def status(
    path: Socket = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, with sizes in bytes.")] = False,
) -> None:
    """Show the models of a broker, its clients and its free memory.

    A layer is held if an eviction wanted it and leases of the client still use it. A client is
    stuck if it did not answer in time.
    """
    from .core.broker_connection import default_path
    from .core.broker_status import broker_status

    with _reported():
        where = path or default_path()
        found = broker_status(where)
    if json:
        _print_json(found)
        return
    try:
        from ._terminal import make_console
    except ModuleNotFoundError as error:
        sys.exit(f"warmserve-rt memory status needs {error.name}: pip install {error.name}")
    _print_tables(make_console(), plain(where), found)


def _granules(arena: str, granule: str) -> tuple[int, int]:
    """Return the number and the bytes of an arena's granules. Raises ValueError."""
    from . import _native
    from ._units import parse_bytes

    host = _native.host_driver(threads=False)
    nbytes = parse_bytes(granule, "granule")
    if not nbytes or nbytes % host.granularity:
        raise ValueError(f"granule must be a multiple of 2MiB, got {granule}")
    total = parse_bytes(arena, "arena", of=lambda: host.memory()[1], whole="the host's memory")
    if total < nbytes:
        raise ValueError(f"arena must have at least one granule of {granule}, got {arena}")
    return total // nbytes, nbytes


def _refuse_if_served(path: Path) -> None:
    from .core.broker_status import broker_status

    try:
        broker_status(path)
    except WarmServeError:
        return
    raise WarmServeError(f"another broker listens at {path}")


def _end_at_sigterm() -> None:
    """Let SIGTERM end the process with status 0, after blocks have been left."""

    def end(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the end is not interrupted
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, end)


@contextmanager
def _reported() -> Iterator[None]:
    """End the process with a message after an error: with status 2 after a wrong argument."""
    try:
        yield
    except (WarmServeError, OSError) as error:
        raise SystemExit(f"warmserve-rt memory: {plain(error)}") from None
    except ValueError as error:
        raise typer.BadParameter(plain(error)) from None


def _print_json(found: BrokerStatus) -> None:
    import json
    from dataclasses import asdict

    print(json.dumps(asdict(found), indent=2))


def _print_tables(console: Console, where: str, found: BrokerStatus) -> None:
    from ._terminal import print_table

    free, total, granule = map(format_bytes, (found.nbytes_free, found.nbytes, found.granule_bytes))
    console.print(
        f"{where}: {free} of {total} are free, in granules of {granule}",
        soft_wrap=True,
        markup=False,
    )
    if found.models:
        rows = [
            (each.name, format_bytes(each.nbytes), format_bytes(each.nbytes_resident))
            for each in found.models
        ]
        print_table(console, ("model", "size", "resident"), _cells(rows))
    if found.clients:
        headings = ("client", "process", "maps", "layers", "held", "state")
        print_table(console, headings, _cells(map(_row, found.clients)))


def _cells(rows: Iterable[tuple[str, ...]]) -> list[list[tuple[str, str]]]:
    return [[(text, "") for text in row] for row in rows]


def _row(client: BrokerClient) -> tuple[str, ...]:
    mapped = client.mapped
    return (
        client.name,
        str(client.process),
        format_bytes(sum(each.nbytes for each in mapped)),
        str(sum(each.layers for each in mapped)),
        str(sum(each.layers_held for each in mapped)),
        "disconnected" if client.ended else "stuck" if client.stuck else "connected",
    )
