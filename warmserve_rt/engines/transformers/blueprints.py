"""What a module of a configuration is built from, kept: a fleet has many tunings of few of them.

Most of the time that a module takes is its construction, which neither weights nor names change.
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

KEPT = 32  # configurations, those used last; each some tens of kilobytes, and what its buffers hold


@dataclass(frozen=True)
class Blueprint:
    """A module without weights; under ``targets``, the checkpoint's name of each parameter or
    buffer that is in it."""

    module: PreTrainedModel
    targets: dict[str, str]


class Blueprints:
    """Builds a module, or unpickles what was built for another of just this configuration.
    Thread-safe.

    The first of its kind is only remembered: whoever has one model pays nothing for a second.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[Any, bytes | None] = OrderedDict()

    def find(
        self,
        config: Any,
        dtype: torch.dtype,
        auto_class: Any,
        names: Iterable[str],
        build: Callable[[], Blueprint],
    ) -> Blueprint:
        """One that is the caller's alone. Raises what ``build`` raises."""
        nameless = copy.copy(config)
        nameless._name_or_path = ""
        described = _pickled(nameless)
        if described is None:
            return build()
        key = described, dtype, auto_class, tuple(names)
        with self._lock:
            known = key in self._kept
            pickled = self._kept.get(key)
        if pickled:
            made: Blueprint = pickle.loads(pickled)
            made.module.config._name_or_path = made.module.name_or_path = config._name_or_path
        else:
            made = build()
            pickled = _pickled(made) if known else None
        with self._lock:
            self._kept[key] = pickled or self._kept.get(key)
            self._kept.move_to_end(key)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return made


def _pickled(thing: object) -> bytes | None:
    try:
        return pickle.dumps(thing, pickle.HIGHEST_PROTOCOL)
    except (pickle.PicklingError, AttributeError, TypeError):
        return None  # a class or a function of it has no name: it is built each time
