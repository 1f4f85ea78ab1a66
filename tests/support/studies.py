"""A small study, and two of its policies, chosen by their properties."""

from __future__ import annotations

from warmserve_rt.sim.controllers.policies import POLICIES
from warmserve_rt.sim.core.devices import Hardware
from warmserve_rt.sim.study.study import Study

SMALL = Study(
    workload="power-law",
    hardware=Hardware(devices=4, node_devices=4),
    models=4,
    rate=0.5,
    rates=(0.25, 0.5),
    seeds=2,
    minutes=2.0,
    engine_starts_s=(0.0, 2.0),
)
BASELINE = next(name for name, policy in POLICIES.items() if policy.engine_start)
WARM = next(n for n, p in POLICIES.items() if not p.engine_start and not p.unlimited_memory)
