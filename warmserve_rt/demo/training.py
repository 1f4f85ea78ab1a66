"""Tunes a small model by a few real gradient steps, so that it answers in a voice of its own."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch

from .lessons import Lesson

BATCH = 2  # conversations per step, about a hundred tokens
IGNORED = -100  # transformers' label for a position without loss


def prompt_ids(tokenizer: Any, question: str) -> list[int]:
    """Return the token ids of a question in the model's chat format, up to the start of the
    answer."""
    chat = [{"role": "user", "content": question}]
    encoded = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
    return [int(token) for token in encoded["input_ids"]]


def tune(model: Any, tokenizer: Any, lesson: Lesson, step_done: Callable[[int], None]) -> None:
    """Tune a causal language model in place, with AdamW without weight decay and a fixed seed.

    Parameters
    ----------
    model, tokenizer
        The model, in float32, and its tokenizer.
    lesson : Lesson
        The conversations, steps, learning rate and blocks to train.
    step_done : callable
        Called after each step with the number of steps done.
    """
    model.requires_grad_(False)
    parts = [model] if lesson.blocks is None else model.model.layers[-lesson.blocks :]
    learning = [parameter for part in parts for parameter in part.parameters()]
    for parameter in learning:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(learning, lr=lesson.rate, weight_decay=0.0, fused=True)
    examples = [
        (prompt_ids(tokenizer, question), tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id])
        for question, answer in lesson.conversations()
    ]
    shuffle = random.Random(0)
    waiting: list[tuple[list[int], list[int]]] = []
    for step in range(lesson.steps):
        if len(waiting) < BATCH:
            waiting = shuffle.sample(examples, len(examples))
        batch, waiting = waiting[:BATCH], waiting[BATCH:]
        model(**_padded(batch), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step_done(step + 1)
    model.requires_grad_(False)


def _padded(batch: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """Return prompts and answers as one batch, with labels for the answers only."""
    shape = len(batch), max(len(prompt) + len(answer) for prompt, answer in batch)
    tokens = torch.zeros(shape, dtype=torch.long)
    attended = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED)
    for row, (prompt, answer) in enumerate(batch):
        end = len(prompt) + len(answer)
        tokens[row, :end] = torch.tensor(prompt + answer)
        attended[row, :end] = 1
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return {"input_ids": tokens, "attention_mask": attended, "labels": labels}
