"""A runtime as a scheduler sees it: what it holds of which models, and what is on its way."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

from ._errors import Busy, Cancelled, DeviceLost, OutOfDeviceMemory
from .model import Model
from .policy.profile import ModelProfile
from .runtime import BACKGROUND, Runtime, Ticket
from .snapshot import LayerSnapshot, Snapshot

Stamps = list[tuple[float, float]]
BACKOFF_S = 30.0  # after a load that failed, until the model is loaded again
# Of a keep value, what each layer has less than the one before it: a model is left from its end.
SLOPE = 2.0**-20


class RuntimeShard:
    """See ShardView. ``model``: its number."""

    __slots__ = ("goal", "layers", "model", "pinned")

    def __init__(self, model: int, layers: int, goal: int, *, pinned: bool) -> None:
        self.model, self.layers, self.goal, self.pinned = model, layers, goal, pinned


class RuntimeDevice:
    """See DeviceView. ``models``: those of the profiles as they are registered, or None.

    ``exclusive``: a leased model has the device for itself. ``failed`` is told what loading met.
    Its view is as old as the last :meth:`refresh`, and what was done since. Not thread-safe.
    """

    def __init__(
        self,
        index: int,
        runtime: Runtime,
        profiles: Sequence[ModelProfile],
        models: Sequence[Model | None],
        *,
        exclusive: bool,
        clock: Callable[[], float],
        failed: Callable[[Exception], None],
    ) -> None:
        self.index, self.runtime, self.models = index, runtime, models
        self.exclusive, self.lost = exclusive, False
        self._clock, self._failed = clock, failed
        self._ranks = [index % profile.width for profile in profiles]
        self._ends = [list(accumulate(profile.layer_bytes)) for profile in profiles]
        self._tickets: dict[int, list[tuple[Ticket, int]]] = {}  # each of so many leading layers
        self._keep: dict[int, list[float]] = {}  # what its layers were stamped with
        self._refused: dict[int, float] = {}  # until when
        self._shards: dict[tuple[int, int], RuntimeShard] = {}
        self._seen: Snapshot | None = None

    def refresh(self) -> None:
        """What is there from now on is looked up again."""
        self._seen = None

    @property
    def seen(self) -> Snapshot:
        if self._seen is None:
            for model in list(self._tickets):
                self._reap(model)
            self._seen = self.runtime.snapshot()
            self._shards = {}
            for model in range(len(self.models)):
                shard = self._shard(model, self._seen)
                if shard:
                    self._shards[model, self._ranks[model]] = shard
        return self._seen

    @property
    def shards(self) -> Mapping[tuple[int, int], RuntimeShard]:
        _ = self.seen
        return self._shards

    @property
    def active(self) -> bool:
        """A model has it for itself."""
        return self.exclusive and self.seen.leases > 0

    @property
    def occupants(self) -> dict[tuple[int, int], bool]:
        if not self.active:
            return {}
        pinned = (key for key, shard in self.shards.items() if shard.pinned)
        return {(model, self.index - rank): True for model, rank in pinned}

    @property
    def room(self) -> float:
        """The arena, but for what leases hold beside the leading layers, which are counted as such:
        so there is none beside models that have no profile."""
        seen = self.seen
        leading = {self._name(model): shard.goal for (model, _), shard in self.shards.items()}
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
        """Gives each leading layer the keep value of its part, and the others none."""
        registered = self.models[model]
        if registered is None:
            return
        ends = [end + 0.5 for end, _ in stamps]
        before, now = self._keep.get(model), []
        for layer, end in enumerate(self._ends[model]):
            part = bisect_left(ends, end) if layer < layers else len(stamps)
            value = stamps[part][1] if part < len(stamps) else 0.0
            now.append(value * (1 - layer * SLOPE) if value > 0 else -layer * SLOPE**2)
        for layer, value in enumerate(now):
            if before is None or before[layer] != value:
                self.runtime.native.stamp(registered.native, value, layer)
        self._keep[model] = now

    def load(self, model: int, layers: int, stamps: Stamps) -> bool:
        """See FleetView; False also where the device is lost or the model's last load failed."""
        registered = self.models[model]
        if registered is None or self.lost or self._clock() < self._refused.get(model, -math.inf):
            return False
        seen = self.seen
        self.stamp(model, layers, stamps)
        if not self._has_room(model, layers, seen):
            return False
        try:
            ticket = self.runtime.prewarm(registered, layers=range(layers), priority=BACKGROUND)
        except (Busy, OutOfDeviceMemory):
            return False
        except Exception as error:
            self._refuse(model, error)
            return False
        self._tickets.setdefault(model, []).append((ticket, layers))
        key = model, self._ranks[model]
        shard = self._shards.setdefault(key, RuntimeShard(model, 0, 0, pinned=False))
        shard.goal = max(shard.goal, layers)
        return True

    def call_off(self, shard: RuntimeShard, layers: int) -> None:
        """Cancels what brings more than these leading layers."""
        kept = []
        for ticket, brings in self._tickets.pop(shard.model, []):
            if brings > layers:
                ticket.cancel()
            else:
                kept.append((ticket, brings))
        if kept:
            self._tickets[shard.model] = kept
        shard.goal = max([shard.layers, *(brings for _, brings in kept)])

    def call_all_off(self) -> None:
        """Cancels whatever it began."""
        for tickets in self._tickets.values():
            for ticket, _ in tickets:
                ticket.cancel()
        self._tickets.clear()

    def _name(self, model: int) -> str:
        registered = self.models[model]
        return registered.name if registered else ""

    def _shard(self, model: int, seen: Snapshot) -> RuntimeShard | None:
        state = seen.models.get(self._name(model))
        if state is None:
            return None
        layers = goal = 0
        coming = max((brings for _, brings in self._tickets.get(model, ())), default=0)
        for layer in state.layers:
            here = layer.residency == "resident"
            if not (here or layer.residency == "filling" or layer.leases or goal < coming):
                break
            layers += here and layers == goal
            goal += 1
        return RuntimeShard(model, layers, goal, pinned=state.leases > 0) if goal else None

    def _has_room(self, model: int, layers: int, seen: Snapshot) -> bool:
        """Whether the layers fit beside all that is worth as much, is leased or on its way."""
        numbers = {self._name(m): m for m, each in enumerate(self.models) if each}
        value = self._keep[model][layers - 1]
        left = seen.granules_free + seen.granules_trimmed
        for name, state in seen.models.items():
            number = numbers.get(name, -1)
            shard = self._shards.get((number, self._ranks[number])) if number >= 0 else None
            coming = layers if number == model else shard.goal if shard else 0
            for index, layer in enumerate(state.layers):
                if layer.residency == "absent":
                    if index < coming or layer.leases:
                        left -= layer.granules
                elif layer.residency == "resident" and not layer.leases:
                    ours = number == model and index < layers
                    if not ours and self._value(number, index, layer) < value:
                        left += layer.granules
        return left >= 0

    def _value(self, model: int, index: int, layer: LayerSnapshot) -> float:
        """What a layer is stamped with now, which may be later than the snapshot."""
        kept = self._keep.get(model)
        return kept[index] if kept else layer.keep_value

    def _reap(self, model: int) -> None:
        """Forgets the tickets that are done, and hears what they met."""
        running = []
        for ticket, layers in self._tickets.pop(model):
            if not ticket.done:
                running.append((ticket, layers))
                continue
            try:
                ticket.wait(0)
            except (Busy, Cancelled, OutOfDeviceMemory):
                pass  # a lease came first, or somebody evicted it
            except Exception as error:
                self._refuse(model, error)
        if running:
            self._tickets[model] = running

    def _refuse(self, model: int, error: Exception) -> None:
        self.lost = self.lost or isinstance(error, DeviceLost)
        self._refused[model] = self._clock() + BACKOFF_S
        self._failed(error)
