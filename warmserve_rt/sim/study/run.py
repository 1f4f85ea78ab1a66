"""Run one workload on a fleet under a policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from warmserve_rt.policy.profile import ModelProfile
from warmserve_rt.sim.controllers.baselines.autoscaler import MAPPING_POLL_S, SERVER_POLL_S
from warmserve_rt.sim.controllers.policies import find_policy
from warmserve_rt.sim.core.devices import Hardware
from warmserve_rt.sim.core.fleet import Fleet
from warmserve_rt.sim.workload.workloads import Workload

UNLIMITED = 1e15  # bytes


def simulate(
    policy: str,
    workload: Workload,
    hardware: Hardware,
    *,
    switch_s: float = 0.01,
    engine_start_s: float = 5.0,
    policy_options: Mapping[str, Any] = MappingProxyType({}),
    observers: Sequence[Callable[[Fleet], None]] = (),
) -> Fleet:
    """Serve a workload, and return the fleet afterwards.

    Parameters
    ----------
    policy
        The name of the policy.
    workload
        The models and their requests.
    hardware
        The hardware of the fleet.
    switch_s
        See Fleet.
    engine_start_s
        Seconds of an engine start, for policies whose starts wait for an engine.
    policy_options
        Options of the policy's controller, such as the objective of our scheduler.
    observers
        Called with the fleet before it runs; they may schedule timers on it.

    Raises
    ------
    ValueError
        If the policy is unknown, or as ``check`` does.
    TypeError
        If the policy does not have one of the options.
    RuntimeError
        If requests that were not refused are never served.
    """
    chosen = find_policy(policy)
    check(workload.models, hardware)
    if chosen.unlimited_memory:
        hardware = replace(hardware, memory=UNLIMITED)
    if not chosen.multipath:
        hardware = replace(hardware, multipath=1)
    fleet = Fleet(
        workload,
        hardware,
        chosen.make(**policy_options),
        switch_s=switch_s,
        engine_start_s=engine_start_s if chosen.engine_start else 0.0,
        streaming=chosen.streaming,
        elastic_kv=chosen.elastic_kv,
        partitioned=chosen.partitioned,
        server_poll_s=SERVER_POLL_S if chosen.polls else 0.0,
        mapping_poll_s=MAPPING_POLL_S if chosen.polls else 0.0,
    )
    for observer in observers:
        observer(fleet)
    fleet.run()
    return fleet


def check(models: Sequence[ModelProfile], hardware: Hardware) -> None:
    """Raise ValueError if a model fits on no group of devices.

    Parameters
    ----------
    models
        The profiles of the models.
    hardware
        The devices.
    """
    for profile in models:
        if profile.width > hardware.node_devices:
            raise ValueError(
                f"{profile.name} needs {profile.width} devices of one node, which has "
                f"{hardware.node_devices}"
            )
        if profile.nbytes > hardware.memory:
            raise ValueError(
                f"{profile.name} is larger than every device: {profile.nbytes / 1e9:.1f} GB on "
                f"each of {profile.width}, which have {hardware.memory / 1e9:.1f} GB"
            )
