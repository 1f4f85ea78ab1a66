"""Sleep mode: weights leave the arena, and come back."""

from __future__ import annotations

import ctypes
import mmap
from typing import TYPE_CHECKING, Any

from vllm.device_allocator.sleep_mode_backend import CuMemBackend, SleepModeBackend

from warmserve_rt._errors import WarmServeError

if TYPE_CHECKING:
    from .arenas import Weights


class ArenaBackend(SleepModeBackend):  # type: ignore[misc]
    """vLLM's sleep-mode backend "warmserve", for CUDA: the weights are in the arena, and everything
    else is where vLLM's own backend looks after it."""

    def __init__(self, rest: Any = None) -> None:
        super().__init__()
        self._state = "RUNNING"
        self.weights: list[Weights] = []
        self._rest = rest or CuMemBackend()

    def suspend(self, level: int = 1) -> None:
        """Evicts the weights and lets vLLM's own backend free the rest. Told again, both free what
        came back meanwhile.

        Raises WarmServeError if there are no weights to evict (an engine whose worker takes no
        leases), and Busy during a step."""
        if not self.weights:
            raise WarmServeError(
                "sleep mode 'warmserve' is for engines of the load format 'warmserve' whose worker "
                "takes leases"
            )
        for weights in self.weights:
            weights.sleep()
        self._rest.suspend(level)
        self._state = "SUSPENDED"

    def resume(self, tags: list[str] | None = None) -> None:
        self._state = "RESUMING"
        if tags is None or "weights" in tags:
            for weights in self.weights:
                weights.wake()
        self._rest.resume(tags)
        self._state = "RUNNING"

    def discard(self, tags: tuple[str, ...]) -> None:
        self._rest.discard(tags)

    @classmethod
    def preserves_communicators(cls) -> bool:
        return True

    @classmethod
    def preserves_compiled_artifacts(cls) -> bool:
        return True  # addresses stay


def release_pages(tensor: Any) -> None:
    """Gives the memory of a host tensor back to the system; its address stays, and it reads as
    zeros until it is written."""
    begin = tensor.untyped_storage().data_ptr()
    end = begin + tensor.untyped_storage().nbytes()
    first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    last = end // mmap.PAGESIZE * mmap.PAGESIZE
    if first >= last:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    advice = ctypes.c_int(mmap.MADV_DONTNEED)
    if libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice):
        error = ctypes.get_errno()
        raise OSError(error, "madvise(MADV_DONTNEED)")
