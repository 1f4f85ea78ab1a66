"""Sleep mode: weights are evicted from the arena and loaded again on wake-up."""

from __future__ import annotations

import ctypes
import mmap
from typing import TYPE_CHECKING, Any

from vllm.device_allocator.sleep_mode_backend import CuMemBackend, SleepModeBackend

from warmserve_rt._errors import WarmServeError

if TYPE_CHECKING:
    from .weights import Weights


class ArenaBackend(SleepModeBackend):  # type: ignore[misc]
    """vLLM's sleep-mode backend "warmserve", for CUDA.

    It manages the weights in the arena. vLLM's own backend manages everything else.
    """

    def __init__(self, rest: Any = None) -> None:
        super().__init__()
        self._state = "RUNNING"
        self.weights: list[Weights] = []
        self._rest = rest or CuMemBackend()

    def suspend(self, level: int = 1) -> None:
        """Evict the weights and let vLLM's own backend free the rest.

        A repeated call frees what was loaded again meanwhile. Raises WarmServeError if the backend
        has no weights (the engine's worker takes no leases), and Busy during a step.
        """
        if not self.weights:
            raise WarmServeError(
                "sleep mode 'warmserve' needs the load format 'warmserve' and an engine whose "
                "worker takes leases"
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
        return True  # addresses do not change


def release_pages(tensor: Any) -> None:
    """Return the memory of a host tensor to the system.

    The tensor's address stays valid; it reads as zeros until it is written. Raises OSError.
    """
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
