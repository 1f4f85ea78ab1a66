"""Where the transformers benches run: the host, or a CUDA device whose work is waited for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lib.harness import seconds
from warmserve_rt import Model, Runtime

GRANULE = 2 << 20


class Place:
    """A device by the name that `Runtime` knows it by."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.device = torch.device("cpu" if name == "host" else name)
        self.on_cuda = self.device.type == "cuda"
        if self.on_cuda:
            torch.cuda.set_device(self.device)
        self.prompt = torch.arange(100, 132, device=self.device)[None]

    def runtime(self, arena: int) -> Runtime:
        return Runtime(self.name, arena, tensors="torch")

    def plain(self, model: Path) -> Any:
        """As transformers loads it by itself: on the host it maps the file and reads nothing."""
        placed = {"device_map": {"": self.device}} if self.on_cuda else {}
        return AutoModelForCausalLM.from_pretrained(model, dtype="auto", **placed)

    def say(self, module: Any, tokens: int) -> torch.Tensor:
        """So many more than the prompt."""
        greedy = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        said: torch.Tensor = module.generate(self.prompt, **greedy)
        return said

    def done(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object]) -> float:
        """How long it takes until the device is through with it."""

        def whole() -> object:
            result = work()
            self.done()
            return result

        return seconds(whole)


def arena_of(module: Any) -> int:
    """Bytes of an arena that holds a bound module's model, and nothing else."""
    model: Model = module.warmserve_model
    return GRANULE * sum(-(-layer.nbytes // GRANULE) for layer in model.layers)
