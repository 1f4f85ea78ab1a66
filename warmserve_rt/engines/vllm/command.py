"""``warmserve-rt cache list | prune``: show and clear the cache of processed weights.

This module needs neither vLLM nor torch.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from warmserve_rt._units import parse_bytes

from .cache_folder import DEFAULT_LIMIT, bytes_of_limit, root_of
from .entries import Stored, in_use, prune, stored

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    help="Show and clear the cache of weights that vLLM has processed.", no_args_is_help=True
)
Folder = Annotated[
    Path | None,
    typer.Option("--cache", help='The folder, as in the option "cache" of vLLM\'s load format.'),
]
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_DURATION = re.compile(r"(\d{1,9}(?:\.\d+)?)\s*([smhdw])", re.ASCII)
_PLAIN = str.maketrans(dict.fromkeys((*range(32), *range(127, 160)), "?"))


@app.command("list")
def show(cache: Folder = None) -> None:
    """List the entries, the least recently used first."""
    from rich.table import Table
    from rich.text import Text

    try:
        root = root_of(cache)
        found = stored(root)
        rows = [(each, in_use(each)) for each in found]
    except OSError as error:
        raise _failed(error) from None
    console = _console()
    if not rows:
        console.print(f"{_plain(root)} has no entries", soft_wrap=True)
        return
    table = Table(title=Text(_plain(root)))
    for name in ("entry", "model", "dtype"):
        table.add_column(name, overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("last used", no_wrap=True)
    for entry, busy in rows:
        used = "now" if busy else f"{_age(time.time() - entry.used)} ago"
        cells = (entry.folder.name, entry.model or "(incomplete)", entry.dtype)
        texts = (*map(_plain, cells), size_text(entry.nbytes), used)
        table.add_row(*map(Text, texts))
    table.add_section()
    total = size_text(sum(each.nbytes for each, _ in rows))
    table.add_row("all", "", "", total, "")
    console.print(table)


@app.command("prune")
def clear(
    keep: Annotated[
        str | None,
        typer.Option(
            help=f"Remove until the rest takes at most this, such as '20GiB'. ({DEFAULT_LIMIT})"
        ),
    ] = None,
    older_than: Annotated[
        str | None,
        typer.Option(help="Remove entries last used longer ago than this: '12h', '30d', '2w'."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove all entries.")] = False,
    cache: Folder = None,
) -> None:
    """Remove entries that no engine uses, the least recently used first."""
    if sum((keep is not None, older_than is not None, everything)) > 1:
        raise typer.BadParameter("give at most one of --keep, --older-than and --all")
    age = None if older_than is None else _seconds(older_than)
    try:
        root = root_of(cache)
        limit = None if everything or age is not None else _limit(keep, root)
        done = prune(root, keep=limit, used_before=None if age is None else time.time() - age)
    except OSError as error:
        raise _failed(error) from None
    report(done.removed, "removed")
    if done.busy:
        report(done.busy, "kept, because they are in use,")
    if done.errors:
        raise _failed(*done.errors)


def report(entries: list[Stored], verb: str) -> None:
    """Print the verb, the number of entries and their size."""
    count = "1 entry" if len(entries) == 1 else f"{len(entries)} entries"
    total = size_text(sum(each.nbytes for each in entries))
    _console().print(f"{verb} {count}: {total}", soft_wrap=True)


def size_text(nbytes: int) -> str:
    """Return bytes in the largest binary unit that does not exceed them."""
    for unit, factor in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= factor:
            return f"{nbytes / factor:.1f} {unit}"
    return f"{nbytes} B"


def _limit(keep: str | None, root: Path) -> int:
    if keep is None:
        return bytes_of_limit(DEFAULT_LIMIT, root)
    try:
        if keep.strip().isdecimal():  # a plain number of bytes; the shell passes it as text
            return parse_bytes(int(keep))
        return bytes_of_limit(keep, root, "--keep")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _seconds(duration: str) -> float:
    match = _DURATION.fullmatch(duration.strip())
    if match is None:
        raise typer.BadParameter(
            f"--older-than must be a time such as '12h', '30d' or '2w', got {duration!r}"
        )
    return float(match[1]) * _SECONDS[match[2]]


def _age(seconds: float) -> str:
    for unit in ("w", "d", "h", "m"):
        if seconds >= 2 * _SECONDS[unit]:
            return f"{seconds / _SECONDS[unit]:.0f}{unit}"
    return f"{max(0.0, seconds):.0f}s"


def _plain(text: object) -> str:
    """Return a text that the terminal can print, without control characters."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    shown = str(text).encode(encoding, "replace").decode(encoding)
    return "".join(each if each.isprintable() else "?" for each in shown)


def _failed(*errors: OSError) -> SystemExit:
    return SystemExit("\n".join(f"warmserve-rt cache: {_plain(error)}" for error in errors))


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)
