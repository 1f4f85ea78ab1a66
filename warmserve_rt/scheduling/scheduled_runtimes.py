"""Show runtimes to a scheduler as one fleet, and make the calls of the scheduler."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from warmserve_rt.policy.forecast import Forecaster
from warmserve_rt.policy.profile import ModelProfile

from .device import RuntimeDevice
from .fleet_models import FleetModels
from .host import RuntimeHost
from .loop import Loop
from .registered_models import bare_name, find_model
from .scheduler import Scheduler


class ScheduledRuntimes:
    """Implement :class:`~.protocols.Fleet` for runtimes, and call the scheduler in one loop.

    Models are numbered for the scheduler in the order in which they were added. Before each call
    the scheduler and the devices get the models that the fleet has at that time.

    Parameters
    ----------
    devices
        The devices, in the order of their indices.
    models
        The models of the fleet. Its lock may be taken while the scheduler runs; a caller that holds
        it must not wait for the scheduler.
    bandwidth, switch_s, node_devices
        See :class:`~.protocols.Fleet`.
    file_bandwidth
        Bytes per second that a device with a host cache loads of layers outside the cache.
    clock
        Returns the time in seconds.
    failed
        Called with each error of a call, once if the loop repeats the call.

    Attributes
    ----------
    loop
        Makes the calls.

    Notes
    -----
    Thread-safe. :meth:`begin` and :meth:`arrange` wait for a plan that is being made; the other
    methods do not.
    """

    def __init__(
        self,
        devices: Sequence[RuntimeDevice],
        models: FleetModels,
        *,
        bandwidth: float,
        file_bandwidth: float,
        switch_s: float,
        node_devices: int,
        clock: Callable[[], float],
        failed: Callable[[Exception], None],
    ) -> None:
        self.devices, self._models = devices, models
        self.bandwidth, self.switch_s, self.node_devices = bandwidth, switch_s, node_devices
        self.hosts = [
            RuntimeHost(device, file_bandwidth)
            for device in devices
            if device.runtime.snapshot().host_cache.budget_bytes
        ]
        self.loop = Loop(clock, self._call_failed)
        self._failed = failed
        self._call_error = ""  # the error of the loop's last failed call
        self._plans = threading.RLock()  # held while the scheduler runs; guards the next three
        self._scheduler: Scheduler | None = None
        self.profiles: Sequence[ModelProfile] = ()
        self._rows: dict[str, int] = {}

    def begin(
        self,
        scheduler: Scheduler,
        forecaster: Forecaster,
        service: Sequence[float] | Mapping[str, float],
    ) -> None:
        """Start a scheduler, as :meth:`RuntimeFleet.begin` does."""
        with self._plans:
            if self._scheduler:
                raise ValueError("the fleet has a scheduler already")
            self.arrange()
            names = list(self._rows)
            if not isinstance(service, Mapping) and len(service) == len(names):
                service = dict(zip(names, service, strict=True))
            if not isinstance(service, Mapping) or not service.keys() >= set(names):
                given = ", ".join(service) if isinstance(service, Mapping) else len(service)
                raise ValueError(
                    f"service must have seconds for each of {', '.join(names)}, got {given}"
                )
            forecaster.arrange(names)
            services = [float(service[name]) for name in names]
            with self._models.lock:
                self._models.service.update(zip(names, services, strict=True))
            scheduler.begin(self, forecaster, services)
            self._scheduler = scheduler

    def checked(self, profile: ModelProfile) -> ModelProfile:
        """Return the profile under its bare name. Raise ValueError unless the model is registered
        on every device that needs it."""
        if profile.width > min(self.node_devices, len(self.devices)):
            raise ValueError(f"{profile.name} needs {profile.width} devices of one node")
        found = replace(profile, name=bare_name(profile.name))
        for device in self.devices:
            if self._rank(device.index, found) is not None:
                find_model(device.runtime, device.index, found)
        return found

    def arrange(self) -> None:
        """Give the current models to the scheduler and the devices."""
        with self._plans:
            with self._models.lock:
                change = self._models.take_change()
            if change is None:
                return
            profiles, services = change
            # A model that was removed and added again begins anew: its profile is another object.
            before = {profile.name: row for row, profile in enumerate(self.profiles)}
            rows = [
                row if (row := before.get(p.name)) is not None and self.profiles[row] is p else None
                for p in profiles
            ]
            self.profiles = profiles
            self._rows = {profile.name: row for row, profile in enumerate(profiles)}
            for device in self.devices:
                device.arrange([(p, self._rank(device.index, p)) for p in profiles], rows)
            if self._scheduler:
                self._scheduler.arrange(profiles, services, rows)

    def arrived(self, name: str, concurrent: int, prompt: int) -> None:
        """Tell the scheduler in its turn that a request has arrived now."""
        now = self.now
        self._post(name, lambda scheduler, row: scheduler.arrived(row, now, concurrent, prompt))

    def finished(self, name: str, concurrent: int) -> None:
        """Tell the scheduler in its turn that a request has ended now."""
        now = self.now
        self._post(name, lambda scheduler, row: scheduler.finished(row, now, concurrent))

    def changed(self) -> None:
        """Call :meth:`arrange` in turn, because models were added or removed."""
        self.loop.post(self.arrange)

    # Called by a scheduler.

    @property
    def now(self) -> float:
        return self.loop.clock()

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        def look_and_call() -> None:
            with self._plans:
                self.arrange()
                for device in self.devices:
                    device.refresh()
                call()
                self._call_error = ""

        self.loop.after(seconds, look_and_call)

    def _post(self, name: str, tell: Callable[[Scheduler, int], None]) -> None:
        """Tell the scheduler something about a model in its turn, and that the fleet has changed.

        Parameters
        ----------
        name
            The bare name of the model. If the fleet has removed it by then, nothing is told.
        tell
            Called with the scheduler and the number of the model.
        """

        def tell_in_turn() -> None:
            with self._plans:
                self.arrange()
                if self._scheduler and name in self._rows:
                    tell(self._scheduler, self._rows[name])
                    self._scheduler.changed()

        self.loop.post(tell_in_turn)

    def _call_failed(self, error: Exception) -> None:
        """Report an error of the loop once, although the loop repeats the call that failed."""
        told = f"{type(error).__name__}: {error}"
        if told != self._call_error:
            self._call_error = told
            self._failed(error)

    def _rank(self, index: int, profile: ModelProfile) -> int | None:
        """Return the rank of the shard that belongs on the device of this index, or None if no
        complete group of the model includes the device."""
        first = index - index % profile.width
        last = first + profile.width - 1
        if last >= len(self.devices) or first // self.node_devices != last // self.node_devices:
            return None
        return index % profile.width
