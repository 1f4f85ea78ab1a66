"""The costs of a model: the bytes of its layers and the seconds of its steps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelProfile:
    """The costs of one model on a tensor-parallel group of devices.

    Parameters
    ----------
    name
        The name of the model.
    width
        The number of devices of a group.
    layer_bytes
        Bytes of each layer on each device of the group, in execution order.
    kv_token_bytes
        Bytes of the KV cache of one token on each device.
    prefill_s, prefill_token_s
        A prefill of t tokens takes ``prefill_s + t * prefill_token_s`` seconds.
    decode_s, decode_request_s
        A decode step of n requests takes ``decode_s + n * decode_request_s`` seconds.
    batch
        The largest number of requests that an instance serves at once.
    ends
        Whether the first layer is the embedding and the last the head. Their compute time is then
        not counted.

    Raises
    ------
    ValueError
        If a size or a time is invalid.
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
            raise ValueError(
                f"{self.name}: width and batch must be at least 1, "
                f"got {self.width} and {self.batch}"
            )
        if not self.layer_bytes or min(self.layer_bytes) < 1:
            raise ValueError(
                f"{self.name}: a model must have layers, and each layer at least one byte"
            )
        if self.ends and len(self.layer_bytes) < 3:
            raise ValueError(f"{self.name}: a model must have a layer between embedding and head")
        times = (self.prefill_s, self.prefill_token_s, self.decode_s, self.decode_request_s)
        if not all(0 <= time < float("inf") for time in times) or self.kv_token_bytes < 0:
            raise ValueError(f"{self.name}: times and sizes must be finite and not negative")

    @property
    def nbytes(self) -> int:
        """Return the bytes of all layers on each device."""
        return sum(self.layer_bytes)

    def prefill(self, tokens: float) -> float:
        """Return the seconds to the first token of a prompt if all layers are resident."""
        return self.prefill_s + tokens * self.prefill_token_s

    def decode(self, requests: float) -> float:
        """Return the seconds of one decode step."""
        return self.decode_s + requests * self.decode_request_s

    def compute(self, seconds: float) -> tuple[float, ...]:
        """Return the seconds of each layer in a forward pass of ``seconds``."""
        if not self.ends:
            return (seconds / len(self.layer_bytes),) * len(self.layer_bytes)
        inner = len(self.layer_bytes) - 2
        return (0.0, *(seconds / inner,) * inner, 0.0)
