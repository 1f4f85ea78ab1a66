"""Write files into a folder, all or none."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path


def put(texts: Mapping[str, str], folder: Path) -> None:
    """Write files into a folder, which is created if it is missing.

    The files are first written to a temporary folder, and then moved.

    Parameters
    ----------
    texts
        The content of each file, by name.
    folder
        The folder.

    Raises
    ------
    OSError
        If a file cannot be written.

    Notes
    -----
    Guarantee: strong. After an exception the folder is unchanged.
    """
    folder = folder.absolute()
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".warmserve-rt-", dir=folder))
        try:
            _put(texts, aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        for each in made:
            if each.exists():
                each.rmdir()
        raise


def check_folder(folder: Path) -> None:
    """Raise OSError if ``put`` could not write to this folder."""
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{there} is not writable")


def _put(texts: Mapping[str, str], aside: Path, folder: Path) -> None:
    for name, content in texts.items():
        (aside / name).write_text(content, encoding="utf-8")
    before, placed = aside / "before", list[str]()
    before.mkdir()
    try:
        for name in texts:
            if (folder / name).exists():
                os.replace(folder / name, before / name)
            placed.append(name)
            os.replace(aside / name, folder / name)
    except BaseException:
        for name in placed:
            (folder / name).unlink(missing_ok=True)
        for old in before.iterdir():
            os.replace(old, folder / old.name)
        raise
