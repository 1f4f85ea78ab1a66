"""Track which leading bytes of which shards a node's host memory keeps (LRU)."""

from __future__ import annotations


class HostMemory:
    """The host memory of one node.

    A model's shards are evicted together, the least recently used model first.
    Infinite memory holds every model from the beginning.

    Parameters
    ----------
    capacity
        Bytes; may be infinite.
    """

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self._models: dict[int, dict[int, float]] = {}  # bytes of each rank, by last use

    def __contains__(self, model: int) -> bool:
        return self.capacity == float("inf") or model in self._models

    def has(self, model: int, rank: int, nbytes: float) -> bool:
        """Return whether this many leading bytes of a shard are in memory.

        Parameters
        ----------
        model, rank
            The model and the rank of the shard.
        nbytes
            The number of leading bytes.
        """
        if self.capacity == float("inf"):
            return True
        return self._models.get(model, {}).get(rank, 0.0) >= nbytes

    def touch(self, model: int) -> None:
        """Mark the model as the most recently used."""
        if model in self._models:
            self._models[model] = self._models.pop(model)

    def add(self, model: int, rank: int, nbytes: float) -> None:
        """Add leading bytes of a shard that were read from disk; evict models beyond capacity.

        Parameters
        ----------
        model, rank
            The model and the rank of the shard.
        nbytes
            The number of leading bytes.
        """
        ranks = self._models.pop(model, {})
        self._models[model] = ranks
        ranks[rank] = max(ranks.get(rank, 0.0), nbytes)
        held = sum(sum(each.values()) for each in self._models.values())
        while held > self.capacity:
            held -= sum(self._models.pop(next(iter(self._models))).values())
