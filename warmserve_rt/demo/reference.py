"""What the engine by itself answers: the tokens with which every other way's are compared."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from transformers import AutoModelForCausalLM

from .content import Content
from .tenants import Progress


class Plain(Protocol):
    """An engine of which nothing of this package is a part. Of a model's directory it gives what
    answers a prompt with so many greedy tokens, or up to the one that ends an answer."""

    name: str
    version: str

    def __call__(
        self, path: Path
    ) -> AbstractContextManager[Callable[[list[int], int], list[int]]]: ...


class PlainTransformers:
    """transformers, by `from_pretrained` and `generate`."""

    name = "transformers"
    version = transformers.__version__

    @contextmanager
    def __call__(self, path: Path) -> Iterator[Callable[[list[int], int], list[int]]]:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        model.eval()
        yield lambda prompt, tokens: _generate(model, prompt, tokens)


def expected(
    tenants: Mapping[str, Path],
    contents: Mapping[str, Content],
    prompts: Mapping[str, list[int]],
    tokens: int,
    progress: Progress,
    plain: Plain,
) -> dict[tuple[str, str], list[int]]:
    """Of each tenant and prompt the greedy answer of `tokens` tokens, or up to the end.

    They are kept beside the tenants, under the checkpoint's digest and the versions of what
    computed them.
    """
    computed_by = [torch.__version__, plain.version, platform.processor(), tokens]
    computed_by.append(torch.backends.cpu.get_cpu_capability())
    answers: dict[tuple[str, str], list[int]] = {}
    for number, (tenant, path) in enumerate(tenants.items(), 1):
        file = path.parent / f"answers-{plain.name}-{tenant}.json"
        key = [contents[tenant].digest, *computed_by]
        known = _read(file, key)
        if missing := prompts.keys() - known.keys():
            with plain(path) as answer:
                known |= {prompt: answer(prompts[prompt], tokens) for prompt in sorted(missing)}
            aside = file.with_suffix(f".{os.getpid()}")
            aside.write_text(json.dumps({"key": key, "answers": known}))
            aside.replace(file)
        answers |= {(tenant, prompt): known[prompt] for prompt in prompts}
        progress(f"plain {plain.name}'s answers", number, len(tenants))
    return answers


def _read(file: Path, key: list[Any]) -> dict[str, list[int]]:
    try:
        kept = json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return dict(kept["answers"]) if kept["key"] == key else {}


def _generate(model: Any, prompt: list[int], tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
    )
    return [int(token) for token in output[0, len(prompt) :]]
