"""A fleet as a scheduler sees it and acts on it.

``scheduled_runtimes.py``, ``device.py`` and ``model_on_device.py`` implement these protocols for
runtimes. The simulator implements them for simulated devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeAlias

from warmserve_rt.policy._arrays import F64
from warmserve_rt.policy.profile import ModelProfile

# For each part of a model, in the order of its layers: the byte at which the part ends, and the
# keep value of its layers.
KeepValues: TypeAlias = list[tuple[float, float]]


class Shard(Protocol):
    """The layers of one rank of a model that a device holds.

    ``layers``: the number of leading layers that are resident. ``goal``: the same, including layers
    that are being loaded. ``pinned``: whether the shard is in use.
    """

    @property
    def layers(self) -> int: ...
    @property
    def goal(self) -> int: ...
    @property
    def pinned(self) -> bool: ...


class Device(Protocol):
    """One device.

    ``shards``: the shard of each (model, rank). ``occupants``: for each instance on the device, its
    model and the index of its first device, mapped to whether it is active, which means that it
    works or loads. ``room``: bytes that layers may take, without the memory of active instances.
    """

    @property
    def index(self) -> int: ...
    @property
    def shards(self) -> Mapping[tuple[int, int], Shard]: ...
    @property
    def occupants(self) -> Mapping[tuple[int, int], bool]: ...
    @property
    def room(self) -> float: ...

    def set_keep_values(self, model: int, rank: int, layers: int, values: KeepValues) -> None:
        """Give these leading layers of a shard their keep values, and let the others be evicted
        first."""

    def load(self, model: int, rank: int, layers: int, values: KeepValues) -> bool:
        """Begin to load the missing ones of these leading layers in the background.

        The load evicts layers with lower keep values. Return False if that makes too little room;
        the load has not begun then.
        """

    def cancel(self, model: int, rank: int, layers: int) -> None:
        """Cancel the loads of a shard that reach beyond these leading layers."""


class HostTier(Protocol):
    """Host memory that keeps layers, from which some devices load faster than from files.

    A plan has two tiers. It first chooses the layers that devices hold, and then those that each
    host tier holds for the starts that the devices' layers leave to be loaded.

    ``devices``: the indices of the devices that load from it. ``nbytes``: the largest number of
    bytes that it may hold. ``file_bandwidth``: bytes per second that these devices together load of
    layers that are not in it.
    """

    @property
    def devices(self) -> Sequence[int]: ...
    @property
    def nbytes(self) -> float: ...
    @property
    def file_bandwidth(self) -> float: ...

    def holds(self, model: int) -> Sequence[bool]:
        """Return for each layer of a model whether it is in the tier, with all its ranks that
        these devices load."""

    def hold(self, plan: Mapping[int, F64]) -> None:
        """Hold these layers, as far as the tier has room.

        Missing layers are loaded in the background, those of the highest value first. All other
        layers leave the tier first when others need room, and then those of the lowest value. Loads
        of layers that are not in the plan are cancelled. Errors are reported as those of
        :meth:`Device.load`.

        Parameters
        ----------
        plan
            By model, the value of each of its layers; 0 for a layer that is not to be held. Nothing
            is to be held of models that are not in it.
        """


class Fleet(Protocol):
    """All devices, and the models that they can hold.

    Layers of rank r of a model that is w devices wide are useful on devices whose index is r
    modulo w. A group of w devices lies within one node of ``node_devices``. ``bandwidth``: bytes
    per second to one device, of layers in its host tier if it has one. ``hosts``: the host tiers
    that are planned; a device belongs to at most one. ``switch_s``: seconds from a request to its
    lease if all layers are resident.
    """

    @property
    def profiles(self) -> Sequence[ModelProfile]: ...
    @property
    def bandwidth(self) -> float: ...
    @property
    def switch_s(self) -> float: ...
    @property
    def node_devices(self) -> int: ...
    @property
    def now(self) -> float: ...
    @property
    def devices(self) -> Sequence[Device]: ...
    @property
    def hosts(self) -> Sequence[HostTier]: ...

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Make a call in this many seconds, in the thread of the scheduler."""
