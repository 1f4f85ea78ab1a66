"""The benches' devices by name: ``host``, ``simcuda`` (needs no GPU) and ``cuda:N``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from warmserve_rt import _native, testing
from warmserve_rt.core.devices import open_driver
from warmserve_rt.testing.simcuda import SimulatedCuda


@contextmanager
def device(name: str, **simulated: Any) -> Iterator[tuple[_native.Driver, SimulatedCuda | None]]:
    """Yield a driver of the device and the simulator, if it is simulated.

    `simulated` are options of the simulator; other devices ignore them.
    """
    if name != "simcuda":
        yield open_driver(name, pump=False), None
        return
    with testing.simulated_cuda(**simulated) as cuda:
        yield testing.cuda_driver(cuda), cuda
