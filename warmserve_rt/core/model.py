"""A registered model: its layout and its tensors."""

from __future__ import annotations

from typing import Any

from warmserve_rt import _arguments as check
from warmserve_rt import _native
from warmserve_rt._units import format_bytes
from warmserve_rt.checkpoint.layout import LayerSpec, Layout

from .registration import Origin
from .selection import layer_index
from .streams import StreamLike, native_stream
from .views import Framework, make_tensors, native_bytes


class Model:
    """A registered model: its layout and its addresses in the arena.

    Made by :meth:`Runtime.register`.
    """

    def __init__(
        self,
        native: _native.Model,
        runtime: _native.Runtime,
        layout: Layout,
        framework: Framework,
        origin: Origin,
        *,
        granule_bytes: int,
    ) -> None:
        self.native = native
        self._runtime = runtime
        self.layout = layout
        self.origin = origin
        self.granule_bytes = granule_bytes  # of the arena; each layer takes whole granules
        self._framework = framework
        self._tensors: dict[Framework, dict[str, Any]] = {}

    def __repr__(self) -> str:
        return f"<Model {self.name!r}: {len(self.layout)} layers, {format_bytes(self.nbytes)}>"

    @property
    def name(self) -> str:
        """The full name, "chat" or "chat@2"."""
        return self.native.name

    @property
    def revision(self) -> str | None:
        """The part of the name after the "@", None if it has none."""
        return self.name.partition("@")[2] or None

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The layers, in execution order."""
        return self.layout.layers

    @property
    def nbytes(self) -> int:
        """Bytes of all layers, without the unused rest of each layer's last granule."""
        return self.layout.nbytes

    @property
    def leased(self) -> bool:
        """Whether every layer is leased and resident now."""
        return self.native.leased[0]

    @property
    def lease_epoch(self) -> int:
        """A number that changes whenever a lease on the model begins or ends; 0 while no lease is
        on the model. Wait-free."""
        return self.native.leased[1]

    @property
    def backing_epoch(self) -> int:
        """A number that changes whenever the granules behind the model's addresses change.
        Lock-free."""
        return self.native.backing_epoch

    def tensors(self, framework: Framework | None = None) -> dict[str, Any]:
        """Return views of all tensors by name, at addresses that never change. Loads nothing.

        Meant for binding a module once. The views are unchecked: reading one outside of a lease
        faults if its layer is not resident. (``print(module)`` of a torch module prints no values,
        but printing a tensor reads it.)

        Parameters
        ----------
        framework : "torch", "numpy", "cupy" or "dlpack", optional
            Default: the runtime's framework.

        Raises
        ------
        ValueError
            The framework is unknown or cannot see the device's memory.
        """
        framework = framework or self._framework
        if framework not in self._tensors:
            self._tensors[framework] = make_tensors(self.native, self.layout, framework)
        return self._tensors[framework]

    def layer_bytes(
        self, layer: int | str, first: int = 0, last: int | None = None
    ) -> _native.View:
        """Return a DLPack producer of the layer's bytes ``[first, last)``, as uint8. Loads nothing.

        Like the tensors, the view is unchecked. It has ``address`` and ``nbytes``, and
        :meth:`Stream.copy_from` copies from it.

        Parameters
        ----------
        layer : int or str
            Index or name.
        first, last : int
            Default: all bytes of the layer.

        Raises
        ------
        ValueError
            The model has no such layer, or the bytes are not all in it.
        """
        index = layer_index(self, layer)
        nbytes = self.layers[index].nbytes
        last = nbytes if last is None else last
        if not 0 <= first <= last <= nbytes:
            raise ValueError(
                f"bytes of layer {layer!r} must be in [0, {nbytes}), got [{first}, {last})"
            )
        return native_bytes(self.native, index, first, last)

    def wait(
        self, layer: int | str, stream: StreamLike | None = None, *, timeout: float | None = None
    ) -> bool:
        """Wait until one layer may be used, whatever leases hold it.

        For code that computes with a model under the leases of its callers. The holder of a lease
        calls :meth:`Lease.wait`.

        Parameters
        ----------
        layer : int or str
            Index or name.
        stream : stream, optional
            As for :meth:`Lease.wait`: the stream waits instead of the thread.
        timeout : float, optional
            Seconds. Default: no limit.

        Returns
        -------
        bool
            Whether the layer is resident. No further wait is needed then, while it is leased.

        Raises
        ------
        StaleView
            No lease holds the layer.
        TimeoutError
            The layer did not arrive in time.

        Errors of loading are raised too.
        """
        behind = None if stream is None else native_stream(self._runtime, stream)
        return self.native.wait(layer_index(self, layer), behind, check.timeout(timeout))

    def record(self, stream: StreamLike) -> None:
        """Record that the stream's work so far uses the layers that leases hold.

        No such layer is unmapped before that work completes, even after the leases have ended.
        """
        self.native.record(native_stream(self._runtime, stream))

    def begin_pass(self) -> _native.Pass | None:
        """Begin a computation of this thread on the layers that leases hold now.

        The pass holds these layers until its ``release()``, even if the leases end before. A thread
        may begin a pass inside its pass: the pass ends with the outermost release. Wait-free.

        Returns
        -------
        native pass or None
            None: no lease holds a layer of the model.
        """
        return self.native.begin_pass()
