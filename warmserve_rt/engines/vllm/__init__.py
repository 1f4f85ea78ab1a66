"""Runs vLLM on weights in a runtime's memory: `--load-format warmserve`, by its plugin interface.

Importing this needs neither vLLM nor torch. vLLM calls :func:`register` in each of its processes.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from . import processes

if TYPE_CHECKING:
    from warmserve_rt.core.runtime import Runtime

__all__ = ["register", "use"]

TESTED = ("0.32",)  # release series
WORKER = "warmserve_rt.engines.vllm.worker.Worker"
log = logging.getLogger(__name__)
_registered = False


def use(runtime: Runtime, device: str = "host") -> None:
    """Makes a runtime the arena of this process's engines on ``device``.

    Engines in other processes cannot use it: they refuse to start, and this warns if vLLM would
    start them so. Raises TypeError for anything but a Runtime, ValueError if the process has an
    arena on ``device`` already, WarmServeError if the runtime is closed.
    """
    from . import arenas

    arenas.use(runtime, device)


def register() -> None:
    """Makes the load format and the sleep-mode backend known to vLLM; repeating it is harmless.

    Warns if vLLM is of a series with which this was not tested, naming both.
    """
    global _registered
    if _registered:
        return
    import vllm
    from vllm.device_allocator.sleep_mode_backend import SleepModeBackendFactory
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.platforms import current_platform

    processes.forget_strangers()
    warn_untested(vllm.__version__)
    warn_of_sleep_mode(sys.argv, on_cpu=current_platform.is_cpu())
    from .loader import ArenaLoader

    register_model_loader("warmserve")(ArenaLoader)
    SleepModeBackendFactory.register_backend(
        "warmserve", "warmserve_rt.engines.vllm.sleep", "ArenaBackend"
    )
    _registered = True


def warn_untested(version: str) -> None:
    if version.removeprefix("v").split("+")[0].rsplit(".", 1)[0] not in TESTED:
        log.warning(
            "vLLM %s: warmserve_rt was tested with vLLM %s; what the load format 'warmserve' "
            "replaces may work otherwise there",
            version,
            ", ".join(f"{series}.*" for series in TESTED),
        )


def warn_of_sleep_mode(arguments: list[str], *, on_cpu: bool) -> None:
    """Explains vLLM's refusal of an option in the command line."""
    if on_cpu and "--enable-sleep-mode" in arguments:
        log.warning(
            'vLLM refuses --enable-sleep-mode on a CPU ("Sleep mode is not supported on current '
            'platform"): leave it out; with --worker-cls %s engines sleep and wake without it',
            WORKER,
        )
