"""Choose which layers a device evicts: tail layers, those with the lowest keep values first."""

from __future__ import annotations

from bisect import bisect_right

from .devices import Device, Shard


def choose_victims(
    device: Device, nbytes: float, *, spare: Shard | None, below: float
) -> dict[Shard, int] | None:
    """Return the shards that shrink, and the number of leading layers that each of them keeps.

    Parameters
    ----------
    device
        The device.
    nbytes
        Bytes to free; not positive if none must be freed.
    spare
        A shard that does not shrink. Shards that an instance uses do not shrink either.
    below
        Only layers with keep values less than this are evicted.

    Returns
    -------
    dict or None
        None if the evictable layers have too few bytes.
    """
    targets = {s: s.target for s in device.shards.values() if not s.pinned and s is not spare}
    kept: dict[Shard, int] = {}
    while nbytes > 0:
        tails = [(*shard.tail(target), shard) for shard, target in targets.items() if target > 0]
        value, floor, shard = min(tails, key=lambda tail: tail[0], default=(below, 0.0, None))
        if shard is None or value >= below:
            return None
        # Free at least one byte, so that a shortage by rounding evicts a layer too.
        stay = max(floor + 0.5, targets[shard] - max(nbytes, 1.0))
        layers = kept[shard] = bisect_right(shard.ends, stay)
        target = float(shard.ends[layers - 1]) if layers else 0.0
        nbytes -= targets[shard] - target
        targets[shard] = target
    return kept
