"""A cache of built modules by configuration: a fleet has many fine-tunes of few architectures.

Construction takes most of the time of making a module, and depends on neither weights nor names.
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

KEPT = 32  # most recently used configurations; each takes tens of kilobytes plus its buffers


@dataclass(frozen=True)
class Blueprint:
    """A module without weights. ``targets`` maps the name of each parameter or buffer that the
    checkpoint has to its name in the checkpoint."""

    module: PreTrainedModel
    targets: dict[str, str]


class Blueprints:
    """Builds modules, or unpickles a module that was built for the same configuration. Thread-safe.

    The first module of a configuration is not pickled, only noted, so that a process with one model
    pays nothing. The second is built and pickled; later ones are unpickled.
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
        """Return a blueprint that no other caller shares.

        Parameters
        ----------
        config, dtype, auto_class, names
            Everything that the blueprint depends on: configuration (without its path), dtype, class
            and the checkpoint's tensor names.
        build : callable
            Builds the blueprint if none is cached. Its exceptions pass through.
        """
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
        return None  # it contains a local class or function, so it is built each time
