"""Drivers for tests of this library and of engines that use it: checked, and with injected faults::

    watched = testing.watch(pump=True)
    with Runtime(arena="64MiB", pump=True, driver=watched.driver) as runtime:
        watched.faults.arm([(3, 3)])          # the third driver call fails
        ...
    watched.check()                           # no contract was broken, no object was leaked

On a simulated CUDA device, without a GPU (see :mod:`warmserve_rt.testing.simcuda`)::

    with testing.simulated_cuda(clock="virtual") as cuda:
        watched = testing.watch(cuda=cuda)
        with Runtime(arena="64MiB", pump=True, driver=watched.driver) as runtime:
            ...
        watched.check()
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from warmserve_rt import _native
from warmserve_rt.core.devices import open_driver
from warmserve_rt.core.model import Model
from warmserve_rt.core.runtime import Runtime

from ._simcuda_library import Faults
from .simcuda import SimulatedCuda, simulated_cuda, simulated_cuda_fixture

__all__ = [
    "SimulatedCuda",
    "Watched",
    "cuda_driver",
    "simulated_cuda",
    "simulated_cuda_fixture",
    "swap_granules",
    "watch",
]

_libc = ctypes.CDLL(None, use_errno=True)
_PROT_READ, _PROT_WRITE = 1, 2


@dataclass(frozen=True)
class Watched:
    """A device whose calls are checked (`strict`) and can be made to fail (`faults`).

    `cuda` is the simulated CUDA driver below it, if it has one.
    """

    driver: _native.Driver
    strict: _native.StrictDriver
    faults: _native.FaultyDriver
    cuda: SimulatedCuda | None = None

    @property
    def finest_faults(self) -> _native.FaultyDriver | Faults:
        """The fault injector of the lowest level: cu* functions if simulated, else primitives."""
        return self.cuda.faults if self.cuda else self.faults

    def check(self, *, closed: bool = True) -> None:
        """Raise AssertionError if a driver contract was broken.

        With ``closed``, also raise it if an object made on the device was not released.
        """
        assert not self.strict.violations, self.strict.violations
        left = {kind: count for kind, count in self.strict.live.items() if count}
        assert not (closed and left), f"never given back: {left}"
        if self.cuda:
            assert not self.cuda.violations, self.cuda.violations
            ours = ("contexts", "modules")  # the driver's own objects, which still exist
            live = self.cuda.live.items()
            kept = {kind: count for kind, count in live if count and kind not in ours}
            assert not (closed and kept), f"never given back to the driver: {kept}"


def cuda_driver(
    cuda: SimulatedCuda, ordinal: int = 0, *, peers: Sequence[int] = ()
) -> _native.Driver:
    """Return a device of the simulated driver, to pass to ``Runtime(driver=...)``.

    Parameters
    ----------
    cuda : SimulatedCuda
        The simulated driver.
    ordinal : int
        The number of the device.
    peers : sequence of int
        The numbers of devices that may be among that runtime's ``routes``.
    """
    return _native.cuda_driver(
        library=str(cuda.library), ordinal=ordinal, kernels=b"simulated", peers=peers
    )


def watch(
    device: str = "host",
    *,
    pump: bool = False,
    host_view: bool = True,
    cuda: SimulatedCuda | None = None,
) -> Watched:
    """Return a device whose driver contracts are checked.

    Parameters
    ----------
    device : "host" or "cuda:N"
        The device, unless ``cuda`` is given.
    pump : bool
        Make a driver without threads, for a runtime with ``pump=True``.
    host_view : bool
        False hides that the CPU can access the host's granules, so that loads use staging as on a
        discrete GPU.
    cuda : SimulatedCuda, optional
        Use device 0 of this simulated driver.
    """
    if cuda:
        below = cuda_driver(cuda)
    elif device == "host":
        below = _native.host_driver(threads=not pump, host_view=host_view)
    else:
        below = open_driver(device, pump=pump)
    strict = _native.StrictDriver(below)
    faults = _native.FaultyDriver(strict)
    return Watched(faults, strict, faults, cuda)


def swap_granules(
    runtime: Runtime, a: Model, layer_a: int, b: Model, layer_b: int, *, granule: int = 0
) -> None:
    """Exchange the bytes of one granule between two resident layers, unknown to the runtime.

    A check of contents must notice it.

    Parameters
    ----------
    runtime : Runtime
        The runtime, on the host.
    a, layer_a, b, layer_b
        The two models and the indices of their layers.
    granule : int
        The index of the granule in its layer. Both layers must have it.
    """
    size = runtime.snapshot().granule_bytes
    begins = []
    for model, layer in ((a, layer_a), (b, layer_b)):
        begins.append(model.layer_bytes(layer).address + granule * size)
    buffers = [(ctypes.c_char * size).from_address(begin) for begin in begins]
    for begin in begins:
        if _libc.mprotect(ctypes.c_void_p(begin), size, _PROT_READ | _PROT_WRITE):
            raise OSError(ctypes.get_errno(), "mprotect")
    buffers[0].raw, buffers[1].raw = buffers[1].raw, buffers[0].raw
    for begin in begins:
        _libc.mprotect(ctypes.c_void_p(begin), size, _PROT_READ)
