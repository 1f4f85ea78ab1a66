"""Output of the commands: figures are never cut, and untrusted text is printed as plain text."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from . import _text

Cell = tuple[str, str]  # a value, and a dim second line ("" for none)
FOLDED = 12  # columns that a folded name keeps at least
_UNLIMITED = 10_000  # columns, for a pipe


def replace_unencodable() -> None:
    """Let stdout and stderr write backslash escapes for characters that they cannot encode."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def plain(text: object) -> str:
    """Return plain text as :func:`_text.plain` does; also escape what stdout cannot encode."""
    return "".join(c if _encodable(c) else _text.escaped(c) for c in _text.plain(text))


def _encodable(character: str) -> bool:
    try:
        character.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def make_console(*, stderr: bool = False) -> Console:
    """Make a console as wide as its terminal; a pipe has no limit unless COLUMNS is set."""
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(stderr=stderr, highlight=False, width=_UNLIMITED)
    return console


def print_table(
    console: Console,
    headings: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    title: str = "",
    sum_row: bool = False,
) -> None:
    """Print a table whose first column is text and whose other columns are figures, without markup.

    Columns that do not fit beside each other follow in further tables, each with the first column.
    The first column is folded if it would leave no room for any other. ``sum_row`` draws a rule
    above the last row.
    """
    if title:
        console.print(Text(title), soft_wrap=True)
    longest = max((cell_len(plain(row[0][0])) for row in rows), default=0)
    folded = max(
        longest - max(FOLDED, console.width // 2), 0
    )  # columns that folding the names frees
    start = 1
    while True:
        stop = len(headings)
        while stop > start + 1 and (
            _width(console, headings, rows, start, stop) - folded > console.width
        ):
            stop -= 1
        table = _table(headings, rows, start, stop, sum_row=sum_row)
        needed = _width(console, headings, rows, start, stop)
        if needed > console.width:
            table.width = max(console.width, needed - folded)
        console.print(table, crop=False)
        start = stop
        if start >= len(headings):
            return


def print_whole(console: Console, table: Table) -> None:
    """Print a table at its own width even if the terminal is narrower."""
    options = console.options.update(width=_UNLIMITED)
    needed = Measurement.get(console, options, table).maximum
    if needed > console.width:
        table.width = needed
    console.print(table, crop=False)


def _table(
    headings: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    start: int,
    stop: int,
    *,
    sum_row: bool = False,
) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(Text(headings[0]), overflow="fold")
    for heading in headings[start:stop]:
        table.add_column(Text(heading), justify="right", no_wrap=True)
    for number, (name, *cells) in enumerate(rows):
        if sum_row and number == len(rows) - 1:
            table.add_section()
        table.add_row(_cell(name), *(_cell(cell) for cell in cells[start - 1 : stop - 1]))
    return table


def _width(
    console: Console, headings: Sequence[str], rows: Sequence[Sequence[Cell]], start: int, stop: int
) -> int:
    # Measured without a limit, because the console's own width would cap the result.
    options = console.options.update(width=_UNLIMITED)
    return Measurement.get(console, options, _table(headings, rows, start, stop)).maximum


def _cell(cell: Cell) -> Text:
    value, more = cell
    return Text.assemble(plain(value), ("\n" + plain(more) if more else "", "dim"))
