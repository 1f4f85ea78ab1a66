"""vLLM's model loader for the load format "warmserve"."""

from __future__ import annotations

import copy
import dataclasses
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import (
    initialize_model,
    process_weights_after_loading,
)
from vllm.model_executor.utils import weights_already_processed
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.utils.torch_utils import set_default_torch_dtype

from warmserve_rt._errors import CorruptCheckpoint
from warmserve_rt.engines.torch.gates import guard
from warmserve_rt.engines.torch.state import (
    LayoutDiffers,
    State,
    bind_parameters,
    bind_private,
    export,
    refuse_meta,
)

from . import WORKER, arenas
from .building import process_again, refuse_unsupported, undone_on_error
from .cache import Cache, Entry, discard
from .cache_folder import bytes_of_limit, root_of
from .key import key_of
from .options import Options
from .weights import Arena, Weights

log = logging.getLogger(__name__)


class ArenaLoader(BaseModelLoader):  # type: ignore[misc]
    """Builds a model on the meta device and makes views of the process's arena its parameters.

    The arena has the weights in the form that vLLM computes with, after its default loader and its
    processing. The first start of a model writes them to the cache in this form. On a CPU, vLLM
    normally packs weights into private copies; this loader prevents that.
    """

    def __init__(self, load_config: Any) -> None:
        super().__init__(load_config)
        self.options = Options.parse(load_config.model_loader_extra_config)

    def download_model(self, model_config: Any) -> None:
        self._default().download_model(model_config)

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        raise NotImplementedError(
            "load format warmserve: weights in an arena are read-only; load the other model in an "
            "engine of its own"
        )

    def get_external_weight_memory(self, vllm_config: Any) -> int:
        """Return the bytes of the arena, which vLLM must not count as its own memory.

        Returns 0 if the arena is to be as large as its first model, because it does not exist yet.
        vLLM then counts it as that model's weights. Returns 0 with a broker, whose arena belongs to
        another process.
        """
        if self.options.socket is not None:
            return 0
        arena = arenas.obtain(self._device(vllm_config), self.options.arena)
        return 0 if arena is None else arena.nbytes

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
        """Return the model, bound to weights in the arena.

        All weights are resident unless ``gated``. The model's ``warmserve_weights`` is their
        :class:`.weights.Weights`.

        Raises
        ------
        ValueError
            The model or an option is not supported; the message names it.
        OutOfDeviceMemory
            The arena has too little room.
        OSError
            The cache cannot be used.
        """
        leasing = has_leasing_worker(vllm_config)
        self._refuse_combinations(vllm_config, leasing)
        self._arena(vllm_config)  # may raise, so before costly processing
        root = root_of(self.options.cache)
        cache = Cache(root, bytes_of_limit(self.options.cache_limit, root))
        key = key_of(vllm_config, model_config)
        rebuilt = False
        while True:
            entry = cache.find(key)
            if entry is None:
                rebuilt = True
                entry = cache.write(key, self._processed(vllm_config, model_config, prefix))
            try:
                with undone_on_error(vllm_config):
                    return self._bound(vllm_config, model_config, prefix, entry, leasing)
            except FileNotFoundError:  # another process has replaced the entry
                continue
            except (CorruptCheckpoint, LayoutDiffers) as error:
                if rebuilt:
                    raise
                discard(entry, error)

    def _bound(
        self, vllm_config: Any, model_config: Any, prefix: str, entry: Entry, leasing: bool
    ) -> nn.Module:
        def bring_in() -> Weights:
            arena = self._arena(vllm_config, entry)
            assert arena is not None
            weights = arena.add(entry, kept=not leasing)
            weights.prewarm()
            return weights

        # A second thread makes the arena and starts loading while this one builds the module, which
        # needs neither.
        with ThreadPoolExecutor(1) as beside, ExitStack() as undo:
            coming = beside.submit(bring_in)
            undo.callback(_close, coming)
            model = self._built(vllm_config, model_config, prefix, entry.state)
            weights = coming.result()
            self._give(model, weights, vllm_config, model_config, entry.state)
            if not leasing:
                log.warning(
                    "load format warmserve: %s stays in the arena until its engine ends, because "
                    "the engine's worker takes no leases: pass worker_cls=%r",
                    weights.model.name,
                    WORKER,
                )
                weights.hold()
            if not leasing or not self.options.gated:
                weights.verify()
            guard(model, weights.runtime, weights.model)
            if self.options.gated:
                wait_for_the_rest(model, weights)
            undo.pop_all()
        model.warmserve_weights = weights  # type: ignore[assignment]
        return model

    def _built(self, vllm_config: Any, model_config: Any, prefix: str, state: State) -> nn.Module:
        """Return the module with its parameters on the meta device."""
        with set_default_torch_dtype(model_config.dtype):
            with torch.device("meta"):
                model: nn.Module = initialize_model(
                    vllm_config=vllm_config, model_config=model_config, prefix=prefix
                )
            bind_private(model, state)
            if _device_type(vllm_config) == "cpu":
                # We process before binding: vLLM makes no packed copies of parameters on meta, and
                # the processing needs no values.
                refuse_unsupported(model, on_cpu=True)
                process_again(model, model_config, vllm_config)
        return model.eval()

    def _give(
        self,
        model: nn.Module,
        weights: Weights,
        vllm_config: Any,
        model_config: Any,
        state: State,
    ) -> None:
        on_cpu = _device_type(vllm_config) == "cpu"
        bind_parameters(model, state, weights.model.tensors("torch"), exact=on_cpu)
        if not on_cpu:
            with (
                set_default_torch_dtype(model_config.dtype),
                weights.runtime.lease(weights.model),
                weights_already_processed(),
            ):
                process_again(model, model_config, vllm_config)
        refuse_meta(model)

    def _processed(self, vllm_config: Any, model_config: Any, prefix: str) -> State:
        """Load and process the checkpoint as vLLM does, and return the resulting state."""
        scratch = copy.copy(vllm_config)  # the config must not register the model's layers twice
        scratch.compilation_config = copy.copy(vllm_config.compilation_config)
        scratch.compilation_config.static_forward_context = {}
        scratch.compilation_config.static_all_moe_layers = []
        device = torch.device(vllm_config.device_config.device)
        with set_default_torch_dtype(model_config.dtype):
            with device:
                model = initialize_model(
                    vllm_config=scratch, model_config=model_config, prefix=prefix
                )
            refuse_unsupported(model, on_cpu=device.type == "cpu")
            if device.type == "cpu":
                for part in model.modules():
                    if isinstance(getattr(part, "quant_method", None), UnquantizedLinearMethod):
                        vars(part)["_cpu_skip_gemm_dispatch"] = True  # vLLM's own switch
            self._default().load_weights(model, model_config)
            process_weights_after_loading(model, model_config, device)
        return export(model)

    def _default(self) -> Any:
        plain = dataclasses.replace(
            self.load_config, load_format="auto", model_loader_extra_config={}
        )
        return DefaultModelLoader(plain)

    def _refuse_combinations(self, vllm_config: Any, leasing: bool) -> None:
        """Raise ValueError for an option that an option of vLLM excludes."""
        if self.options.gated and not vllm_config.model_config.enforce_eager:
            raise ValueError("load format warmserve: gated=True needs enforce_eager=True")
        if self.options.socket is None:
            return
        if not leasing:
            raise ValueError(
                f"load format warmserve: broker needs worker_cls={WORKER!r}: without leases the "
                "weights would stay in the arena, and engines of other processes could wait for "
                "room for ever"
            )
        if (computes_on := _device_type(vllm_config)) != "cpu":
            raise ValueError(
                "load format warmserve: broker must be left out where vLLM computes on "
                f"{computes_on!r}: a broker shares host memory"
            )

    def _arena(self, vllm_config: Any, entry: Entry | None = None) -> Arena | None:
        """Return the arena of the options; without a broker, make one only for an entry."""
        if self.options.socket is not None:
            return arenas.attach(self.options.socket)
        size = self.options.arena if entry is not None else None
        return arenas.obtain(self._device(vllm_config), size, entry)

    def _device(self, vllm_config: Any) -> str:
        """Return the runtime's name of the device."""
        if self.options.device is not None:
            return self.options.device
        if vllm_config.device_config.device_type == "cpu":
            return "host"
        return f"cuda:{torch.cuda.current_device()}"


def _close(coming: Future[Weights]) -> None:
    if coming.exception() is None:
        coming.result().close()


def _device_type(vllm_config: Any) -> str:
    return torch.device(vllm_config.device_config.device).type


def has_leasing_worker(vllm_config: Any) -> bool:
    """Return whether the engine's worker takes a lease around each step."""
    worker = resolve_obj_by_qualname(vllm_config.parallel_config.worker_cls)
    return bool(getattr(worker, "warmserve_leases", False))


def wait_for_the_rest(model: nn.Module, weights: Weights) -> None:
    """Make each forward pass wait for all layers when it ends.

    After a gated forward pass vLLM reads the output embedding without calling its module, so no
    gate would wait for it.
    """

    on_cuda = any(tensor.is_cuda for tensor in weights.model.tensors("torch").values())

    def wait(module: nn.Module, arguments: Any, output: Any) -> None:
        if weights.model.leased:
            return
        stream = weights.runtime.adopt_stream(torch.cuda.current_stream()) if on_cuda else None
        for layer in weights.model.layers:
            weights.model.wait(layer.index, stream)

    model.register_forward_hook(wait)
