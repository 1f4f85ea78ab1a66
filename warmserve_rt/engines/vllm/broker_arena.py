"""The arena of a broker, in which engines of several processes have weights."""

from __future__ import annotations

import logging
from pathlib import Path

from warmserve_rt._errors import Busy
from warmserve_rt.core.model import Model
from warmserve_rt.core.runtime import Runtime

from .weights import Arena

log = logging.getLogger(__name__)


class BrokerArena(Arena):
    """This process's part in the arena of the broker that listens at ``socket``. Thread-safe.

    It ends with the last engine of the process that uses it. The weights stay in the broker's
    arena, where the next engine finds them.
    """

    def __init__(self, socket: Path) -> None:
        super().__init__(Runtime("host", broker=socket, name="vLLM worker", tensors="torch"))

    def unmapped(self, mapped: int) -> int:
        return 0  # the rest belongs to the broker's process

    def _evict(self, model: Model) -> None:
        """Evict a model from the broker's arena, unless a step of another process uses it.

        Raises Busy if this process uses it.
        """
        try:
            super()._evict(model)
        except Busy as error:
            layers = self.runtime.snapshot().models[model.name].layers
            if any(layer.residency != "absent" for layer in layers):
                raise
            log.info("%s stays in the broker's arena: %s", model.name, error)

    def _after_leaving(self) -> None:
        if not self.runtime.models:
            self.runtime.close()
