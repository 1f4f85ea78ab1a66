"""Keep the models of a fleet by name, and count their requests."""

from __future__ import annotations

import threading
from statistics import fmean

from warmserve_rt.policy.profile import ModelProfile

from .registered_models import bare_name

SERVICE_S = 1.0  # seconds of a request of the first model, if the caller gives none


class FleetModels:
    """The models of a fleet by bare name, with the seconds and the number of their requests.

    The caller holds ``lock`` during each access. It reports a change or a request to the scheduler
    before it releases the lock, so that the scheduler learns of them in their order.

    Attributes
    ----------
    lock
        Guards this object.
    profiles
        The profile of each model.
    service
        Seconds that a request takes, by model. A model may be missing until the scheduler begins.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.profiles: dict[str, ModelProfile] = {}
        self.service: dict[str, float] = {}
        self._concurrent: dict[str, int] = {}  # includes models that were removed
        self._changed = True  # whether the models changed since the last take_change

    def add(self, profile: ModelProfile, service: float | None) -> None:
        """Add a model.

        Parameters
        ----------
        profile
            The profile of the model, under its bare name.
        service
            Seconds that one of its requests takes; by default the mean of the other models.

        Raises
        ------
        ValueError
            If the fleet has the model already.
        """
        if profile.name in self.profiles:
            raise ValueError(f"the fleet has {profile.name!r} already: remove it first")
        others = self.service.values()
        self.service[profile.name] = service or (fmean(others) if others else SERVICE_S)
        self.profiles[profile.name] = profile
        self._changed = True

    def remove(self, model: str) -> None:
        """Remove a model. Raise ValueError if the fleet does not have it."""
        name = self._known(model)
        del self.profiles[name]
        self.service.pop(name, None)
        self._changed = True

    def arrived(self, model: str) -> tuple[str, int]:
        """Count a request that has arrived. Return the model's bare name and its requests in
        progress. Raise ValueError if the fleet does not have the model."""
        name = self._known(model)
        count = self._concurrent[name] = self._concurrent.get(name, 0) + 1
        return name, count

    def finished(self, model: str) -> tuple[str, int]:
        """Count a request that has ended. Return the model's bare name and its requests in
        progress. Raise ValueError if no request of the model was in progress."""
        name = bare_name(model)
        count = self._concurrent.get(name, 0)
        if not count:
            self._known(model)
            raise ValueError(f"{name!r} has no request in progress that could end")
        count -= 1
        self._concurrent[name] = count
        if not count:
            del self._concurrent[name]
        return name, count

    def take_change(self) -> tuple[tuple[ModelProfile, ...], list[float]] | None:
        """Return each model's profile and seconds of a request, or None if no model was added or
        removed since the last call."""
        if not self._changed:
            return None
        self._changed = False
        profiles = tuple(self.profiles.values())
        return profiles, [self.service.get(profile.name, SERVICE_S) for profile in profiles]

    def _known(self, model: str) -> str:
        name = bare_name(model)
        if name not in self.profiles:
            there = ", ".join(self.profiles) or "none"
            raise ValueError(f"{name!r} has no profile: the fleet has {there}")
        return name
