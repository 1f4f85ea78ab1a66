"""Reference answers: the tokens of the plain engine, with which all rows are compared."""

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
    """An engine without any part of this package.

    Called with a model's directory, it returns a context. The context yields a function of a prompt
    and a number of tokens, which returns that many greedy tokens, or fewer if the answer ends.
    """

    name: str
    version: str

    def __call__(
        self, path: Path
    ) -> AbstractContextManager[Callable[[list[int], int], list[int]]]: ...


class PlainTransformers:
    """transformers with `from_pretrained` and `generate`."""

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
    """Return the greedy answer for each pair of tenant and prompt.

    Answers are cached beside the tenants. A cached answer is valid only for the same checkpoint
    digest, versions and processor.

    Parameters
    ----------
    tenants, contents
        Directory and content of each tenant.
    prompts : mapping of prompt to token ids
        The prompts.
    tokens : int
        Maximum number of tokens of an answer.
    progress : Progress
        Called after each tenant.
    plain : Plain
        The engine that computes missing answers.
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
