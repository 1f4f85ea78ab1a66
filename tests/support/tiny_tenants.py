"""Tiny versions of the demo's tenants: random models, and a tokenizer with the demo's words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from warmserve_rt.demo import run as demo
from warmserve_rt.demo import tenants
from warmserve_rt.demo.lessons import QUESTIONS

NAMES = ["A", "B", "C", "D", "E"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def tiny(seed: int) -> tuple[Any, Any]:
    """Return a random model and a tokenizer whose words are those of the questions."""
    words = sorted({word for question in QUESTIONS for word in question.split()})
    words += [f"w{i}" for i in range(96 - 4 - len(words))]
    vocabulary = {word: number for number, word in enumerate(["<p>", "<b>", "<e>", "<u>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<u>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast: Any = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<p>", bos_token="<b>", eos_token="<e>"
    )
    fast.chat_template = TEMPLATE
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=96,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model, fast


def cast_for(monkeypatch: pytest.MonkeyPatch, root: Path) -> dict[str, Path]:
    """Replace the demo's tenants by five tiny ones. B differs from A only in its last block."""
    paths: dict[str, Path] = {}
    for seed, name in enumerate(NAMES):
        model, tokenizer = tiny(0 if name == "B" else seed)
        if name == "B":
            torch.nn.init.normal_(model.model.layers[2].mlp.up_proj.weight)
        paths[name] = root / "tenants" / name
        paths[name].mkdir(parents=True)
        tenants._write(paths[name], model, tokenizer)
    monkeypatch.setattr(demo, "make_tenants", lambda progress: paths)
    monkeypatch.setattr(demo, "GAP", 0.01)
    return paths
