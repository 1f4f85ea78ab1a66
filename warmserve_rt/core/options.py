"""Check the options of a runtime and create the native runtime."""

from __future__ import annotations

import os
from collections.abc import Sequence

from warmserve_rt import _arguments as check
from warmserve_rt import _native
from warmserve_rt._log import log
from warmserve_rt._units import Size, format_bytes, parse_bytes

from .broker_connection import connect
from .devices import arena_bytes, checked_device, loader_count, usual_granules
from .routes import Route, open_devices
from .views import Framework, checked_framework

_MACHINE = "the machine's memory"


def open_runtime(
    device: str,
    *,
    arena: Size | None,
    staging: Size,
    host_cache: Size,
    headroom: Size | None,
    granule: Size | None,
    max_padding: float | None,
    chunk: Size,
    loaders: int | None,
    staging_timeout: float,
    pump: bool,
    poison: bool,
    fence: str,
    background_share: float,
    read_bandwidth: Size | None,
    tensors: Framework | None,
    driver: _native.Driver | None,
    routes: Sequence[Route],
    broker: str | os.PathLike[str] | None,
    broker_timeout: float,
    name: str | None,
) -> tuple[_native.Runtime, str, int, Framework, int, float]:
    """Return the native runtime, its device's name and CUDA ordinal (-1: not CUDA), its tensors'
    framework, its granule's bytes and the largest padding of a layer.

    Arguments and errors are those of :class:`Runtime`.
    """
    device = checked_device(device)
    connection = None
    if broker is not None:
        own = {
            "arena": arena,
            "headroom": headroom,
            "granule": granule,
            "host_cache": host_cache or None,
            "poison": poison or None,
            "routes": routes or None,
        }
        for option, value in own.items():
            if value is not None:
                raise ValueError(f"{option} must not be given with broker, which owns the arena")
        if device != "host":
            raise ValueError(f'device must be "host" with broker, got {device!r}')
        connection = connect(broker, name, broker_timeout)
    pump, poison = check.flag("pump", pump), check.flag("poison", poison)
    check.choice("fence", fence, ("streams", "device"))
    threads = loader_count(loaders, pump=pump)
    share = check.fraction("background_share", background_share)
    wait = min(check.seconds("staging_timeout", staging_timeout), 1e9)
    bandwidth = 0
    if read_bandwidth is not None and not (
        bandwidth := parse_bytes(read_bandwidth, "read_bandwidth")
    ):
        raise ValueError("read_bandwidth must be at least one byte a second, got 0")
    if max_padding is not None:
        max_padding = check.fraction("max_padding", max_padding)
    asked = None if granule is None else parse_bytes(granule, "granule")
    if connection is not None:
        asked = connection.granule_bytes
        arena = connection.granules * connection.granule_bytes
    chunk_bytes = parse_bytes(chunk, "chunk")
    staging_bytes = parse_bytes(staging, "staging", of=_machine_bytes, whole=_MACHINE)
    host_cache_bytes = parse_bytes(host_cache, "host_cache", of=_machine_bytes, whole=_MACHINE)
    if driver is not None and not isinstance(driver, _native.Driver):
        raise TypeError(f"driver must be a device's driver, got {check.shown(driver)}")
    driver, peers = open_devices(device, driver, routes, pump=pump)
    opened = driver
    usual = usual_granules(cuda=driver.cuda_ordinal >= 0)
    granule_bytes = usual.nbytes if asked is None else asked

    def of_device(name: str, size: Size | None) -> int | None:
        if size is None:
            return None
        return parse_bytes(
            size, name, of=lambda: opened.memory()[1], whole=f"{opened.name}'s memory"
        )

    if tensors is not None:
        check.choice("tensors", tensors, ("torch", "numpy", "cupy", "dlpack"))
    framework = checked_framework(tensors, cuda=driver.cuda_ordinal >= 0)
    spare = of_device("headroom", headroom)
    total = arena_bytes(
        driver, of_device("arena", arena), spare, max(granule_bytes, 1), poison=poison
    )
    native = _native.Runtime(
        driver,
        arena=total,
        staging=staging_bytes,
        host_cache=host_cache_bytes,
        granule=granule_bytes,
        chunk=chunk_bytes,
        headroom=spare or 0,
        loaders=threads,
        staging_timeout=wait,
        poison=poison,
        fence_device=fence == "device",
        background_share=share,
        read_bandwidth=bandwidth,
        peers=peers,
        broker=connection,
    )
    made = "made an arena" if connection is None else f"attached to the arena of {broker}"
    log.info("%s of %s on %s", made, format_bytes(total), driver.name)
    padding = usual.max_padding if max_padding is None else max_padding
    return native, driver.name, driver.cuda_ordinal, framework, granule_bytes, padding


def _machine_bytes() -> int:
    return _native.host_driver(threads=False).memory()[1]
