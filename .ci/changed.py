"""Chooses the checks of a CI run: everything that a change may have broken, and a part of the rest
that rotates by commit.

The change is the difference to the newest commit that is at least 12 hours older than HEAD, or to
`CI_BASE`. With `CI_ALL` set (`.ci/deep` sets it) everything counts as changed.

    python .ci/changed.py PATH [PATH ...]    exits with 0 if something below these paths changed
    python .ci/changed.py --turn COUNT       prints a number below COUNT that rotates by commit
    python .ci/changed.py --share NUMBER COUNT PATH [PATH ...]
                                             prints the changed of these paths, and one share of
                                             COUNT of the others, which rotates by commit
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parent.parent
WAVE_S = 12 * 3600  # commits closer together than this are one change
PARTS = 3  # a run checks one in three of the unchanged items

Item = TypeVar("Item")


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@cache
def changed_files() -> frozenset[str] | None:
    """Return the files that the change touches, or None if everything counts as changed."""
    if os.environ.get("CI_ALL"):
        return None
    base = os.environ.get("CI_BASE")
    if not base:
        before = int(git("show", "-s", "--format=%ct", "HEAD")) - WAVE_S
        base = git("rev-list", "-1", f"--before={before}", "HEAD")
    if not base:  # a clone without history
        return None
    return frozenset(git("diff", "--name-only", base).splitlines())


def any_changed(*paths: str) -> bool:
    """Return whether a file at or below one of these paths changed."""
    files = changed_files()
    return files is None or any(
        file == path or file.startswith(f"{path.rstrip('/')}/") for file in files for path in paths
    )


def turn(count: int) -> int:
    """Return a number below `count` that rotates by commit."""
    return int(git("rev-parse", "HEAD")[:8], 16) % count


def chosen(items: Sequence[Item], touched: Callable[[Item], bool], most: int) -> list[Item]:
    """Return the items that the change touches and one part of the others, in their order; at most
    `most` of them, which rotate by commit, unless everything counts as changed."""
    ours = turn(PARTS)
    found = [item for number, item in enumerate(items) if touched(item) or number % PARTS == ours]
    if changed_files() is None or len(found) <= most:
        return found
    first = turn(len(found))
    return (found[first:] + found[:first])[:most]


def share(number: int, count: int, paths: Sequence[str]) -> list[str]:
    """Return the changed paths and one of `count` shares of the others, in their order.

    In one commit each path is in the share of at least one `number` below `count`.
    """
    ours = (number + turn(count)) % count
    return [path for at, path in enumerate(paths) if at % count == ours or any_changed(path)]


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            sys.exit(__doc__)
        case ["--turn", count]:
            print(turn(int(count)))
        case ["--share", number, count, *paths]:
            print(*share(int(number), int(count), paths))
        case paths:
            sys.exit(not any_changed(*paths))
