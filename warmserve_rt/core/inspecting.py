"""What a runtime tells of itself: its models, their bytes, and the device."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from warmserve_rt import _arguments as check
from warmserve_rt import _native
from warmserve_rt._errors import WarmServeError
from warmserve_rt._log import log
from warmserve_rt._units import format_bytes

from .model import Model
from .revisions import Revisions
from .selection import layer_index
from .snapshot import Snapshot
from .views import Framework

StreamPriority = Literal["background", "normal", "urgent"]


class Inspecting:
    """The part of :class:`Runtime` that changes nothing."""

    def __init__(
        self, native: _native.Runtime, device: str, framework: Framework, granule_bytes: int
    ) -> None:
        self._open: _native.Runtime | None = native
        self._device = device
        self._framework: Framework = framework
        self._granule_bytes = granule_bytes
        self._models = Revisions()
        self._failed_paths: set[str] = set()  # that have been logged

    def __repr__(self) -> str:
        if self._open is None:
            return f"<Runtime on {self._device}: closed>"
        try:
            now = self.snapshot()
        except WarmServeError as error:  # a forked child's
            return f"<Runtime on {self._device}: {error}>"
        parts = [
            _count(len(now.models), "model"),
            f"{format_bytes(now.bytes_in_use)} of {format_bytes(now.arena_bytes)} in use",
            _count(now.leases, "lease"),
        ]
        return f"<Runtime on {self._device}: {', '.join(parts)}>"

    @property
    def native(self) -> _native.Runtime:
        """The native runtime. Raises WarmServeError when this one is closed."""
        if self._open is None:
            raise WarmServeError("the runtime is closed")
        return self._open

    @property
    def models(self) -> tuple[Model, ...]:
        """All registered models, revisions of one name included."""
        return tuple(self._models.values())

    def model(self, model: Model | str) -> Model:
        """Returns the registered model of a full name, or the one that a bare name stands for now.
        A registered model stands for itself. Raises ValueError."""
        try:
            return self._models.find(model)
        except ValueError:
            self.native  # noqa: B018  raises if the runtime is closed, which forgets its models
            raise

    def why_not_leased(self, model: Model) -> str:
        """Says for a StaleView why a module that is bound to ``model`` cannot run now, and what to
        do."""
        if self._open is None:
            return f"{model.name!r} cannot be used: the runtime is closed"
        return self._models.why_not_leased(model)

    def tensors(self, model: Model | str) -> dict[str, Any]:
        """See :meth:`Model.tensors`."""
        return self.model(model).tensors()

    def read_back(self, model: Model | str, layer: int | str) -> npt.NDArray[np.uint8]:
        """Returns a copy of a resident layer's bytes, as the device has them: shape
        ``(layer.nbytes,)``. Raises StaleView unless it is resident, ValueError for an unknown
        layer."""
        found = self.model(model)
        index = layer_index(found, layer)
        out = np.empty(found.layers[index].nbytes, np.uint8)
        self.native.read_back(found.native, index, out)
        return out

    def digest(self, model: Model | str, layer: int | str) -> npt.NDArray[np.uint64]:
        """Returns a digest of each granule of a resident layer, made on the device: as
        :func:`kernels.granule_digest` of its bytes, shape ``(granules,)``. Raises as
        :meth:`read_back`, and WarmServeError if there are no kernels for the device."""
        found = self.model(model)
        return np.array(self.native.digest(found.native, layer_index(found, layer)), np.uint64)

    def device_memory(self) -> tuple[int, int]:
        """Returns the bytes of the device that are free, and its bytes in all. This runtime never
        takes the last ``headroom`` of the free ones. Zeros: the device does not say."""
        return self.native.device_memory()

    def fileno(self) -> int:
        """Returns an eventfd that is readable when a backing epoch has changed since it was last
        read: graph and collective registrations of memory can then be renewed. The runtime owns
        it: do not close it."""
        return self.native.fileno()

    def snapshot(self) -> Snapshot:
        """Returns what is where now, as plain values."""
        now = Snapshot.of(self.native)
        for path in now.paths:
            if path.error and path.name not in self._failed_paths:
                self._failed_paths.add(path.name)
                log.warning("path %s carries no more: %s", path.name, path.error)
        return now

    def stream(self, priority: StreamPriority = "normal") -> _native.Stream:
        """Returns a new stream of the device: work in order, beside the caller's. ``priority`` is
        a hint for kernels; copies may not heed it. ``torch.cuda.ExternalStream(stream.handle)`` is
        the same stream for torch, as long as this object lives."""
        return self.native.stream(
            check.choice("priority", priority, ("background", "normal", "urgent"))
        )

    def check_invariants(self) -> None:
        """Raises WarmServeError, which names the first thing wrong in the runtime's state."""
        self.native.check_invariants()


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
