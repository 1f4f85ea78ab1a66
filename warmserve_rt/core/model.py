"""A registered model: its layout and its tensors."""

from __future__ import annotations

from typing import Any

from warmserve_rt import _native
from warmserve_rt._units import format_bytes
from warmserve_rt.checkpoint.layout import LayerSpec, Layout

from .registration import Origin
from .views import Framework, make_tensors


class Model:
    """A registered model: its layout and its addresses in the arena.

    Made by :meth:`Runtime.register`.
    """

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
