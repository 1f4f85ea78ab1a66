"""A node's host memory: which leading bytes of which shards it keeps, the last used longest."""

from __future__ import annotations


class HostMemory:
    """Of ``capacity`` bytes. A model's shards leave it together, whoever was loaded longest ago
    first; in infinite memory everything lies from the beginning."""

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self._models: dict[int, dict[int, float]] = {}  # bytes of each rank, by last use

    def __contains__(self, model: int) -> bool:
        return self.capacity == float("inf") or model in self._models

    def has(self, model: int, rank: int, nbytes: float) -> bool:
        """Whether so many leading bytes of a shard are here."""
        if self.capacity == float("inf"):
            return True
        return self._models.get(model, {}).get(rank, 0.0) >= nbytes

    def use(self, model: int) -> None:
        if model in self._models:
            self._models[model] = self._models.pop(model)

    def bring(self, model: int, rank: int, nbytes: float) -> None:
        """So many leading bytes of a shard have come from disk."""
        ranks = self._models.pop(model, {})
        self._models[model] = ranks
        ranks[rank] = max(ranks.get(rank, 0.0), nbytes)
        held = sum(sum(each.values()) for each in self._models.values())
        while held > self.capacity:
            held -= sum(self._models.pop(next(iter(self._models))).values())
