"""A lower bound on late starts for any static choice of resident layers."""

from __future__ import annotations

import numpy as np

from warmserve_rt.policy.curve import ValueCurve
from warmserve_rt.policy.pipeline import first_token_by_prefix
from warmserve_rt.sim.core.devices import Hardware
from warmserve_rt.sim.study.metrics import Slo
from warmserve_rt.sim.workload.workloads import Workload

from .residency import Catalogue, Problem, plan

SWITCH_S = 0.01  # seconds of a start besides loading and computing; the same as in `simulate`


def late_at_least(workload: Workload, hardware: Hardware, slo: Slo) -> float:
    """Return a lower bound on the share of late starts for any static choice of resident layers.

    The bound treats each request as an isolated start, alone on its devices. The linear bound of
    the plan holds for every choice, even one that knows in advance how often each model will be
    requested and with which prompts.

    Parameters
    ----------
    workload : Workload
        The requests.
    hardware : Hardware
        The devices and the bandwidth of their links.
    slo : Slo
        The time budget of a first token.
    """
    curves, need, anyway = [], np.zeros(len(workload.models)), 0.0
    for model, profile in enumerate(workload.models):
        prompts = workload.prompt[workload.model == model]
        need[model] = len(prompts) / len(workload.prompt)
        nbytes = np.array(profile.layer_bytes)
        in_time = np.zeros(len(nbytes) + 1)
        for prompt in prompts.tolist():
            prefill = profile.prefill(prompt)
            times = first_token_by_prefix(nbytes / hardware.bandwidth, profile.compute(prefill))
            in_time += (times + SWITCH_S <= slo.budget(prefill)) / len(prompts)
        anyway += need[model] * in_time[0]
        curves.append(ValueCurve(profile.name, profile.width, nbytes, in_time - in_time[0]))
    problem = Problem(
        Catalogue.of(curves),
        np.arange(len(curves)),
        need,
        np.full(hardware.devices, int(hardware.memory)),
        hardware.node_devices,
    )
    return max(float(1 - anyway - plan(problem, tries=1).bound), 0.0)
