"""The device of the transformers benches: the host, or a CUDA device with synchronized timing."""

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
    """A device under the name that `Runtime` uses."""

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
        """Load the model with plain transformers; on the host this only maps the file."""
        placed = {"device_map": {"": self.device}} if self.on_cuda else {}
        return AutoModelForCausalLM.from_pretrained(model, dtype="auto", **placed)

    def say(self, module: Any, tokens: int) -> torch.Tensor:
        """Return the prompt and exactly `tokens` generated tokens."""
        greedy = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        said: torch.Tensor = module.generate(self.prompt, **greedy)
        return said

    def done(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object]) -> float:
        """Return the seconds until the device has finished the work."""

        def whole() -> object:
            result = work()
            self.done()
            return result

        return seconds(whole)


def arena_of(module: Any) -> int:
    """Return the bytes of an arena that holds exactly a bound module's model."""
    model: Model = module.warmserve_model
    return GRANULE * sum(-(-layer.nbytes // GRANULE) for layer in model.layers)
