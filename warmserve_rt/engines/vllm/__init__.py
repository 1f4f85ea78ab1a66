"""vLLM on weights in a runtime's memory: `--load-format warmserve`, by vLLM's plugin interface.

Importing this needs no vLLM; :func:`register` is what vLLM calls, in each of its processes.
"""

from __future__ import annotations

import logging

from .arenas import use

__all__ = ["register", "use"]

TESTED = ("0.32",)  # release series
WORKER = "warmserve_rt.engines.vllm.worker.Worker"
log = logging.getLogger(__name__)
_registered = False


def register() -> None:
    """Makes the load format and the sleep-mode backend known to vLLM; more than once is harmless.

    Warns, naming both, where vLLM is of a series with which this was not tested.
    """
    global _registered
    if _registered:
        return
    import vllm
    from vllm.device_allocator.sleep_mode_backend import SleepModeBackendFactory
    from vllm.model_executor.model_loader import register_model_loader

    warn_untested(vllm.__version__)
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
