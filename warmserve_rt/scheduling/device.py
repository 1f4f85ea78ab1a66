"""Show a runtime to a scheduler as one device, and carry out the loads of the scheduler on it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from warmserve_rt._errors import Busy, DeviceLost, OutOfDeviceMemory
from warmserve_rt.core.loading import BACKGROUND
from warmserve_rt.core.runtime import Runtime
from warmserve_rt.core.snapshot import Snapshot
from warmserve_rt.policy.profile import ModelProfile

from .model_on_device import ModelOnDevice, RuntimeShard
from .protocols import KeepValues

BACKOFF_S = 30.0  # wait after a failed load before the model is loaded again


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
        self.models: list[ModelOnDevice] = []
        self._highest = 0.0  # the highest keep value of a layer on the device at the last plan
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
        before = self.models
        self.models = [
            ModelOnDevice(*model) if row is None else before[row]
            for model, row in zip(models, rows, strict=True)
        ]
        for row in set(range(len(before))).difference(rows):
            before[row].let_go(self.runtime)
        self.refresh()

    def refresh(self) -> None:
        """Discard the view, so that the next access takes a new snapshot."""
        self._seen = None

    @property
    def seen(self) -> Snapshot:
        if self._seen is None:
            for on_device in self.models:
                on_device.follow(self.runtime, self.index, self._failed)
                errors, host_errors = on_device.drop_done()
                for error in errors:
                    self._refuse(on_device, error)
                for error in host_errors:
                    self.refuse_host(on_device, error)
            seen = self.runtime.snapshot()
            self._shards = {}
            for number, on_device in enumerate(self.models):
                shard = on_device.shard(seen)
                if shard and on_device.rank is not None:
                    self._shards[number, on_device.rank] = shard
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
            if (registered := self.models[model].registered)
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
            The number of the model. ``rank`` is not used, because a device has only one rank of
            each model.
        layers
            The number of leading layers to keep.
        values
            The keep values of the model's parts.
        """
        on_device = self.models[model]
        if on_device.registered is None:
            return
        ends = [end + 0.5 for end, _ in values]
        on_device.planned, on_device.device_values = layers, []
        for layer, end in enumerate(on_device.ends):
            part = bisect_left(ends, end) if layer < layers else len(values)
            on_device.device_values.append(values[part][1] if part < len(values) else 0.0)
        self._highest = max(self._highest, *on_device.device_values)
        self._set_values(on_device)

    def set_host_values(self, plan: Mapping[int, Sequence[float]]) -> None:
        """Give the layers that are on this device only in the host cache their values there.

        Parameters
        ----------
        plan
            As for :meth:`.protocols.HostTier.hold`.
        """
        self._highest = max((max(each.device_values) for each in self.models), default=0.0)
        for number, on_device in enumerate(self.models):
            on_device.host_values = list(plan.get(number, ()))
            if on_device.registered and (on_device.keep or on_device.host_values):
                self._set_values(on_device)  # others were never planned, and keep their values

    def _set_values(self, on_device: ModelOnDevice) -> None:
        """Set the keep values of a registered model if they have changed."""
        assert on_device.registered
        keep = on_device.values(self.seen, self._highest)
        # If the model was unregistered meanwhile, the next refresh finds out.
        with suppress(ValueError):
            if keep != on_device.keep:
                self.runtime.set_keep_values(on_device.registered, keep)
            on_device.keep = keep

    def load(self, model: int, rank: int, layers: int, values: KeepValues) -> bool:
        """Begin a background load of leading layers, as :meth:`.protocols.Device.load` does.

        Also return False if the device is lost, if the model's last load failed less than
        ``BACKOFF_S`` ago, or if no such model is registered now.
        """
        _ = self.seen  # the models and shards as they are now
        on_device = self.models[model]
        registered = on_device.registered
        if registered is None or on_device.rank is None:
            return False
        if self.lost or self._clock() < on_device.refused:
            return False
        self.set_keep_values(model, rank, layers, values)
        if on_device.keep is None:
            return False
        try:
            ticket = self.runtime.prewarm(
                registered,
                layers=range(layers),
                priority=BACKGROUND,
                evict_below=on_device.keep[layers - 1],
            )
        except (Busy, OutOfDeviceMemory):
            return False
        except Exception as error:
            if registered in self.runtime.models:  # else it was unregistered meanwhile
                self._refuse(on_device, error)
            return False
        on_device.tickets.append((ticket, layers))
        shard = self._shards.setdefault((model, rank), RuntimeShard(0, 0, pinned=False))
        shard.goal = max(shard.goal, layers)
        return True

    def cancel(self, model: int, rank: int, layers: int) -> None:
        """Cancel the loads of a shard that reach beyond these leading layers."""
        shard = self.shards[model, rank]
        shard.goal = max(shard.layers, self.models[model].cancel(layers))

    def cancel_all(self) -> None:
        """Cancel all loads that this object began."""
        for on_device in self.models:
            on_device.cancel(0)
            on_device.cancel_host([])

    def refuse_host(self, on_device: ModelOnDevice, error: Exception) -> None:
        """Report an error of a load to the host cache, and load the model there again only after
        ``BACKOFF_S``."""
        on_device.host_refused = self.now + BACKOFF_S
        self._failed(error)

    @property
    def now(self) -> float:
        return self._clock()

    def _refuse(self, on_device: ModelOnDevice, error: Exception) -> None:
        """Report an error of a load, and load the model again only after ``BACKOFF_S``."""
        self.lost = self.lost or isinstance(error, DeviceLost)
        on_device.refused = self._clock() + BACKOFF_S
        self._failed(error)
