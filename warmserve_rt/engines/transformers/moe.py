"""Experts one by one: a mixture of experts whose checkpoint has them apart computes on them so.

transformers stacks the experts of a block into one tensor as it loads them, which a view cannot
follow. But what it computes on the stack is, for each expert, three products, and those need no
stack. So each expert keeps tensors of its own, may be a layer of its own, and is waited for only
where the router chose it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.integrations.moe import _default_apply_gate

_NUMBER = re.compile(r"\.experts\.([0-9]+)\.")
_PARTS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}  # of what stack


class Expert(nn.Module):
    """``down(act(gate(x)) * up(x))``, of states `(tokens, hidden)`.

    ``gate`` and ``up`` are `(intermediate, hidden)`, ``down`` is `(hidden, intermediate)`.
    """

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor, act: Any) -> None:
        """Like one slice of each stack, `(2 * intermediate, hidden)` and as ``down``, but empty."""
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.gate, self.up, self.down = (
            nn.Parameter(torch.empty_like(like), requires_grad=False) for like in (gate, up, down)
        )
        self.act = act

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        wide = self.act(functional.linear(states, self.gate)) * functional.linear(states, self.up)
        return functional.linear(wide, self.down)


class Experts(nn.ModuleList):
    """In the place of a stack: computes the same, with the experts that the router chose alone."""

    def __init__(self, stack: Any) -> None:
        super().__init__(
            Expert(gate_up, down, stack.act_fn)
            for gate_up, down in zip(stack.gate_up_proj, stack.down_proj, strict=True)
        )

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """States `(tokens, hidden)`, and of each token its experts and their weights
        `(tokens, k)`; an index past the last expert stands for none. On a GPU the host waits for
        the router's choice."""
        out = torch.zeros_like(hidden_states)
        chosen = top_k_index.T
        for number in sorted(set(chosen.flatten().tolist())):
            if number < len(self):
                rank, token = torch.where(chosen == number)
                states = self[number](hidden_states[token]) * top_k_weights[token, rank, None]
                out.index_add_(0, token, states.to(out.dtype))
        return out


def is_of_one(name: str) -> bool:
    """Whether a tensor of this name belongs to one expert."""
    return _NUMBER.search(name) is not None


def part_of(
    name: str, target: str, pattern: str, converters: Iterable[WeightConverter]
) -> str | None:
    """What a checkpoint's tensor is called where the experts are apart, say "experts.3.up".

    ``target`` and ``pattern``: the stack that transformers would make it a part of, and the pattern
    of the converter that would; None if that is no stack of experts.
    """
    converter = next(each for each in converters if pattern in each.source_patterns)
    number = _NUMBER.search(name)
    owner, _, leaf = target.rpartition(".")
    parts = _PARTS.get(leaf, ())
    patterns = converter.source_patterns
    if number is None or len(parts) != len(patterns) or not _stacks(converter.operations):
        return None
    return f"{owner}.{number[1]}.{parts[patterns.index(pattern)]}"


def _stacks(operations: list[Any]) -> bool:
    """Whether they do nothing but put experts, and the two halves of each, behind each other."""
    dimensions = [(type(each), each.dim) for each in operations if hasattr(each, "dim")]
    stack = [(MergeModulelist, 0), (Concatenate, 1)]
    return len(dimensions) == len(operations) and dimensions == stack[: len(dimensions)]


def separate(module: nn.Module, owners: Iterable[str]) -> None:
    """Put `Experts` in the place of the stacks at these paths, where they compute the same."""
    for path in owners:
        stack: Any = module.get_submodule(path)
        plain = (
            getattr(stack, "has_gate", False)
            and stack.is_concatenated
            and not (stack.is_transposed or stack.has_bias or stack.has_post_expert_norm)
            and type(stack)._apply_gate is _default_apply_gate
        )
        if plain:
            module.set_submodule(path, Experts(stack))
