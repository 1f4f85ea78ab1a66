"""What `model_loader_extra_config` may say to the loader."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Options:
    """``device``: of the runtime, by default the one on which vLLM computes. ``arena``: bytes, or
    "4GiB", of the process's arena on it, which the first engine makes; by default as much as that
    engine's model. ``gated``: the engine starts before its weights are there, and each block of the
    first step waits for its own; needs ``enforce_eager``. ``cache``: the folder of processed
    weights, by default in the user's cache."""

    device: str | None = None
    arena: int | str | None = None
    gated: bool = False
    cache: str | None = None

    @classmethod
    def parse(cls, given: Mapping[str, Any] | None) -> Options:
        """Raises ValueError, which says what there is, for anything else."""
        given = dict(given or {})
        known = {field.name: field.type for field in fields(cls)}
        if unknown := sorted(given.keys() - known.keys()):
            raise ValueError(
                f"load format warmserve knows no {', '.join(map(repr, unknown))}: choose from "
                f"{', '.join(known)}"
            )
        for name, kind in known.items():
            allowed = {"bool": (bool,), "int | str | None": (int, str, type(None))}.get(
                str(kind), (str, type(None))
            )
            value = given.get(name, getattr(cls, name))
            if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
                raise ValueError(f"load format warmserve: {name} is {kind}, not {value!r}")
        return cls(**given)
