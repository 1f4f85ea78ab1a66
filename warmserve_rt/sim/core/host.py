"""Track which layers of which shards a node's host memory keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from warmserve_rt.policy._arrays import F64
from warmserve_rt.policy.profile import ModelProfile


class HostMemory:
    """The host memory of one node.

    Layers of the lowest value are evicted first; among equals those of the least recently used
    model, and of these the last layers. Without values the least recently used model is therefore
    evicted first. Infinite memory holds every layer from the beginning.

    Parameters
    ----------
    capacity
        Bytes; may be infinite.
    profiles
        The profiles of the models.

    Attributes
    ----------
    held_bytes
        Bytes of the layers that it holds.
    """

    def __init__(self, capacity: float, profiles: Sequence[ModelProfile]) -> None:
        self.capacity, self.profiles = capacity, profiles
        self.held_bytes = 0.0
        self._uses = 0
        # All layers of all shards, in the order of models, ranks and layers.
        shards = [
            (model, p.layer_bytes) for model, p in enumerate(profiles) for _ in range(p.width)
        ]
        counts = [len(p.layer_bytes) for p in profiles]
        self._begin = np.cumsum([0, *(p.width * n for p, n in zip(profiles, counts, strict=True))])
        self._model = np.repeat([m for m, _ in shards], [len(b) for _, b in shards])
        self._bytes = np.array([each for _, nbytes in shards for each in nbytes], np.float64)
        self._layer = np.concatenate([[], *(np.arange(len(b)) for _, b in shards)])
        self._held = np.full(len(self._bytes), math.isinf(capacity))
        self._value = np.zeros(len(self._bytes))
        self._used = np.zeros(len(self._bytes), np.int64)

    @property
    def infinite(self) -> bool:
        return math.isinf(self.capacity)

    def __contains__(self, model: int) -> bool:
        """Return whether layers of the model are in memory."""
        return bool(self._held[self._begin[model] : self._begin[model + 1]].any())

    def holds(self, model: int, rank: int, layer: int) -> bool:
        """Return whether a layer of a shard is in memory."""
        return bool(self._held[self._place(model, rank, layer)])

    def held(self, model: int) -> list[bool]:
        """Return for each layer of a model whether all its ranks are in memory."""
        ranks = self._held[self._begin[model] : self._begin[model + 1]]
        by_rank = ranks.reshape(self.profiles[model].width, -1)
        return [bool(each) for each in np.logical_and.reduce(by_rank, axis=0)]

    def touch(self, model: int) -> None:
        """Mark the model as the most recently used."""
        self._uses += 1
        self._used[self._begin[model] : self._begin[model + 1]] = self._uses

    def value(self, values: Mapping[int, F64]) -> list[tuple[int, int, int]]:
        """Give the layers of these models their values, and 0 to all others.

        Parameters
        ----------
        values
            By model, the value of each layer.

        Returns
        -------
        list
            The model, rank and layer of each layer that has a value and is missing, those of the
            highest value first.
        """
        self._value[:] = 0.0
        for model, layers in values.items():
            self._value[self._begin[model] : self._begin[model + 1]] = np.tile(
                layers, self.profiles[model].width
            )
        missing = np.flatnonzero((self._value > 0) & ~self._held)
        found = []
        for place in missing[np.argsort(-self._value[missing], kind="stable")].tolist():
            model, layer = int(self._model[place]), int(self._layer[place])
            count = len(self.profiles[model].layer_bytes)
            found.append((model, (place - int(self._begin[model])) // count, layer))
        return found

    def add(self, model: int, rank: int, layer: int) -> bool:
        """Keep a layer that was read from disk. Evict layers of a lower or equal value as it needs
        room, but none of its own model that has an equal value.

        Returns
        -------
        bool
            False if they do not free enough; none is evicted then.
        """
        place = self._place(model, rank, layer)
        if self._held[place]:
            return True
        nbytes, value = float(self._bytes[place]), self._value[place]
        lacking = self.held_bytes + nbytes - self.capacity
        if lacking > 0:
            gives_way = self._held & (
                (self._value < value) | ((self._value == value) & (self._model != model))
            )
            if float(self._bytes[gives_way].sum()) < lacking:
                return False
            places = np.flatnonzero(gives_way)
            order = np.lexsort((-self._layer[places], self._used[places], self._value[places]))
            places = places[order]
            count = int(np.searchsorted(np.cumsum(self._bytes[places]), lacking)) + 1
            self._held[places[:count]] = False
            self.held_bytes -= float(self._bytes[places[:count]].sum())
        self._held[place] = True
        self.held_bytes += nbytes
        return True

    def _place(self, model: int, rank: int, layer: int) -> int:
        count = len(self.profiles[model].layer_bytes)
        return int(self._begin[model]) + rank * count + layer
