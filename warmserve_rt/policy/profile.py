"""What a model costs: the bytes of its layers and the seconds of its steps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelProfile:
    """One model, on a tensor-parallel group of ``width`` devices.

    ``layer_bytes``: on each device of the group, in execution order; where ``ends`` is set the
    first is the embedding and the last the head, whose computing is not counted.
    ``kv_token_bytes``: KV cache of one token, on each device. A prefill of t tokens takes
    ``prefill_s + t * prefill_token_s`` seconds, a decode step of n requests
    ``decode_s + n * decode_request_s``. ``batch``: the requests an instance takes at once.

    Raises ValueError for what is not a size or a time.
    """

    name: str
    width: int
    layer_bytes: tuple[int, ...]
    kv_token_bytes: int
    prefill_s: float
    prefill_token_s: float
    decode_s: float
    decode_request_s: float = 0.0
    batch: int = 32
    ends: bool = True

    def __post_init__(self) -> None:
        if self.width < 1 or self.batch < 1:
            raise ValueError(f"{self.name}: {self.width} devices, {self.batch} requests at once")
        if not self.layer_bytes or min(self.layer_bytes) < 1:
            raise ValueError(f"{self.name}: a model has layers, and each has bytes")
        if self.ends and len(self.layer_bytes) < 3:
            raise ValueError(f"{self.name}: no layer between embedding and head")
        times = (self.prefill_s, self.prefill_token_s, self.decode_s, self.decode_request_s)
        if not all(0 <= time < float("inf") for time in times) or self.kv_token_bytes < 0:
            raise ValueError(f"{self.name}: times and sizes are finite and not negative")

    @property
    def nbytes(self) -> int:
        """Of all layers, on each device."""
        return sum(self.layer_bytes)

    def prefill(self, tokens: float) -> float:
        """Seconds to the first token of a prompt, with every layer resident."""
        return self.prefill_s + tokens * self.prefill_token_s

    def decode(self, requests: float) -> float:
        """Seconds of one decode step."""
        return self.decode_s + requests * self.decode_request_s

    def compute(self, seconds: float) -> tuple[float, ...]:
        """How ``seconds`` of a forward pass fall on the layers."""
        if not self.ends:
            return (seconds / len(self.layer_bytes),) * len(self.layer_bytes)
        inner = len(self.layer_bytes) - 2
        return (0.0, *(seconds / inner,) * inner, 0.0)
