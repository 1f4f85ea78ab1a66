"""Parses the loader's options in `model_loader_extra_config`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from warmserve_rt._units import parse_bytes
from warmserve_rt.core.broker_connection import default_path

from .cache_folder import DEFAULT_LIMIT, bytes_of_limit

_DEVICE = re.compile(r"host|cuda(:\d{1,4})?", re.ASCII)
_SHARE = re.compile(r"\s*(100|\d{1,2}(\.\d+)?)\s*%\s*", re.ASCII)


@dataclass(frozen=True)
class Options:
    """Checked options of the load format.

    Attributes
    ----------
    device : "host", "cuda" or "cuda:N"
        The runtime's device. Default: the device on which vLLM computes.
    arena : int or str
        Bytes of the process's arena on the device, a size such as "4GiB" or a share of the device's
        memory such as "50%". The first engine makes the arena. Default: the size of that engine's
        model.
    broker : bool, str or os.PathLike
        Use the arena of a broker (:class:`warmserve_rt.Broker`), which engines in other processes
        share: the path of its socket, or True for this user's broker. Excludes ``arena``. Host
        only.
    gated : bool
        Start the engine before its weights are resident; each block of the first step waits for its
        own weights. Needs ``enforce_eager``.
    cache : str or os.PathLike
        The folder of processed weights. Default: a folder in the user's cache.
    cache_limit : int or str
        Limit of that folder: bytes, a size such as "200GiB" or a share of its file system.
    """

    device: str | None = None
    arena: int | str | None = None
    broker: bool | str | os.PathLike[str] = False
    gated: bool = False
    cache: str | os.PathLike[str] | None = None
    cache_limit: int | str = DEFAULT_LIMIT

    @classmethod
    def parse(cls, given: Mapping[str, Any] | None) -> Options:
        """Return checked options. None stands for a default. Raises ValueError, which says what is
        accepted, for an unknown option or an invalid value."""
        if given is not None and not isinstance(given, Mapping):
            raise _refused("the options", "a mapping by name", given)
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in given or {} if name not in known]:
            raise ValueError(
                "model_loader_extra_config of the load format 'warmserve' has no option "
                f"{', '.join(sorted(map(repr, unknown)))}; accepted: {', '.join(known)}"
            )
        options = cls(**{name: each for name, each in (given or {}).items() if each is not None})
        options._check()
        return options

    @property
    def socket(self) -> Path | None:
        """The absolute path of the broker's socket, or None without a broker."""
        if self.broker is False:
            return None
        chosen = default_path() if self.broker is True else Path(self.broker)
        return Path(os.path.abspath(chosen.expanduser()))

    def _check(self) -> None:
        device = "host" if self.device is None else self.device
        if not isinstance(device, str) or not _DEVICE.fullmatch(device):
            raise _refused("device", "'host', 'cuda' or 'cuda:N'", self.device)
        if not isinstance(self.gated, bool):
            raise _refused("gated", "true or false", self.gated)
        if not isinstance(self.cache, str | os.PathLike | None) or self.cache in ("", Path()):
            raise _refused("cache", "the path of a folder", self.cache)
        if self.arena is not None and not _is_size(self.arena):
            raise _refused("arena", "a number of bytes or a size such as '4GiB'", self.arena)
        if not isinstance(self.broker, bool | str | os.PathLike) or self.broker in ("", Path()):
            raise _refused("broker", "true or the path of a broker's socket", self.broker)
        if self.broker is not False:
            if self.arena is not None:
                raise _refused("arena", "left out with broker, which owns the arena", self.arena)
            if device != "host":
                raise _refused("device", "'host' with broker, which shares host memory", device)
        try:
            bytes_of_limit(self.cache_limit, Path("/"))
        except ValueError as error:
            raise ValueError(f"model_loader_extra_config: {error}") from None


def _is_size(value: Any) -> bool:
    if isinstance(value, str) and _SHARE.fullmatch(value):  # the runtime knows the device's size
        return True
    try:
        return parse_bytes(value) > 0
    except (TypeError, ValueError):
        return False


def _refused(name: str, accepted: str, value: Any) -> ValueError:
    return ValueError(f"model_loader_extra_config: {name} must be {accepted}, got {value!r}")
