"""Inspection of a runtime: its models, their bytes, and the device."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from warmserve_rt import _arguments as check
from warmserve_rt import _native
from warmserve_rt._errors import WarmServeError
from warmserve_rt._log import log
from warmserve_rt._units import Size, format_bytes, parse_bytes

from .lease_streams import CurrentStreams, FindStreams
from .model import Model
from .revisions import Revisions
from .selection import layer_index
from .snapshot import Snapshot
from .streams import StreamLike, native_stream
from .views import Framework

StreamPriority = Literal["background", "normal", "urgent"]

_PIECE_UNIT = 4096  # bytes; a digest takes eight, so no call returns more than a few of the layer


class Inspecting:
    """The part of :class:`Runtime` that reads its state."""

    def __init__(
        self,
        native: _native.Runtime,
        device: str,
        cuda_ordinal: int,
        framework: Framework,
        granule_bytes: int,
        max_padding: float,
    ) -> None:
        self._open: _native.Runtime | None = native
        self._device = device
        self._framework: Framework = framework
        self._granule_bytes, self._max_padding = granule_bytes, max_padding
        self._current_streams: FindStreams | None = (
            CurrentStreams(cuda_ordinal) if cuda_ordinal >= 0 else None
        )
        self._models = Revisions()
        self._failed_routes: set[str] = set()  # names whose failure has been logged

    def __repr__(self) -> str:
        if self._open is None:
            return f"<Runtime on {self._device}: closed>"
        try:
            now = self.snapshot()
        except WarmServeError as error:  # in a forked child
            return f"<Runtime on {self._device}: {error}>"
        parts = [
            _count(len(now.models), "model"),
            f"{format_bytes(now.bytes_in_use)} of {format_bytes(now.arena_bytes)} in use",
            _count(now.leases, "lease"),
        ]
        return f"<Runtime on {self._device}: {', '.join(parts)}>"

    @property
    def native(self) -> _native.Runtime:
        """The native runtime. Raises WarmServeError if the runtime is closed."""
        if self._open is None:
            raise WarmServeError("the runtime is closed")
        return self._open

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` has succeeded."""
        return self._open is None

    @property
    def models(self) -> tuple[Model, ...]:
        """All registered models, including every revision of a name."""
        return tuple(self._models.values())

    def model(self, model: Model | str) -> Model:
        """Return a registered model.

        Parameters
        ----------
        model : str or Model
            A full name, a bare name (for the revision that it stands for now), or the model itself.

        Raises
        ------
        ValueError
            No such model is registered.
        TypeError
            ``model`` is neither a name nor a model.
        """
        try:
            return self._models.find(model)
        except ValueError:
            self.native  # noqa: B018  raises WarmServeError if closed: close() forgets the models
            raise

    def why_not_leased(self, model: Model) -> str:
        """Return why a module bound to ``model`` cannot run now, and what to do, for the message of
        a StaleView."""
        if self._open is None:
            return f"{model.name!r} cannot be used: the runtime is closed"
        return self._models.why_not_leased(model)

    def tensors(self, model: Model | str) -> dict[str, Any]:
        """Return the tensors of a model; see :meth:`Model.tensors`."""
        return self.model(model).tensors()

    def read_back(self, model: Model | str, layer: int | str) -> npt.NDArray[np.uint8]:
        """Copy a resident layer's bytes from the device.

        Parameters
        ----------
        model : Model or str
        layer : int or str
            Index or name.

        Returns
        -------
        array of uint8, shape ``(layer.nbytes,)``

        Raises
        ------
        StaleView
            The layer is not resident.
        ValueError
            The model or the layer is unknown.
        """
        found = self.model(model)
        index = layer_index(found, layer)
        out = np.empty(found.layers[index].nbytes, np.uint8)
        self.native.read_back(found.native, index, out)
        return out

    def digest(
        self, model: Model | str, layer: int | str, *, piece: Size | None = None
    ) -> npt.NDArray[np.uint64]:
        """Compute digests of a resident layer, on the device.

        Parameters
        ----------
        model : Model or str
        layer : int or str
            Index or name.
        piece : size, optional
            The bytes that one digest covers, a multiple of 4 KiB. Default: a granule.

        Returns
        -------
        array of uint64, shape ``(pieces,)``
            Equal to :func:`kernels.granule_digest` of the layer's bytes with granules of ``piece``
            bytes. The last piece may be shorter.

        Raises
        ------
        StaleView, ValueError
            As for :meth:`read_back`; ValueError also for another ``piece``.
        WarmServeError
            No kernels are available for the device.
        """
        found = self.model(model)
        nbytes = self._granule_bytes if piece is None else parse_bytes(piece, "piece")
        if nbytes < 1 or nbytes % _PIECE_UNIT:
            raise ValueError(
                f"piece must be a positive multiple of 4 KiB, got {check.shown(piece)}"
            )
        index = layer_index(found, layer)
        return np.array(self.native.digest(found.native, index, nbytes), np.uint64)

    def device_memory(self) -> tuple[int, int]:
        """Return the device's free bytes and its total bytes; zeros if the device does not report
        them. This runtime never takes the last ``headroom`` bytes of the free memory."""
        return self.native.device_memory()

    def fileno(self) -> int:
        """Return an eventfd that becomes readable when a backing epoch changes, until it is read.

        Use it to renew CUDA graphs and registrations of memory with collectives. The runtime owns
        the descriptor: do not close it.
        """
        return self.native.fileno()

    def snapshot(self) -> Snapshot:
        """Return the state of the device and of all models now, as plain values. Wait-free."""
        now = Snapshot.of(self.native)
        for route in now.routes:
            if route.error and route.name not in self._failed_routes:
                self._failed_routes.add(route.name)
                log.warning("route %s failed and is no longer used: %s", route.name, route.error)
        return now

    def stream(self, priority: StreamPriority = "normal") -> _native.Stream:
        """Create a stream on the device.

        ``torch.cuda.ExternalStream(stream.handle)`` is the same stream for torch, as long as the
        returned object lives.

        Parameters
        ----------
        priority : "background", "normal" or "urgent"
            A hint for kernels; copies may ignore it.
        """
        return self.native.stream(
            check.choice("priority", priority, ("background", "normal", "urgent"))
        )

    def adopt_stream(self, stream: StreamLike) -> _native.Stream:
        """Return a stream of torch, CuPy or other code as a stream of this runtime.

        The methods that take a stream adopt it themselves. Use this to adopt a stream once for many
        calls. The stream's owner must keep it alive until its work that uses the arena is done.

        Raises
        ------
        TypeError
            ``stream`` is not a stream.
        ValueError
            The device accepts only its own streams, or the stream was destroyed or belongs to
            another device or to another context than the primary one.
        """
        return native_stream(self.native, stream)

    def check_invariants(self) -> None:
        """Raise WarmServeError if the runtime's state is inconsistent, naming the first fault."""
        self.native.check_invariants()


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
