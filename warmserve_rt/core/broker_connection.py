"""Paths of brokers, and connections to them."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from pathlib import Path

from warmserve_rt import _arguments as check
from warmserve_rt import _native
from warmserve_rt._errors import WarmServeError

ANSWER_WITHIN_S = 10.0


def connect(
    path: str | os.PathLike[str], name: str | None = None, patience: float = 0.0
) -> _native.BrokerConnection:
    """Connect to the broker that listens at a path.

    Parameters
    ----------
    path : path
        Of the broker's socket.
    name : str, optional
        What the broker calls this process in its messages. Default: the program's name.
    patience : float
        Seconds that loads wait for another broker at the path if this one ends.

    Raises
    ------
    WarmServeError
        No broker listens there, or it refuses this process, or another user could have put the
        socket there.
    TimeoutError
        The broker does not answer within ten seconds.
    """
    if name is None:
        name = Path(sys.argv[0] or "python").name
    path = check.path("broker", path)
    _refuse_folder_of_others(Path(path).absolute().parent)
    return _native.BrokerConnection(
        path,
        version=version("warmserve_rt"),
        name=check.text("name", name),
        timeout=ANSWER_WITHIN_S,
        patience=min(check.seconds("broker_timeout", patience), 1e6),
    )


def _refuse_folder_of_others(folder: Path) -> None:
    """Refuse a folder in which another user could have made a socket; root trusts their owners."""
    try:
        found = folder.stat()
    except OSError:  # the connection fails too, and says why
        return
    user = os.geteuid()
    if found.st_mode & 0o077 or found.st_uid != user != 0:
        raise WarmServeError(
            f"a broker's folder must belong to this user, with mode 0700, and {folder} does not: "
            "another user could have made the socket"
        )


def default_path() -> Path:
    """Return the path of this user's broker: in ``XDG_RUNTIME_DIR``, or else in ``/tmp``."""
    folder = os.environ.get("XDG_RUNTIME_DIR")
    if folder:
        return Path(folder, "warmserve-rt", "broker.sock")
    return Path(f"/tmp/warmserve-rt-{os.getuid()}", "broker.sock")


def prepared(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a socket to listen at, after making its folder if it is missing.

    The folder is made for this user only. An existing folder is not changed. Raises WarmServeError
    for a file or a folder at the path: a broker replaces its predecessor's socket only.
    """
    found = Path(check.path("path", path)).absolute()
    if os.path.lexists(found) and not found.is_socket():
        raise WarmServeError(f"a broker's socket cannot be made at {found}: it exists already")
    found.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return found
