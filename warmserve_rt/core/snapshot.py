"""The state of a runtime at one moment as plain values, the only input of a policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from warmserve_rt._units import format_bytes

if TYPE_CHECKING:
    from warmserve_rt import _native

_SHOWN = 20  # models that the repr of a snapshot shows


class LayerSnapshot(NamedTuple):
    """One layer: the bytes of its tensors (``nbytes``), the ``granules`` that it occupies unless it
    is absent, how many leases hold it, and whether it is in the host cache (``cached``)."""

    residency: str  # "absent", "filling", "resident" or "draining"
    nbytes: int
    granules: int
    leases: int
    keep_value: float
    cached: bool


@dataclass(frozen=True, slots=True, repr=False)
class ModelSnapshot:
    """One model: its layers in execution order, and how many leases hold any of them."""

    leases: int
    backing_epoch: int
    layers: tuple[LayerSnapshot, ...]

    def __repr__(self) -> str:
        return f"<ModelSnapshot: {self._words()}>"

    def _words(self) -> str:
        resident = [layer for layer in self.layers if layer.residency == "resident"]
        nbytes = sum(layer.nbytes for layer in self.layers)
        here = format_bytes(sum(layer.nbytes for layer in resident))
        leases = f", {self.leases} leases" if self.leases else ""
        return (
            f"{len(resident)} of {len(self.layers)} layers, {here} of {format_bytes(nbytes)}"
            f"{leases}"
        )

    @property
    def resident(self) -> bool:
        """Whether every layer is resident."""
        return all(layer.residency == "resident" for layer in self.layers)

    @property
    def granules(self) -> int:
        """Granules that the model's layers occupy now."""
        return sum(layer.granules for layer in self.layers if layer.residency != "absent")


@dataclass(frozen=True, slots=True)
class RouteSnapshot:
    """A peer's host link: the bytes that it has carried, and the bytes per second last measured,
    0.0 if not yet. ``error`` says why the link is no longer used; it is empty while it is."""

    name: str
    nbytes: int
    bandwidth: float
    error: str


@dataclass(frozen=True, slots=True)
class HostCacheSnapshot:
    """The host cache: its budget, the bytes pinned so far, the bytes in use and the layers there.

    ``hits`` and ``misses`` count the loads of a layer since the runtime was made, ``hit_bytes`` the
    bytes of the layers that were found, ``evictions`` the layers that left the cache to make room.
    ``error`` says why fewer bytes than the budget are pinned; it is empty if nothing failed.
    """

    budget_bytes: int
    pinned_bytes: int
    bytes_in_use: int
    layers: int
    hits: int
    misses: int
    hit_bytes: int
    evictions: int
    error: str


@dataclass(frozen=True, slots=True, repr=False)
class Snapshot:
    """One device.

    ``bytes_loaded``, ``layers_loaded``, ``layers_evicted`` and ``driver_calls`` count since the
    runtime was made. ``driver_calls`` maps a driver primitive to its number of calls and the
    nanoseconds spent in them. The runtime never takes the last ``headroom_bytes`` of the device's
    free memory.
    """

    granule_bytes: int
    granules: int
    granules_free: int
    granules_trimmed: int
    pinned_bytes: int
    headroom_bytes: int
    leases: int
    bytes_loaded: int
    layers_loaded: int
    layers_evicted: int
    driver_calls: Mapping[str, tuple[int, int]]
    host_cache: HostCacheSnapshot
    routes: tuple[RouteSnapshot, ...]
    models: Mapping[str, ModelSnapshot]

    @property
    def arena_bytes(self) -> int:
        """Bytes that the arena may use: its budget."""
        return self.granules * self.granule_bytes

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the granules that layers occupy."""
        return sum(model.granules for model in self.models.values()) * self.granule_bytes

    def __repr__(self) -> str:
        lines = [
            f"<Snapshot: {format_bytes(self.bytes_in_use)} of {format_bytes(self.arena_bytes)} in "
            f"use by {len(self.models)} models, {self.leases} leases, "
            f"{format_bytes(self.bytes_loaded)} loaded",
            *(
                f"  {name!r}: {model._words()}"
                for name, model in islice(self.models.items(), _SHOWN)
            ),
        ]
        if len(self.models) > _SHOWN:
            lines.append(f"  and {len(self.models) - _SHOWN} more")
        return "\n".join(lines) + ">"

    @classmethod
    def of(cls, native: _native.Runtime) -> Snapshot:
        """Read the runtime's books. Wait-free."""
        state = native.state()
        cache = state.host_cache
        return cls(
            granule_bytes=state.granule_bytes,
            granules=state.granules,
            granules_free=state.granules_free,
            granules_trimmed=state.granules_trimmed,
            pinned_bytes=state.pinned_bytes,
            headroom_bytes=state.headroom_bytes,
            leases=state.leases,
            bytes_loaded=state.bytes_loaded,
            layers_loaded=state.layers_loaded,
            layers_evicted=state.layers_evicted,
            driver_calls=native.driver_calls(),
            host_cache=HostCacheSnapshot(
                budget_bytes=cache.budget_bytes,
                pinned_bytes=cache.pinned_bytes,
                bytes_in_use=cache.bytes_in_use,
                layers=cache.layers,
                hits=cache.hits,
                misses=cache.misses,
                hit_bytes=cache.hit_bytes,
                evictions=cache.evictions,
                error=cache.error,
            ),
            routes=tuple(
                RouteSnapshot(x.name, x.nbytes, x.bandwidth, x.error) for x in state.routes
            ),
            models={
                model.name: ModelSnapshot(
                    model.leases,
                    model.backing_epoch,
                    model.layers(LayerSnapshot),
                )
                for model in state.models
            },
        )
