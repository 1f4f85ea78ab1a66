"""Show a runtime to a scheduler: the layers that it holds of each model, and those being loaded."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate

from warmserve_rt._errors import Busy, Cancelled, DeviceLost, OutOfDeviceMemory, WarmServeError
from warmserve_rt.core.model import Model
from warmserve_rt.core.runtime import BACKGROUND, Runtime, Ticket
from warmserve_rt.core.snapshot import Snapshot
from warmserve_rt.policy.profile import ModelProfile

Stamps = list[tuple[float, float]]
BACKOFF_S = 30.0  # wait after a failed load before the model is loaded again
# Relative decrement of a keep value per layer, so that the tail of a model is evicted first.
SLOPE = 2.0**-20


class RuntimeShard:
    """Implement ShardView for one model, given by its number."""

    __slots__ = ("goal", "layers", "model", "pinned")

    def __init__(self, model: int, layers: int, goal: int, *, pinned: bool) -> None:
        self.model, self.layers, self.goal, self.pinned = model, layers, goal, pinned


class Entry:
    """The state of one model of a fleet on one device.

    Attributes
    ----------
    profile, rank
        The model's profile, and the rank of its shard on this device. The rank is None on devices
        that hold no shard of the model.
    ends
        Cumulative bytes at the end of each layer.
    model
        The registered model that the profile's name stands for now, or None.
    tickets
        The tickets of loads in progress, each with the number of leading layers that it loads.
    keep
        The keep values with which the layers were stamped last, or None.
    refused
        Time until which the model is not loaded.
    missing
        The last reported reason why no model was found; empty if the model was found.
    """

    __slots__ = ("ends", "keep", "missing", "model", "profile", "rank", "refused", "tickets")

    def __init__(self, profile: ModelProfile, rank: int | None) -> None:
        self.profile, self.rank = profile, rank
        self.ends = list(accumulate(profile.layer_bytes))
        self.model: Model | None = None
        self.tickets: list[tuple[Ticket, int]] = []
        self.keep: list[float] | None = None
        self.refused, self.missing = -math.inf, ""


def find_model(runtime: Runtime, device: int, profile: ModelProfile) -> Model:
    """Return the model that the profile's name stands for now on this device.

    Parameters
    ----------
    runtime
        The runtime to look in.
    device
        The index of its device, for messages.
    profile
        The profile whose name is looked up.

    Raises
    ------
    ValueError
        If no such model is registered, or if its number of layers differs from the profile's.
    """
    model = runtime.model(profile.name)
    if len(model.layout) != len(profile.layer_bytes):
        raise ValueError(
            f"{profile.name} has {len(model.layout)} layers on device {device}, and "
            f"{len(profile.layer_bytes)} in its profile: give the fleet a new profile with "
            "remove() and add()"
        )
    return model


class RuntimeDevice:
    """Implement DeviceView for one runtime. Models are numbered as in the last :meth:`arrange`.

    The view shows the state at the last :meth:`refresh` and the loads begun or cancelled since
    then. A refresh also finds models that were promoted, registered or unregistered meanwhile.

    Parameters
    ----------
    index
        The index of the device in the fleet.
    runtime
        The runtime of the device.
    exclusive
        Whether a leased model has the device to itself.
    clock
        Returns the time in seconds.
    failed
        Called with each error of a load or a lookup.

    Notes
    -----
    Not thread-safe.
    """

    def __init__(
        self,
        index: int,
        runtime: Runtime,
        *,
        exclusive: bool,
        clock: Callable[[], float],
        failed: Callable[[Exception], None],
    ) -> None:
        self.index, self.runtime = index, runtime
        self.exclusive, self.lost = exclusive, False
        self._clock, self._failed = clock, failed
        self._entries: list[Entry] = []
        self._shards: dict[tuple[int, int], RuntimeShard] = {}
        self._seen: Snapshot | None = None

    def arrange(
        self, models: Sequence[tuple[ModelProfile, int | None]], rows: Sequence[int | None]
    ) -> None:
        """Replace the models of this device.

        The loads of models that are dropped are cancelled, and their layers are evicted first.

        Parameters
        ----------
        models
            The profile and the rank of each model. The rank is None if no shard of the model
            belongs on this device.
        rows
            For each model its number before this call, or None if the model is new.
        """
        before = self._entries
        self._entries = [
            Entry(*model) if row is None else before[row]
            for model, row in zip(models, rows, strict=True)
        ]
        for row in set(range(len(before))).difference(rows):
            self._let_go(before[row])
        self.refresh()

    def refresh(self) -> None:
        """Discard the view, so that the next access takes a new snapshot."""
        self._seen = None

    @property
    def seen(self) -> Snapshot:
        if self._seen is None:
            for entry in self._entries:
                self._follow(entry)
                self._reap(entry)
            seen = self.runtime.snapshot()
            self._shards = {}
            for number, entry in enumerate(self._entries):
                shard = self._shard(number, entry, seen)
                if shard and entry.rank is not None:
                    self._shards[number, entry.rank] = shard
            self._seen = seen
        return self._seen

    @property
    def shards(self) -> Mapping[tuple[int, int], RuntimeShard]:
        _ = self.seen
        return self._shards

    @property
    def active(self) -> bool:
        """Return whether a leased model has the device to itself."""
        return self.exclusive and self.seen.leases > 0

    @property
    def occupants(self) -> dict[tuple[int, int], bool]:
        if not self.active:
            return {}
        pinned = (key for key, shard in self.shards.items() if shard.pinned)
        return {(model, self.index - rank): True for model, rank in pinned}

    @property
    def room(self) -> float:
        """Return the arena's bytes minus those of leased layers outside the leading layers.

        All leased layers of models without a profile are subtracted. While a leased model has the
        device to itself, all leased layers are subtracted.
        """
        seen = self.seen
        leading = {
            registered.name: shard.goal
            for (model, _), shard in self.shards.items()
            if (registered := self._entries[model].model)
        }
        if self.active:
            leading.clear()
        held = sum(
            layer.granules
            for name, model in seen.models.items()
            for layer in model.layers[leading.get(name, 0) :]
            if layer.leases
        )
        return float(seen.arena_bytes - held * seen.granule_bytes)

    def stamp(self, model: int, layers: int, stamps: Stamps) -> None:
        """Stamp each leading layer with the keep value of its part, and the others so that they
        are evicted first.

        Parameters
        ----------
        model
            The number of the model.
        layers
            The number of leading layers to keep.
        stamps
            For each part of the model: the byte at which the part ends, and its keep value.
        """
        entry = self._entries[model]
        if entry.model is None:
            return
        ends = [end + 0.5 for end, _ in stamps]
        before, now = entry.keep, []
        for layer, end in enumerate(entry.ends):
            part = bisect_left(ends, end) if layer < layers else len(stamps)
            value = stamps[part][1] if part < len(stamps) else 0.0
            now.append(value * (1 - layer * SLOPE) if value > 0 else -layer * SLOPE**2)
        try:
            for layer, value in enumerate(now):
                if before is None or before[layer] != value:
                    self.runtime.native.set_keep_value(entry.model.native, value, layer)
        except ValueError:  # the model was unregistered meanwhile; the next refresh finds out
            return
        entry.keep = now

    def load(self, model: int, layers: int, stamps: Stamps) -> bool:
        """Begin a background load of leading layers, as :meth:`FleetView.load` does.

        Also return False if the device is lost, if the model's last load failed less than
        ``BACKOFF_S`` ago, or if no such model is registered now.
        """
        seen = self.seen
        entry = self._entries[model]
        registered, rank = entry.model, entry.rank
        if registered is None or rank is None or self.lost or self._clock() < entry.refused:
            return False
        self.stamp(model, layers, stamps)
        if entry.keep is None or not self._has_room(model, layers, entry.keep[layers - 1], seen):
            return False
        try:
            ticket = self.runtime.prewarm(registered, layers=range(layers), priority=BACKGROUND)
        except (Busy, OutOfDeviceMemory):
            return False
        except Exception as error:
            if registered in self.runtime.models:  # else it was unregistered meanwhile
                self._refuse(entry, error)
            return False
        entry.tickets.append((ticket, layers))
        shard = self._shards.setdefault((model, rank), RuntimeShard(model, 0, 0, pinned=False))
        shard.goal = max(shard.goal, layers)
        return True

    def call_off(self, shard: RuntimeShard, layers: int) -> None:
        """Cancel the loads that reach beyond these leading layers."""
        entry, kept = self._entries[shard.model], []
        for ticket, brings in entry.tickets:
            if brings > layers:
                ticket.cancel()
            else:
                kept.append((ticket, brings))
        entry.tickets = kept
        shard.goal = max([shard.layers, *(brings for _, brings in kept)])

    def call_all_off(self) -> None:
        """Cancel all loads that this object began."""
        for entry in self._entries:
            for ticket, _ in entry.tickets:
                ticket.cancel()
            entry.tickets = []

    def _follow(self, entry: Entry) -> None:
        """Find the model that the entry's name stands for now. Report a missing model once, until
        it has been found again."""
        if entry.rank is None:
            return
        try:
            found = find_model(self.runtime, self.index, entry.profile)
            entry.missing = ""
        except ValueError as error:
            found = None
            if entry.missing != str(error):
                entry.missing = str(error)
                self._failed(error)
        if found is not entry.model:
            self._let_go(entry)
            entry.model = found

    def _let_go(self, entry: Entry) -> None:
        """Cancel the entry's loads, and stamp its layers so that they are evicted first."""
        for ticket, _ in entry.tickets:
            ticket.cancel()
        if entry.model and entry.keep:
            with suppress(ValueError, WarmServeError):  # unregistered, or the runtime is closed
                for layer in range(len(entry.keep)):
                    self.runtime.native.set_keep_value(entry.model.native, -layer * SLOPE**2, layer)
        entry.model, entry.tickets, entry.keep, entry.refused = None, [], None, -math.inf

    def _shard(self, number: int, entry: Entry, seen: Snapshot) -> RuntimeShard | None:
        state = seen.models.get(entry.model.name) if entry.model else None
        if state is None:
            return None
        layers = goal = 0
        coming = max((brings for _, brings in entry.tickets), default=0)
        for layer in state.layers:
            here = layer.residency == "resident"
            if not (here or layer.residency == "filling" or layer.leases or goal < coming):
                break
            layers += here and layers == goal
            goal += 1
        return RuntimeShard(number, layers, goal, pinned=state.leases > 0) if goal else None

    def _has_room(self, model: int, layers: int, value: float, seen: Snapshot) -> bool:
        """Return whether the layers fit beside all layers that are leased, being loaded, or
        stamped with ``value`` or more."""
        numbers = {e.model.name: number for number, e in enumerate(self._entries) if e.model}
        left = seen.granules_free + seen.granules_trimmed
        for name, state in seen.models.items():
            number = numbers.get(name, -1)
            entry = self._entries[number] if number >= 0 else None
            shard = self._shards.get((number, entry.rank or 0)) if entry else None
            coming = layers if number == model else shard.goal if shard else 0
            for index, layer in enumerate(state.layers):
                if layer.residency == "absent":
                    if index < coming or layer.leases:
                        left -= layer.granules
                elif layer.residency == "resident" and not layer.leases:
                    ours = number == model and index < layers
                    # The layer may have been stamped after the snapshot.
                    worth = entry.keep[index] if entry and entry.keep else layer.keep_value
                    if not ours and worth < value:
                        left += layer.granules
        return left >= 0

    def _reap(self, entry: Entry) -> None:
        """Drop the tickets that are done, and report their errors."""
        running = []
        for ticket, layers in entry.tickets:
            if not ticket.done:
                running.append((ticket, layers))
                continue
            try:
                ticket.wait(0)
            except (Busy, Cancelled, OutOfDeviceMemory):
                pass  # a lease took the room, or the layers were evicted by another caller
            except Exception as error:
                self._refuse(entry, error)
        entry.tickets = running

    def _refuse(self, entry: Entry, error: Exception) -> None:
        self.lost = self.lost or isinstance(error, DeviceLost)
        entry.refused = self._clock() + BACKOFF_S
        self._failed(error)
