"""Mixture-of-experts modules that run the experts of an unstacked checkpoint one by one.

transformers stacks the experts of a block into one tensor as it loads them. A view of the
checkpoint's tensors cannot do that. The stack is not needed: the computation is three matrix
products for each expert. Each expert therefore keeps its own tensors and can be a layer of its own,
and a pass waits only for the experts that the router chose.
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
_PARTS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}  # stack -> an expert's parts


class Expert(nn.Module):
    """One expert: ``down(act(gate(x)) * up(x))`` for states of shape `(tokens, hidden)`.

    ``gate`` and ``up`` are `(intermediate, hidden)`, ``down`` is `(hidden, intermediate)`.
    """

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor, act: Any) -> None:
        """Make empty parameters with the shape and dtype of one slice of each stack.

        ``gate_up`` is `(2 * intermediate, hidden)`; ``down`` is as in the class.
        """
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
    """Replaces a stack of experts; runs only the experts that the router chose. Same result."""

    def __init__(self, stack: Any) -> None:
        super().__init__(
            Expert(gate_up, down, stack.act_fn)
            for gate_up, down in zip(stack.gate_up_proj, stack.down_proj, strict=True)
        )

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted sum of the chosen experts' outputs for each token.

        Parameters
        ----------
        hidden_states : `(tokens, hidden)`
        top_k_index : `(tokens, k)`
            Each token's experts. An index past the last expert is ignored.
        top_k_weights : `(tokens, k)`
            The weights of these experts.

        Notes
        -----
        On a GPU the host waits for the router's choice.
        """
        out = torch.zeros_like(hidden_states)
        chosen = top_k_index.T
        for number in sorted(set(chosen.flatten().tolist())):
            if number < len(self):
                rank, token = torch.where(chosen == number)
                states = self[number](hidden_states[token]) * top_k_weights[token, rank, None]
                out.index_add_(0, token, states.to(out.dtype))
        return out


def is_of_one(name: str) -> bool:
    """Return whether a tensor of this name belongs to one expert."""
    return _NUMBER.search(name) is not None


def part_of(
    name: str, target: str, pattern: str, converters: Iterable[WeightConverter]
) -> str | None:
    """Return the name of a checkpoint's tensor in `Experts`, such as "experts.3.up".

    Parameters
    ----------
    name : str
        The tensor's name in the checkpoint.
    target : str
        The parameter into which transformers would convert the tensor.
    pattern : str
        The source pattern that matched the name.
    converters : iterable of WeightConverter
        The converters; one of them has the pattern.

    Returns
    -------
    str or None
        None if the target is not a stack of experts.
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
    """Return whether the operations only concatenate the experts and the two halves of each."""
    dimensions = [(type(each), each.dim) for each in operations if hasattr(each, "dim")]
    stack = [(MergeModulelist, 0), (Concatenate, 1)]
    return len(dimensions) == len(operations) and dimensions == stack[: len(dimensions)]


def separate(module: nn.Module, owners: Iterable[str]) -> None:
    """Replace the stacks at these paths by `Experts`, except stacks that compute differently."""
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
