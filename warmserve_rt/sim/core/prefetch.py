"""Load layers from a node's disk to its host memory, in the background."""

from __future__ import annotations

from collections.abc import Sequence

from .clock import Clock, Event
from .host import HostMemory

Part = tuple[int, int, int]  # model, rank and layer


class Prefetch(Event):
    """The background loads from disk to the host memory of one node.

    One layer is read at a time, in the order of the wanted layers. Reads for devices go first: a
    prefetch gets the part of the disk's bandwidth that they leave. It uses no link of a device.

    Parameters
    ----------
    clock
        The clock of the simulation.
    host
        The host memory.
    disk_bandwidth
        Bytes per second from the disk.

    Attributes
    ----------
    loaded_bytes
        Bytes read so far.
    rate
        Bytes per second now.
    """

    def __init__(self, clock: Clock, host: HostMemory, disk_bandwidth: float) -> None:
        super().__init__()
        self.clock, self.host, self.disk_bandwidth = clock, host, disk_bandwidth
        self.loaded_bytes = self.rate = 0.0
        self._spare = disk_bandwidth  # bytes per second that the reads for devices leave
        self._wanted: list[Part] = []
        self._reading: Part | None = None  # the first wanted layer
        self._left = 0.0  # bytes of it that are to be read
        self._since = clock.now

    def want(self, parts: Sequence[Part]) -> None:
        """Read these layers, and none that were wanted before. A layer that is being read goes on
        if it is still wanted."""
        self.accrue()
        self._wanted = list(parts)
        if self._reading in self._wanted:
            self._wanted.remove(self._reading)
            self._wanted.insert(0, self._reading)
        self._begin()
        self._run()

    def yield_to(self, used: float) -> None:
        """Leave this many bytes per second of the disk to the reads for devices."""
        spare = max(self.disk_bandwidth - used, 0.0)
        if spare != self._spare:
            self.accrue()
            self._spare = spare
            self._begin()
            self._run()

    def fire(self) -> None:
        """Keep a layer whose last byte was read, and begin the next one."""
        self.accrue()
        self.loaded_bytes += self._left  # bytes that rounding left out
        self.host.add(*self._wanted.pop(0))
        self._reading = None
        self._begin()
        self._run()

    def _begin(self) -> None:
        """Find the first wanted layer that no read for a device has brought. Begin it, unless it is
        being read."""
        while self._wanted and self.host.holds(*self._wanted[0]):
            del self._wanted[0]
        first = self._wanted[0] if self._wanted else None
        if first != self._reading:
            self._reading, self._left = first, float(self._bytes(first)) if first else 0.0

    def _run(self) -> None:
        self.rate = self._spare if self._wanted else 0.0
        if self.rate > 0:
            self.clock.schedule(self, self.clock.now + self._left / self.rate)
        else:
            self.clock.cancel(self)

    def accrue(self) -> None:
        """Count the bytes that were read until now."""
        read = min(self.rate * (self.clock.now - self._since), self._left)
        self.loaded_bytes += read
        self._left -= read
        self._since = self.clock.now

    def _bytes(self, part: Part) -> int:
        model, _, layer = part
        return self.host.profiles[model].layer_bytes[layer]
