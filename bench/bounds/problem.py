"""The input of the residency planner: models, replicas, devices."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from warmserve_rt.policy._arrays import F64, I64
from warmserve_rt.policy.curve import ValueCurve

from .items import Segments


@dataclass(frozen=True, eq=False)
class Catalogue:
    """The value curves of all models, as arrays. :meth:`of` makes it once for many plans.

    The points of model m, one for each number of layers from 0 on, are ``begin[m]:begin[m+1]`` of
    ``cum`` (bytes on each device) and ``value``. ``kind[m]`` is the index of ``width[m]`` in
    ``widths``, the distinct widths in rising order, which begin with 1.
    """

    curves: tuple[ValueCurve, ...]
    begin: I64
    cum: I64
    value: F64
    width: I64
    widths: I64
    kind: I64
    segments: Segments

    @classmethod
    def of(cls, curves: Iterable[ValueCurve]) -> Catalogue:
        """Return the catalogue of these curves. Raise ValueError if there are no curves."""
        curves = tuple(curves)
        if not curves:
            raise ValueError("a catalogue must have at least one model")
        width = np.array([curve.width for curve in curves], dtype=np.int64)
        widths = np.unique(np.append(width, 1))
        sizes = [len(curve.value) for curve in curves]
        begin = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))
        cum = np.concatenate([curve.cumulative for curve in curves])
        value = np.concatenate([curve.value for curve in curves])
        segments = Segments.of(begin, cum, value, width, np.full(len(curves), np.inf))
        kind = np.searchsorted(widths, width)
        return cls(curves, begin, cum, value, width, widths, kind, segments)


@dataclass(frozen=True, eq=False)
class Problem:
    """Replicas [n] that could be held, and devices [D] that could hold them.

    Parameters
    ----------
    catalogue
        The value curves of the models.
    model
        The index of each replica's model in the catalogue [n].
    need
        The starts before the next plan that each replica is expected to serve [n].
    capacity
        Bytes of each device for prewarming [D].
    node_devices
        The number of devices of a node. A group of w devices lies within one node, aligned to
        multiples of w from its start.
    home
        The first device of the group that holds layers of the replica now, or -1 [n].
    held
        The number of leading layers that this group holds [n].
    availability
        A preference, 0 to 1, for devices on which the next start can happen [D]. It decides between
        groups with room and is no part of the objective.
    margin
        The share by which layers that are held already count as worth more, because loading costs
        bandwidth.

    Raises
    ------
    ValueError
        If shapes, types or ranges do not fit each other.
    """

    catalogue: Catalogue
    model: I64
    need: F64
    capacity: I64
    node_devices: int
    home: I64 | None = None
    held: I64 | None = None
    availability: F64 | None = None
    margin: float = 0.1

    def __post_init__(self) -> None:
        models, n, devices = self.catalogue, len(self.model), len(self.capacity)
        _whole("model", self.model, n, 0, len(models.width) - 1)
        if (
            self.need.shape != (n,)
            or self.need.dtype != np.float64
            or not ((self.need >= 0) & (self.need < np.inf)).all()
        ):
            raise ValueError(
                "need: must be float64, finite and not negative, one entry for each replica"
            )
        _whole("capacity", self.capacity, devices, 0, 2**62)
        if self.node_devices < 1 or not devices:
            raise ValueError(
                f"capacity and nodes need devices, got {devices} in nodes of {self.node_devices}"
            )
        if not 0 <= self.margin < np.inf:
            raise ValueError(f"margin must be finite and not negative, got {self.margin}")
        share = self.availability
        if share is not None and (
            share.shape != (devices,) or not ((share >= 0) & (share <= 1)).all()
        ):
            raise ValueError("availability: must be in [0, 1], one entry for each device")
        if self.catalogue.widths[-1] > self.node_devices:
            wide = int(np.argmax(models.width))
            raise ValueError(
                f"{self.catalogue.curves[wide].name} needs {models.width[wide]} devices of one "
                f"node, and a node has {self.node_devices}"
            )
        if (self.home is None) != (self.held is None):
            raise ValueError("home and held: give both or neither")
        if self.home is not None and self.held is not None:
            _whole("home", self.home, n, -1, devices - 1)
            _whole("held", self.held, n, 0, None)
            width, inside = models.width[self.model], self.home % self.node_devices
            group = (inside % width == 0) & (inside + width <= self.node_devices)
            off = (self.home >= 0) & ~(group & (self.home + width <= devices))
            if off.any():
                row = int(np.argmax(off))
                raise ValueError(
                    f"replica {row} of {self.catalogue.curves[self.model[row]].name}: device "
                    f"{self.home[row]} is not the first of a group of {width[row]}"
                )


def _whole(name: str, array: npt.NDArray[np.int64], n: int, least: int, most: int | None) -> None:
    if array.shape != (n,) or array.dtype != np.int64:
        raise ValueError(f"{name}: must be {n} of int64, got {array.shape} of {array.dtype}")
    if n and (array.min() < least or (most is not None and array.max() > most)):
        accepted = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name}: must be {accepted}, got {array.min()} to {array.max()}")
