"""The requests of a run as lists, which are faster to index than the arrays of a workload."""

from __future__ import annotations

from dataclasses import dataclass

from warmserve_rt.sim.workload.requests import Workload


@dataclass(frozen=True, slots=True)
class Requests:
    """The requests of a run, in order of time.

    ``time``: seconds. ``model``: the index of the model. ``prompt`` and ``output``: tokens.
    ``tokens``: prompt and output together.
    """

    time: list[float]
    model: list[int]
    prompt: list[int]
    output: list[int]
    tokens: list[int]

    @classmethod
    def of(cls, workload: Workload) -> Requests:
        """Return the requests of a workload."""
        return cls(
            time=workload.time.tolist(),
            model=workload.model.tolist(),
            prompt=workload.prompt.tolist(),
            output=workload.output.tolist(),
            tokens=(workload.prompt + workload.output).tolist(),
        )
