"""Operations that load layers: prewarm and swap, and the steps of a runtime without threads."""

from __future__ import annotations

import math
from typing import Literal

from warmserve_rt import _arguments as check
from warmserve_rt._log import debug

from .inspecting import Inspecting
from .model import Model
from .selection import Layers, layer_indices
from .ticket import Ticket

BACKGROUND, FOREGROUND = 0, 100


class Loading(Inspecting):
    """The part of :class:`Runtime` that loads layers."""

    def prewarm(
        self,
        model: Model | str,
        *,
        layers: Layers | None = None,
        priority: int = BACKGROUND,
        deadline: float | None = None,
        evict_below: float = math.inf,
        to: Literal["device", "host"] = "device",
    ) -> Ticket:
        """Start loading the layers that are not resident, in execution order.

        Returns at once. Layers without leases are evicted as room is needed.

        Parameters
        ----------
        model : Model or str
        layers : int, slice, or indices and names, optional
            The layers to load; ``4`` means the first four. Default: all.
        priority : int
            Loads of higher priority run first, and among equals those with the earlier deadline.
        deadline : float, optional
            Seconds from now. Layers that have not arrived by then are cancelled, and the ticket
            raises TimeoutError. Default: none.
        evict_below : float
            Only layers of a lower keep value are evicted for this load. Default: any layer.
        to : "device" or "host"
            "host" loads the layers to the host cache only. A later load to the device then reads
            no file. Layers of a lower or equal keep value leave the cache to make room. If they
            are too few, the ticket raises Busy.

        Returns
        -------
        Ticket
            Its ``wait(timeout)`` raises the error of a failed load, ``wait(layer=index)`` waits for
            one layer, and ``cancel()`` keeps the layers that have arrived.

        Raises
        ------
        OutOfDeviceMemory
            The layers can never fit.
        Busy
            The layers do not fit beside those that are leased. With ``evict_below``: they do not
            fit beside those that are leased, being loaded, or of this keep value or more.
        ValueError
            A layer is unknown or repeated, no layer is named, the deadline has passed,
            ``evict_below`` is not a number, or is given together with ``to="host"``. The runtime
            has no host cache, or the layers exceed it.

        Guarantee: per layer (every layer keeps a defined state, and calling again continues from
        there).
        """
        if deadline is not None and not (deadline := check.seconds("deadline", deadline)):
            raise ValueError("deadline must be more than 0 seconds from now, got 0")
        found = self.model(model)
        chosen, level = layer_indices(found, layers), _priority(priority)
        below = check.number("evict_below", evict_below, finite=False)
        if check.choice("to", to, ("device", "host")) == "host":
            if below != math.inf:
                raise ValueError('evict_below must not be given for to="host"')
            native = self.native.prewarm_host(found.native, chosen, level, deadline)
        else:
            native = self.native.prewarm(found.native, chosen, level, deadline, below)
        ticket = Ticket(native, found)
        debug("%s", ticket)
        return ticket

    def swap(self, *, evict: Model | str, load: Model | str, priority: int = FOREGROUND) -> Ticket:
        """Load one model into the granules of another, without creating granules.

        Parameters
        ----------
        evict : Model or str
            The model to evict. It is absent when the ticket is done.
        load : Model or str
        priority : int
            As for :meth:`prewarm`.

        Returns
        -------
        Ticket

        Raises
        ------
        Busy
            ``evict`` is leased, or as for :meth:`prewarm`.
        OutOfDeviceMemory, ValueError
            As for :meth:`prewarm`.
        """
        out, found = self.model(evict), self.model(load)
        ticket = Ticket(self.native.swap(out.native, found.native, _priority(priority)), found)
        debug("%s", ticket)
        return ticket

    def step(self) -> bool:
        """Load one chunk of a runtime with ``pump=True``, or do one step of making room for it.

        Returns False if nothing can be done now. Raises ValueError for a runtime without ``pump``.
        """
        return self.native.step()


def _priority(priority: int) -> int:
    return check.integer("priority", priority, check.INT32_MIN, check.INT32_MAX)
