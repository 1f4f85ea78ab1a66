"""Write files into a folder, all or none."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path


def write_files(texts: Mapping[str, str], folder: Path) -> None:
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
    created = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".warmserve-rt-", dir=folder))
        try:
            _move_in(texts, staging, folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except BaseException:
        for each in created:
            if each.exists():
                each.rmdir()
        raise


def check_folder(folder: Path) -> None:
    """Raise OSError if ``write_files`` could not write to this folder."""
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{existing} is not writable")


def _move_in(texts: Mapping[str, str], staging: Path, folder: Path) -> None:
    for name, content in texts.items():
        (staging / name).write_text(content, encoding="utf-8")
    before, placed = staging / "before", list[str]()
    before.mkdir()
    try:
        for name in texts:
            if (folder / name).exists():
                os.replace(folder / name, before / name)
            placed.append(name)
            os.replace(staging / name, folder / name)
    except BaseException:
        for name in placed:
            (folder / name).unlink(missing_ok=True)
        for old in before.iterdir():
            os.replace(old, folder / old.name)
        raise
