"""Size the KV caches of instances: give them room for their requests, and take it back."""

from __future__ import annotations

import math

from .devices import KV_STEP
from .instance import Instance
from .memory import Memory
from .requests import Requests


class KvCaches:
    """The KV caches of a fleet's instances. Each has the same size on all devices of its instance.

    Parameters
    ----------
    memory
        The memory of the devices.
    requests
        The requests of the run.
    elastic
        Whether a cache has only the room that its requests need. Otherwise it has all memory beside
        the weights.
    """

    def __init__(self, memory: Memory, requests: Requests, *, elastic: bool) -> None:
        self.memory, self.requests, self.elastic = memory, requests, elastic

    def open(self, instance: Instance) -> None:
        """Give a cache that is not elastic all free memory of its devices."""
        if not self.elastic:
            devices = [self.memory.devices[index] for index in instance.device_indices]
            left = min(math.floor(device.memory - device.used) for device in devices)
            self._resize(instance, float(max(left, 0)))

    def close(self, instance: Instance) -> None:
        """Free the whole cache of an instance that has no requests."""
        self._resize(instance, 0.0)

    def reserve(self, instance: Instance, request: int) -> bool:
        """Return whether the instance has room for this request; grow an elastic cache.

        Parameters
        ----------
        instance
            The instance.
        request
            The request that it may take.
        """
        profile = instance.profile
        if instance.request_count >= profile.batch:
            return False
        tokens = instance.kv_tokens + self.requests.tokens[request]
        need = float(tokens) * profile.kv_token_bytes
        if need <= instance.kv_room:
            return True
        if not self.elastic:
            # A request that exceeds every cache is served alone, cut.
            return not instance.request_count
        if self._grow(instance, _whole_steps(need)) or self._grow(instance, need):
            return True
        devices = [self.memory.devices[index] for index in instance.device_indices]
        alone = min(device.spare + device.kv for device in devices)
        return not instance.request_count and need > alone

    def shrink(self, instance: Instance) -> None:
        """Shrink an elastic cache after the end of a request if much of it is unused, and free it
        after the last request."""
        if self.elastic:
            need = _whole_steps(float(instance.kv_tokens) * instance.profile.kv_token_bytes)
            if not need or instance.kv_room > need + KV_STEP:
                self._resize(instance, need)

    def lend(self, instance: Instance, kv_bytes: float) -> None:
        """Shrink a cache, so that the rest becomes free for prewarming.

        Parameters
        ----------
        instance
            The instance.
        kv_bytes
            Bytes that the cache keeps on each device, rounded down to whole bytes.

        Raises
        ------
        ValueError
            If the KV cache is smaller than that, or ``kv_bytes`` is negative.
        """
        if not 0 <= kv_bytes <= instance.kv_room:
            raise ValueError(
                f"cannot leave {kv_bytes:g} bytes of KV cache: must be in [0, {instance.kv_room:g}]"
            )
        self._resize(instance, float(math.floor(kv_bytes)))

    def _resize(self, instance: Instance, nbytes: float) -> None:
        """Set a cache to whole bytes on each device, so that sums are exact."""
        for index in instance.device_indices:
            device = self.memory.devices[index]
            device.used += nbytes - instance.kv_room
            device.kv += nbytes - instance.kv_room
        instance.kv_room = nbytes

    def _grow(self, instance: Instance, need: float) -> bool:
        """Grow a cache to ``need`` bytes on every device, or on none if one has no room."""
        more = need - instance.kv_room
        devices = [self.memory.devices[index] for index in instance.device_indices]
        if any(device.spare < more for device in devices):
            return False
        for device in devices:
            self.memory.make_room(device, more)
        self._resize(instance, need)
        return True


def _whole_steps(nbytes: float) -> float:
    return math.ceil(nbytes / KV_STEP) * KV_STEP
