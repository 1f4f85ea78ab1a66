"""A vLLM plugin that runs engines on weights in a runtime's memory (`--load-format warmserve`).

Importing this package needs neither vLLM nor torch. vLLM calls :func:`register` in each of its
processes.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from . import processes

if TYPE_CHECKING:
    from warmserve_rt.core.runtime import Runtime

__all__ = ["register", "use"]

TESTED = ("0.32",)  # release series of vLLM
WORKER = "warmserve_rt.engines.vllm.worker.Worker"
log = logging.getLogger(__name__)
_registered = False


def use(runtime: Runtime, device: str = "host") -> None:
    """Make a runtime the arena of this process's engines on ``device``.

    Engines in other processes cannot use the runtime and refuse to start. This function logs a
    warning if vLLM would start engines in other processes.

    Parameters
    ----------
    runtime : Runtime
        An open runtime.
    device : "host" or "cuda:N"
        The device whose engines use the runtime.

    Raises
    ------
    TypeError
        ``runtime`` is not a Runtime.
    ValueError
        The process already has an arena on ``device``.
    WarmServeError
        The runtime is closed.
    """
    from . import arenas

    arenas.use(runtime, device)


def register() -> None:
    """Register the load format and the sleep-mode backend with vLLM. Idempotent.

    Logs a warning that names both versions if this package was not tested with the installed
    release series of vLLM.
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
            "vLLM %s: warmserve_rt was tested with vLLM %s only; the parts that the load format "
            "'warmserve' replaces may differ in this version",
            version,
            ", ".join(f"{series}.*" for series in TESTED),
        )


def warn_of_sleep_mode(arguments: list[str], *, on_cpu: bool) -> None:
    """Log why vLLM refuses ``--enable-sleep-mode`` on a CPU, and the alternative."""
    if on_cpu and "--enable-sleep-mode" in arguments:
        log.warning(
            'vLLM refuses --enable-sleep-mode on a CPU ("Sleep mode is not supported on current '
            'platform"): remove the option; with --worker-cls %s engines sleep and wake without it',
            WORKER,
        )
