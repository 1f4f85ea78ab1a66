"""vLLM's worker with a lease around each operation that reads weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from vllm.platforms import current_platform

from .options import Options
from .sleep import ArenaBackend, release_pages

if TYPE_CHECKING:
    from warmserve_rt.core.lease import Lease

    from .weights import Weights

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as _Base
else:
    from vllm.v1.worker.gpu_worker import Worker as _Base


class Worker(_Base):  # type: ignore[misc]
    """vLLM's worker of this platform, for models of the load format "warmserve".

    A step holds a lease from :meth:`execute_model` to the end of :meth:`sample_tokens`. Between
    steps the weights may be evicted; each other operation that reads them takes its own lease. On
    CUDA a lease records torch's current streams, of which vLLM may set another one meanwhile.
    """

    warmserve_leases = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._weights: list[Weights] = []
        self._lease: Lease | None = None
        self._gated = False
        self._verified = False

    def load_model(self, **options: Any) -> None:
        super().load_model(**options)
        models = (self.model_runner.get_model(), self.get_draft_model())
        self._weights = [m.warmserve_weights for m in models if hasattr(m, "warmserve_weights")]
        if self._weights:
            first = self._weights[0]
            self._gated = Options.parse(self.load_config.model_loader_extra_config).gated
            self._lease = first.runtime.lease(
                [weights.model for weights in self._weights], streaming=self._gated
            )
            self._verified = not self._gated

    def execute_model(self, scheduler_output: Any) -> Any:
        lease = self._lease
        if lease is None or not scheduler_output.total_num_scheduled_tokens:
            return super().execute_model(scheduler_output)
        if lease.held:  # the previous step was aborted between its two halves
            lease.release()
        lease.acquire()
        goes_on = False
        try:
            output = super().execute_model(scheduler_output)
            goes_on = output is None
            if not goes_on:
                self._verify_once()
            return output
        finally:
            if not goes_on:
                lease.release()

    def sample_tokens(self, grammar_output: Any) -> Any:
        lease = self._lease
        if lease is None or not lease.held:
            return super().sample_tokens(grammar_output)
        try:
            output = super().sample_tokens(grammar_output)
            self._verify_once()
            return output
        finally:
            lease.release()

    def _verify_once(self) -> None:
        """Verify the weights after the first step of a gated start, before it returns a token."""
        if not self._verified:
            for weights in self._weights:
                weights.verify()
            self._verified = True

    @contextmanager
    def _leased(self, *, gated: bool = False) -> Iterator[None]:
        """Hold a lease for an operation that reads weights outside a step.

        All weights are resident. With ``gated`` they may still be loading: use it only for
        operations that read weights in forward passes, which wait for them.
        """
        if not self._weights:
            yield
            return
        runtime = self._weights[0].runtime
        models = [weights.model for weights in self._weights]
        with runtime.lease(models, streaming=gated):
            yield

    def determine_available_memory(self) -> int:
        """Return the bytes available for the KV cache.

        On a CPU, vLLM counts mapped pages. An arena maps fewer bytes than it owns, so the
        difference is subtracted from the requested memory while vLLM computes. The arena of a
        broker belongs to the broker's process, so only its mapped pages count here.
        """
        with self._leased(gated=self._gated):
            if not (current_platform.is_cpu() and self._weights):
                return int(super().determine_available_memory())
            requested = self.requested_cpu_memory
            uncounted = self._weights[0].arena.unmapped(mapped_shared_bytes())
            self.requested_cpu_memory: int = requested - uncounted
            try:
                return int(super().determine_available_memory())
            finally:
                self.requested_cpu_memory = requested

    def compile_or_warm_up_model(self) -> Any:
        with self._leased(gated=self._gated):
            return super().compile_or_warm_up_model()

    def execute_dummy_batch(self) -> None:
        with self._leased(gated=self._gated):
            super().execute_dummy_batch()

    def apply_model(self, fn: Callable[[torch.nn.Module], Any]) -> Any:
        with self._leased():
            return super().apply_model(fn)

    def compute_weight_checksums(self) -> dict[str, str]:
        with self._leased():
            checksums: dict[str, str] = super().compute_weight_checksums()
            return checksums

    def save_sharded_state(self, *args: Any, **kwargs: Any) -> None:
        with self._leased():
            super().save_sharded_state(*args, **kwargs)

    def reset_weights(self) -> None:
        self._refuse("reset_weights")
        super().reset_weights()

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        self._refuse("reload_weights")
        super().reload_weights(*args, **kwargs)

    def start_weight_update(self, *args: Any, **kwargs: Any) -> None:
        self._refuse("start_weight_update")
        super().start_weight_update(*args, **kwargs)

    def _refuse(self, what: str) -> None:
        if self._weights:
            raise NotImplementedError(
                f"{what}: weights in an arena are read-only, and other engines may share them"
            )

    def warmserve_models(self) -> list[str]:
        """Return the names of the engine's models in the arena's runtime."""
        return [weights.model.name for weights in self._weights]

    def prewarm(self) -> None:
        """Start loading the missing layers at a waiting request's priority. Does not block."""
        for weights in self._weights:
            weights.prewarm()

    def sleep(self, level: int = 1) -> None:
        """Evict the weights and release the KV cache's memory.

        Levels 1 and 2 do the same: waking up reads the cache of processed weights. On CUDA vLLM's
        worker calls the sleep-mode backend.
        """
        if not self._weights or not current_platform.is_cpu():
            super().sleep(level)
            return
        for weights in self._weights:
            weights.sleep()
        for tensor in self.model_runner.kv_caches:
            release_pages(tensor)

    def wake_up(self, tags: list[str] | None = None) -> None:
        if not self._weights or not current_platform.is_cpu():
            super().wake_up(tags)
            return
        if tags is None or "weights" in tags:
            for weights in self._weights:
                weights.wake()

    @property
    def sleep_mode_backend(self) -> Any:
        """The backend of vLLM's worker. vLLM makes it without arguments, so we set its weights."""
        backend = super().sleep_mode_backend
        if isinstance(backend, ArenaBackend):
            backend.weights = self._weights
        return backend

    def shutdown(self) -> None:
        super().shutdown()
        while self._weights:
            self._weights.pop().close()


def mapped_shared_bytes() -> int:
    """Return the bytes of shared mappings that this process's resident size counts.

    These are the arena's, which is mapped twice.
    """
    with open(f"/proc/{os.getpid()}/status") as status:
        for line in status:
            if line.startswith("RssShmem:"):
                return int(line.split()[1]) * 1024
    return 0
