"""The rows of transformers: one module at a time, or a module for each tenant in the arena."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from warmserve_rt import Runtime
from warmserve_rt.engines import transformers as engine
from warmserve_rt.engines.transformers.skeletons import skeleton

from .content import Content, differing
from .rows import InArena, Row, Say


class Reload(Row):
    """One model in memory at a time; safetensors reads it into new memory at every switch."""

    name = "reload"
    title = "reload"

    def __init__(self, tenants: Mapping[str, Path]) -> None:
        self._tenants = tenants
        # The tenants differ only in their weights, so one module serves all of them.
        config = AutoConfig.from_pretrained(next(iter(tenants.values())))
        self._module = skeleton(config, torch.float32)
        self._current = ""
        self._moved = 0

    def ready(self, tenant: str) -> bool:
        return tenant == self._current

    @contextmanager
    def serving(self, tenant: str) -> Iterator[Say]:
        if tenant != self._current:
            engine.bind(self._module, self._read(self._tenants[tenant] / "model.safetensors"))
            self._current = tenant
        yield partial(generate, self._module)

    def bytes_moved(self) -> int:
        return self._moved

    def _read(self, path: Path) -> dict[str, torch.Tensor]:
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        self._moved += sum(tensor.nbytes for tensor in tensors.values())
        return tensors


class Mapped(Reload):
    """Like `Reload`, but maps the file and copies nothing: the page cache holds the weights."""

    name = "mmap"
    title = "lazy mmap"

    def _read(self, path: Path) -> dict[str, torch.Tensor]:
        return load_file(path)


class Transformers(InArena):
    """Modules with weights in the arena, run under leases."""

    def __init__(
        self,
        tenants: Mapping[str, Path],
        contents: Mapping[str, Content],
        arena: int,
        *,
        prewarm: bool = False,
        mutation: random.Random | None = None,
    ) -> None:
        self._contents = contents
        runtime = Runtime(device="host", arena=arena, loaders=1)
        try:
            self.modules: dict[str, Any] = {
                name: engine.load(runtime, path, name=name) for name, path in tenants.items()
            }
            models = {name: module.warmserve_model for name, module in self.modules.items()}
            super().__init__(runtime, models, prewarm=prewarm, mutation=mutation)
        except BaseException:
            runtime.close()
            raise

    @contextmanager
    def answering(self, tenant: str) -> Iterator[Say]:
        with self.runtime.lease(tenant) as lease:
            self._leased = lease
            self.mutate(tenant)
            yield partial(generate, self.modules[tenant])

    def bytes_match(self, tenant: str) -> bool:
        """Compare every tensor at the addresses where the engine reads it."""
        content, tensors = self._contents[tenant], self._leased.tensors
        return all(content.equals(name, tensors[name]) for name in tensors)

    def differing(self, tenant: str, other: str) -> list[tuple[int, int]]:
        return differing(self._contents[tenant].granules, self._contents[other].granules)

    def close(self) -> None:
        self.modules.clear()
        super().close()


@torch.inference_mode()
def generate(module: Any, prompt: list[int], count: int, end: int) -> Iterator[int]:
    """Yield greedy tokens, each as soon as it is known."""
    tokens = torch.tensor([prompt])
    # transformers 5.24 renamed the argument and warns about the old name.
    known = signature(type(module).forward).parameters
    name = "cache" if "cache" in known else "past_key_values"
    cache = None
    for _ in range(count):
        output = module(input_ids=tokens, use_cache=True, logits_to_keep=1, **{name: cache})
        cache = output[name]
        tokens = output.logits[:, -1].argmax(-1, keepdim=True)
        token = int(tokens)
        yield token
        if token == end:
            return
