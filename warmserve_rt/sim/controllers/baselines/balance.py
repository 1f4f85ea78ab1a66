"""Decide statically which models share which devices: greedy load balancing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from warmserve_rt.policy.profile import ModelProfile
from warmserve_rt.sim.core.devices import Hardware

KV_TOKENS = 1024  # tokens of a request in the KV cache that a placement assumes
COPY_THRESHOLD = 0.5  # share of a batch: with more requests at its peak a model gets another copy


@dataclass(frozen=True)
class ModelLoad:
    """The load of one model: mean and peak concurrent requests, and requests per second."""

    profile: ModelProfile
    average: float
    peak: float
    rate: float

    def busy(self, copies: int) -> float:
        """Return the share of time in which one of ``copies`` has a request, for Poisson arrivals
        that are divided evenly."""
        return 1 - math.exp(-self.average / copies)

    def memory(self, copies: int) -> float:
        """Return the bytes of one of ``copies`` on each device, with the requests of its peak."""
        requests = min(max(self.peak / copies, 1.0), self.profile.batch)
        return self.profile.nbytes + requests * KV_TOKENS * self.profile.kv_token_bytes


@dataclass(frozen=True)
class PlacedCopy:
    """A copy of a model on ``width`` devices from ``first`` on."""

    model: int
    first: int
    width: int


def place_copies(loads: Sequence[ModelLoad], hardware: Hardware) -> list[PlacedCopy]:
    """Place copies of models on aligned groups of devices; several may share a device.

    First one copy of each model is placed, with memory for one request. The models are ordered by
    load, by bytes or by requests per byte, whichever order leaves the lowest rate of requests
    without a place. Then further copies are placed while there is room for the peaks of all models
    on the devices. Each is a copy of the model whose copies are fullest at its peak. A copy goes to
    the group whose busiest device is least busy.

    Parameters
    ----------
    loads
        The load of each model.
    hardware
        The devices.
    """

    def load(m: int) -> float:
        return loads[m].busy(1) * loads[m].profile.width

    def nbytes(m: int) -> float:
        return float(loads[m].profile.nbytes * loads[m].profile.width)

    def density(m: int) -> float:
        return loads[m].rate / nbytes(m)

    def unserved(placed: list[PlacedCopy]) -> float:
        models = {each.model for each in placed}
        return sum(each.rate for m, each in enumerate(loads) if m not in models)

    placed = min(
        (_place_once(loads, hardware, key) for key in (load, nbytes, density)), key=unserved
    )
    open_models = {each.model for each in placed}
    while open_models:
        copies = _count_copies(placed)
        model = max(
            open_models, key=lambda m: (loads[m].peak / loads[m].profile.batch / copies[m], -m)
        )
        if loads[model].peak <= COPY_THRESHOLD * loads[model].profile.batch * copies[model]:
            break
        found = _best_copy(loads, hardware, placed, model, peaks=True)
        if found is None:
            open_models.remove(model)
        else:
            placed.append(found)
    return placed


def _place_once(
    loads: Sequence[ModelLoad], hardware: Hardware, key: Callable[[int], float]
) -> list[PlacedCopy]:
    """Place one copy of each model that fits, in falling order of the key."""
    placed: list[PlacedCopy] = []
    for model in sorted(range(len(loads)), key=key, reverse=True):
        found = _best_copy(loads, hardware, placed, model, peaks=False)
        if found is not None:
            placed.append(found)
    return placed


def _count_copies(placed: Sequence[PlacedCopy]) -> dict[int, int]:
    copies: dict[int, int] = {}
    for each in placed:
        copies[each.model] = copies.get(each.model, 0) + 1
    return copies


def _best_copy(
    loads: Sequence[ModelLoad],
    hardware: Hardware,
    placed: Sequence[PlacedCopy],
    model: int,
    *,
    peaks: bool,
) -> PlacedCopy | None:
    """Return a copy on the least busy group that has room for it and no copy of the model."""
    copies = _count_copies(placed)
    copies[model] = copies.get(model, 0) + 1
    used, busy = [0.0] * hardware.devices, [0.0] * hardware.devices
    taken = set[int]()

    def memory(m: int) -> float:
        profile = loads[m].profile
        if peaks:
            return loads[m].memory(copies[m])
        return float(profile.nbytes + KV_TOKENS * profile.kv_token_bytes)

    for each in placed:
        for d in range(each.first, each.first + each.width):
            used[d] += memory(each.model)
            busy[d] += loads[each.model].busy(copies[each.model])
            if each.model == model:
                taken.add(d)
    width, node = loads[model].profile.width, hardware.node_devices
    best, least = None, (math.inf, math.inf)
    for start in range(0, hardware.devices, node):
        for first in range(start, start + node - width + 1, width):
            group = range(first, first + width)
            room = hardware.memory - max(used[d] for d in group)
            if room < memory(model) or not taken.isdisjoint(group):
                continue
            rank = (max(busy[d] for d in group), max(used[d] for d in group))
            if rank < least:
                best, least = PlacedCopy(model, first, width), rank
    return best
