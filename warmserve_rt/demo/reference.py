"""What plain transformers answers: the tokens with which every other way's are compared."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from warmserve_rt.demo.content import Content
from warmserve_rt.demo.tenants import Progress


def expected(
    tenants: Mapping[str, Path],
    contents: Mapping[str, Content],
    prompts: Mapping[str, list[int]],
    tokens: int,
    progress: Progress,
) -> dict[tuple[str, str], list[int]]:
    """Of each tenant and prompt the greedy answer of `tokens` tokens, or up to the end.

    `from_pretrained` and `generate` compute it; nothing of this package takes part. Answers are
    kept beside the tenants, under the checkpoint's digest and the versions of what computed them.
    """
    computed_by = [torch.__version__, transformers.__version__, platform.processor(), tokens]
    computed_by.append(torch.backends.cpu.get_cpu_capability())
    answers: dict[tuple[str, str], list[int]] = {}
    for number, (tenant, path) in enumerate(tenants.items(), 1):
        file = path.parent / f"answers-{tenant}.json"
        key = [contents[tenant].digest, *computed_by]
        known = _read(file, key)
        model: Any = None
        for prompt, ids in prompts.items():
            if prompt not in known:
                model = model or _plain(path)
                known[prompt] = _generate(model, ids, tokens)
            answers[tenant, prompt] = known[prompt]
        if model is not None:
            aside = file.with_suffix(f".{os.getpid()}")
            aside.write_text(json.dumps({"key": key, "answers": known}))
            aside.replace(file)
        progress("plain transformers' answers", number, len(tenants))
    return answers


def _read(file: Path, key: list[Any]) -> dict[str, list[int]]:
    try:
        kept = json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return dict(kept["answers"]) if kept["key"] == key else {}


def _plain(path: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval()


def _generate(model: Any, prompt: list[int], tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
    )
    return [int(token) for token in output[0, len(prompt) :]]
