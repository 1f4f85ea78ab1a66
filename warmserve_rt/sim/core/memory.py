"""Manage the memory of a fleet's devices: reserve room, load layers, evict layers."""

from __future__ import annotations

from collections.abc import Sequence

from warmserve_rt.policy.profile import ModelProfile

from .devices import KV_STEP, Device, Shard, layer_ends
from .eviction import choose_victims
from .links import Links


class Memory:
    """The memory of all devices. Shards grow and shrink by whole layers, and ``device.used`` counts
    their targets.

    Parameters
    ----------
    profiles
        The profiles of the models.
    devices
        The devices.
    links
        The links over which layers are loaded.

    Attributes
    ----------
    ends
        For each model the cumulative bytes of its layers on one device.
    wasted_bytes
        Bytes that background loads brought and no instance used.
    """

    def __init__(
        self, profiles: Sequence[ModelProfile], devices: Sequence[Device], links: Links
    ) -> None:
        self.profiles, self.devices, self.links = profiles, devices, links
        self.ends = [layer_ends(profile) for profile in profiles]
        self.wasted_bytes = 0.0

    def preload(self, device: Device, model: int, rank: int) -> None:
        """Make a whole shard resident without a load.

        Parameters
        ----------
        device
            The device.
        model, rank
            The model and the rank of the shard.

        Raises
        ------
        ValueError
            If it does not fit.
        """
        shard, end = device.shards.get((model, rank)), self.ends[model][-1]
        if device.used + end - (shard.target if shard else 0.0) > device.memory:
            raise ValueError(f"device {device.index} has no room for {self.profiles[model].name}")
        shard = shard or self._shard(device, model, rank)
        if shard.flow:
            self.links.stop(shard.flow)
        self._resize(device, shard, end)
        shard.resident = shard.target

    def prewarm(
        self, device: Device, model: int, rank: int, layers: int, *, priority: float = 0.0
    ) -> bool:
        """Begin to load leading layers of a shard into free memory.

        Parameters
        ----------
        device
            The device to load to.
        model, rank
            The model and the rank of the shard.
        layers
            The number of leading layers.
        priority
            The priority among the device's background loads; the highest runs first.

        Returns
        -------
        bool
            False if the free memory is too small; nothing is changed then.

        Raises
        ------
        ValueError
            If the model has fewer layers.
        """
        target = self._bound(model, layers)
        shard = device.shards.get((model, rank))
        more = target - (shard.target if shard else 0.0)
        if more <= 0:
            return True
        if device.used + more > device.memory:
            return False
        shard = shard or self._shard(device, model, rank)
        if shard.flow:
            self.links.stop(shard.flow)
        self._resize(device, shard, target)
        self.links.load(device, shard, priority=priority)
        return True

    def load(
        self,
        device: Device,
        model: int,
        rank: int,
        layers: int,
        keep_values: list[tuple[float, float]],
    ) -> bool:
        """Do as :meth:`prewarm`, and evict layers with lower keep values if room is short.

        Parameters
        ----------
        device, model, rank, layers
            See :meth:`prewarm`.
        keep_values
            The keep values of the layers; see Shard.

        Returns
        -------
        bool
            False if that makes too little room; no layer is evicted then.
        """
        target = self._bound(model, layers)
        shard = device.shards.get((model, rank))
        value = next((keep for end, keep in keep_values if end >= target), 0.0)
        more = target - (shard.target if shard else 0.0)
        if not self.make_room(device, more, spare=shard, below=value):
            return False
        if not self.prewarm(device, model, rank, layers, priority=value):
            return False
        shard = self._shard(device, model, rank)
        shard.keep_values, shard.planned = keep_values, target
        return True

    def set_keep_values(
        self, device: Device, shard: Shard, layers: int, keep_values: list[tuple[float, float]]
    ) -> None:
        """Give these leading layers their keep values, and let the others be evicted first."""
        shard.keep_values, shard.planned = keep_values, self._bound(shard.model, layers)

    def cancel(self, device: Device, shard: Shard, layers: int) -> None:
        """Cancel loads beyond these leading layers. Resident layers stay."""
        self.keep(device, shard, max(layers, shard.layers))

    def keep(self, device: Device, shard: Shard, layers: int) -> None:
        """Drop all but these leading layers, and cancel the loads of the others.

        Parameters
        ----------
        device, shard
            The shard, and its device.
        layers
            The number of leading layers that stay.

        Raises
        ------
        ValueError
            If layers would be dropped that an instance uses, or if the model has fewer layers.
        """
        bound = self._bound(shard.model, layers)
        if bound >= shard.target:
            return
        if shard.pinned:
            raise ValueError(
                f"cannot drop layers that an instance uses: {self.profiles[shard.model].name}"
            )
        flow = shard.flow
        if flow:
            self.links.stop(flow)
        lost = max(0.0, shard.resident - bound)
        unused = min(lost, shard.unused)  # the bytes that arrived last
        self.wasted_bytes += unused
        shard.unused -= unused
        shard.resident = min(shard.resident, bound)
        self._resize(device, shard, bound)
        if not layers:
            del device.shards[shard.model, shard.rank]
        elif flow and shard.resident < bound:
            self.links.load(device, shard, priority=flow.priority)

    def fits(self, device: Device, model: int) -> bool:
        """Return whether an instance of the model could start on the device beside the active ones
        and have some KV cache."""
        if any(each.model == model for each in device.instances):
            return False
        need = float(self.profiles[model].nbytes)
        if any(each.active for each in device.instances):
            need += KV_STEP
        return need <= device.room

    def pin(self, device: Device, model: int, rank: int, *, drop_others: bool) -> int:
        """Reserve the room of a whole shard for an instance. A load in progress continues.

        Parameters
        ----------
        device
            The device.
        model, rank
            The model and the rank of the shard.
        drop_others
            Whether to drop all layers that no instance uses from the device. Otherwise as many as
            needed are evicted, the least valuable first.

        Returns
        -------
        int
            The number of leading layers that were resident.
        """
        end = self.ends[model][-1]
        shard = self._shard(device, model, rank)
        flow = shard.flow
        if flow:
            self.links.stop(flow)
        shard.pinned, shard.unused = True, 0.0
        hits = shard.layers
        if drop_others:
            for other in [s for s in device.shards.values() if not s.pinned]:
                self.keep(device, other, 0)
        self.make_room(device, end - shard.target)
        self._resize(device, shard, end)
        if flow:
            self.links.load(device, shard, priority=flow.priority)
        return hits

    def unpin(self, device: Device, model: int, rank: int, *, drop: bool) -> None:
        """Make the shard of an instance evictable, or drop it if ``drop`` is set."""
        shard = device.shards[model, rank]
        shard.pinned = False
        if drop:
            self.keep(device, shard, 0)

    def close(self) -> None:
        """Credit the loads in progress, and count the bytes that no instance has used as wasted."""
        for device in self.devices:
            for shard in device.shards.values():
                if shard.flow:
                    self.links.accrue(shard.flow)
                self.wasted_bytes += shard.unused

    def _bound(self, model: int, layers: int) -> float:
        """Return the byte at which these leading layers end."""
        ends = self.ends[model]
        if not 0 <= layers <= len(ends):
            raise ValueError(
                f"layers of {self.profiles[model].name} must be in [0, {len(ends)}], got {layers}"
            )
        return float(ends[layers - 1]) if layers else 0.0

    def _shard(self, device: Device, model: int, rank: int) -> Shard:
        shard = device.shards.get((model, rank))
        if shard is None:
            shard = device.shards[model, rank] = Shard(model, rank, self.ends[model])
        return shard

    def _resize(self, device: Device, shard: Shard, target: float) -> None:
        device.used += target - shard.target
        shard.target = target

    def make_room(
        self,
        device: Device,
        more: float,
        *,
        spare: Shard | None = None,
        below: float = float("inf"),
    ) -> bool:
        """Evict tail layers, those with the lowest keep values first, until a device has room.

        Parameters
        ----------
        device
            The device.
        more
            Bytes that must be free.
        spare
            A shard of which no layer is evicted.
        below
            Only layers with keep values less than this are evicted.

        Returns
        -------
        bool
            False if that is not enough; no layer is evicted then.
        """
        victims = choose_victims(
            device, device.used + more - device.memory, spare=spare, below=below
        )
        if victims is None:
            return False
        for shard, layers in victims.items():
            self.keep(device, shard, layers)
            shard.planned = min(shard.planned, shard.target)
        return True
