"""The classes of the plain model of the runtime."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

BUSY, CANCELLED, TOO_LARGE = "Busy", "Cancelled", "OutOfDeviceMemory"
BACKGROUND, FOREGROUND = 0, 100


class Refused(Exception):
    """The plain model refuses; carries the name of the exception that the runtime must raise."""


@dataclass(eq=False)
class Layer:
    model: Model
    index: int
    granules: int
    state: str = "absent"
    keep_value: float = 0.0
    filled_at: int = 0
    leases: int = 0
    fill: Fill | None = None


@dataclass(eq=False)
class Model:
    name: str
    serial: int
    layers: list[Layer] = field(default_factory=list)
    leases: int = 0
    last_use: int = 0

    def some(self, layers: list[int] | None) -> list[Layer]:
        return list(self.layers) if layers is None else [self.layers[i] for i in sorted(layers)]


def granules(layers: list[Layer]) -> int:
    return sum(layer.granules for layer in layers)


@dataclass(eq=False)
class Ticket:
    priority: int
    wants: list[Layer]
    swaps_out: Model | None = None
    evict_below: float = math.inf
    fills: list[Fill] = field(default_factory=list)
    short_of: str | None = None
    done: bool = False
    error: str | None = None


@dataclass(eq=False)
class Fill:
    layer: Layer
    priority: int
    serial: int
    tickets: list[Ticket] = field(default_factory=list)
    copying: bool = False
    give_way: bool = False
    chunks: int = 0  # chunks copied; here a chunk is a granule

    @property
    def foreground(self) -> bool:
        return self.priority > BACKGROUND


@dataclass(eq=False)
class Lease:
    layers: list[Layer]
    owner: int
    in_line: bool = False
    ticket: Ticket | None = None
    admitted: bool = False

    @property
    def models(self) -> list[Model]:
        return list(dict.fromkeys(layer.model for layer in self.layers))
