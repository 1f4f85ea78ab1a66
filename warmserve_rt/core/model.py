"""A registered model as Python sees it."""

from __future__ import annotations

from typing import Any

from warmserve_rt import _native
from warmserve_rt._units import format_bytes
from warmserve_rt.checkpoint.layout import LayerSpec, Layout

from .registration import Origin
from .views import Framework, make_tensors


class Model:
    """A registered model: its layout, and its addresses in the arena. Made by
    :meth:`Runtime.register`."""

    def __init__(
        self, native: _native.Model, layout: Layout, framework: Framework, origin: Origin
    ) -> None:
        self.native = native
        self.layout = layout
        self.origin = origin
        self._framework = framework
        self._tensors: dict[Framework, dict[str, Any]] = {}

    def __repr__(self) -> str:
        return f"<Model {self.name!r}: {len(self.layout)} layers, {format_bytes(self.nbytes)}>"

    @property
    def name(self) -> str:
        """The full one, "chat" or "chat@2"."""
        return self.native.name

    @property
    def revision(self) -> str | None:
        """What stands after the "@" of its name."""
        return self.name.partition("@")[2] or None

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """In execution order."""
        return self.layout.layers

    @property
    def nbytes(self) -> int:
        """Bytes of all layers, without what the last granule of each leaves over."""
        return self.layout.nbytes

    @property
    def leased(self) -> bool:
        """Whether leases hold every layer of it now, and all are resident."""
        return self.native.leased[0]

    @property
    def backing_epoch(self) -> int:
        """Changes whenever the granules behind the model's addresses do. Lock-free."""
        return self.native.backing_epoch

    def tensors(self, framework: Framework | None = None) -> dict[str, Any]:
        """Unchecked views of all tensors, at addresses that never change; loads nothing.

        Of the runtime's framework ("torch", ...), or of another, as in ``Runtime(tensors=...)``.
        Raises ValueError for one that there is not, or that cannot see the device.

        For binding a module once. Reading one outside of a lease is a fault when its layer is not
        resident (``print(module)`` of a torch module prints no values, but printing a tensor reads
        it).
        """
        framework = framework or self._framework
        if framework not in self._tensors:
            self._tensors[framework] = make_tensors(self.native, self.layout, framework)
        return self._tensors[framework]
