"""Find the copies that a fleet holds, and make it hold those of a plan."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from warmserve_rt.policy._arrays import F64
from warmserve_rt.policy.curve import ValueCurve
from warmserve_rt.policy.improve import Copy, Curves

from .protocols import Fleet, KeepValues


def held_copies(fleet: Fleet, curves: Curves) -> tuple[list[Copy], F64]:
    """Return the complete groups that hold layers of a model, and the bytes that are free on each
    device.

    A copy that an active instance uses is fixed, because another start cannot use it.

    Parameters
    ----------
    fleet
        The fleet to look at.
    curves
        The value curves of its models, which tell the bytes of layers.
    """
    devices, node = fleet.devices, fleet.node_devices
    free = np.array([device.room for device in devices], np.float64)
    found: list[Copy] = []
    for first, device in enumerate(devices):
        for (model, rank), shard in device.shards.items():
            if rank:
                continue
            width = fleet.profiles[model].width
            if first % width or first % node + width > node:
                continue
            layers = shard.goal
            for r in range(1, width):
                other = devices[first + r].shards.get((model, r))
                layers = min(layers, other.goal) if other else 0
            if not layers:
                continue
            active = device.occupants.get((model, first))
            if not active:
                free[first : first + width] -= curves.nbytes(model, layers)
            fixed = active is not None or shard.pinned
            found.append(Copy(model, first, layers, fixed=fixed))
    return found, free


def carry_out(
    fleet: Fleet, held: Sequence[Copy], need: F64, densities: Sequence[KeepValues]
) -> None:
    """Set the keep values of resident layers, cancel loads that are no longer wanted, and load
    missing layers.

    Parameters
    ----------
    fleet
        The fleet that carries out the plan.
    held
        The copies of the plan.
    need
        The need of each model, as :meth:`Demand.need` returns it.
    densities
        The :func:`densities` of each model.
    """
    wanted: dict[tuple[int, int, int], tuple[int, KeepValues]] = {}
    for copy in held:
        weight = float(need[copy.model]) * copy.use
        values = [(end, weight * density) for end, density in densities[copy.model]]
        for rank in range(fleet.profiles[copy.model].width):
            wanted[copy.first + rank, copy.model, rank] = (copy.layers, values)
    for device in fleet.devices:
        for (model, rank), shard in list(device.shards.items()):
            layers, values = wanted.get((device.index, model, rank), (0, []))
            device.set_keep_values(model, rank, layers, values)
            if not shard.pinned and shard.goal > max(layers, shard.layers):
                device.cancel(model, rank, max(layers, shard.layers))
    for (index, model, rank), (layers, values) in wanted.items():
        device = fleet.devices[index]
        held_now = device.shards.get((model, rank))
        if held_now is None or held_now.goal < layers:
            device.load(model, rank, layers, values)


def densities(curve: ValueCurve) -> KeepValues:
    """Return, for each segment of a curve's hull, the byte where it ends and the seconds saved per
    byte."""
    knots = curve.knots
    return [
        (float(curve.cumulative[end]), float(curve.density[end - 1])) for end in knots[1:].tolist()
    ]
