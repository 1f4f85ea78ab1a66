"""Show a runtime to a scheduler: the layers that it holds of each model, and those being loaded."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate

from warmserve_rt._errors import Busy, Cancelled, DeviceLost, OutOfDeviceMemory, WarmServeError
from warmserve_rt.core.loading import BACKGROUND
from warmserve_rt.core.model import Model
from warmserve_rt.core.runtime import Runtime
from warmserve_rt.core.snapshot import Snapshot
from warmserve_rt.core.ticket import Ticket
from warmserve_rt.policy.profile import ModelProfile

from .protocols import KeepValues

BACKOFF_S = 30.0  # wait after a failed load before the model is loaded again


class RuntimeShard:
    """Implement :class:`~.protocols.Shard`."""

    __slots__ = ("goal", "layers", "pinned")

    def __init__(self, layers: int, goal: int, *, pinned: bool) -> None:
        self.layers, self.goal, self.pinned = layers, goal, pinned


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
        The keep values that the layers were given last, or None.
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
    """Implement :class:`~.protocols.Device` for one runtime.

    Models are numbered as in the last :meth:`arrange`.
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
                shard = self._shard(entry, seen)
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

    def set_keep_values(self, model: int, rank: int, layers: int, values: KeepValues) -> None:
        """Give each leading layer the keep value of its part, and let the others be evicted first.

        Parameters
        ----------
        model, rank
            The number of the model. A device has one rank of each model, so that ``rank`` tells
            nothing more.
        layers
            The number of leading layers to keep.
        values
            The keep values of the model's parts.
        """
        entry = self._entries[model]
        if entry.model is None:
            return
        ends = [end + 0.5 for end, _ in values]
        keep = []
        for layer, end in enumerate(entry.ends):
            part = bisect_left(ends, end) if layer < layers else len(values)
            keep.append(values[part][1] if part < len(values) else 0.0)
        # If the model was unregistered meanwhile, the next refresh finds out.
        with suppress(ValueError):
            if keep != entry.keep:
                self.runtime.set_keep_values(entry.model, keep)
            entry.keep = keep

    def load(self, model: int, rank: int, layers: int, values: KeepValues) -> bool:
        """Begin a background load of leading layers, as :meth:`.protocols.Device.load` does.

        Also return False if the device is lost, if the model's last load failed less than
        ``BACKOFF_S`` ago, or if no such model is registered now.
        """
        _ = self.seen  # the models and shards as they are now
        entry = self._entries[model]
        registered = entry.model
        if registered is None or entry.rank is None or self.lost or self._clock() < entry.refused:
            return False
        self.set_keep_values(model, rank, layers, values)
        if entry.keep is None:
            return False
        try:
            ticket = self.runtime.prewarm(
                registered,
                layers=range(layers),
                priority=BACKGROUND,
                evict_below=entry.keep[layers - 1],
            )
        except (Busy, OutOfDeviceMemory):
            return False
        except Exception as error:
            if registered in self.runtime.models:  # else it was unregistered meanwhile
                self._refuse(entry, error)
            return False
        entry.tickets.append((ticket, layers))
        shard = self._shards.setdefault((model, rank), RuntimeShard(0, 0, pinned=False))
        shard.goal = max(shard.goal, layers)
        return True

    def cancel(self, model: int, rank: int, layers: int) -> None:
        """Cancel the loads of a shard that reach beyond these leading layers."""
        shard = self.shards[model, rank]
        entry, kept = self._entries[model], []
        for ticket, brings in entry.tickets:
            if brings > layers:
                ticket.cancel()
            else:
                kept.append((ticket, brings))
        entry.tickets = kept
        shard.goal = max([shard.layers, *(brings for _, brings in kept)])

    def cancel_all(self) -> None:
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
        """Cancel the entry's loads, and let its layers be evicted first."""
        for ticket, _ in entry.tickets:
            ticket.cancel()
        if entry.model and entry.keep:
            with suppress(ValueError, WarmServeError):  # unregistered, or the runtime is closed
                self.runtime.set_keep_value(entry.model, 0.0)
        entry.model, entry.tickets, entry.keep, entry.refused = None, [], None, -math.inf

    def _shard(self, entry: Entry, seen: Snapshot) -> RuntimeShard | None:
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
        return RuntimeShard(layers, goal, pinned=state.leases > 0) if goal else None

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
