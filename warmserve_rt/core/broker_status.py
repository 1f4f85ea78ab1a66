"""The state of a broker and its clients at one moment as plain values."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .broker_connection import ANSWER_WITHIN_S, connect

if TYPE_CHECKING:
    from warmserve_rt import _native

_NAME = "broker_status"  # by which a broker knows the connections that only ask for its state


@dataclass(frozen=True, slots=True)
class BrokerModel:
    """One model: the bytes of its layers, and of those that are resident. A resident layer counts
    once, however many clients map it."""

    name: str
    nbytes: int
    nbytes_resident: int


@dataclass(frozen=True, slots=True)
class MappedModel:
    """A model's layers that a client may map: their number and bytes.

    ``layers_held`` are those that an eviction wanted and the client still uses. Leases that no
    eviction has met are unknown to the broker, because they send no message.
    """

    name: str
    layers: int
    layers_held: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class BrokerClient:
    """One client, and the models that it may map.

    ``process`` is the number of its process, 0 if the broker's namespace has none for it. A client
    is ``stuck`` if it did not answer in time and has sent no message since. It has ``ended`` if its
    connection is closed while its process, which may still read what it has mapped, lives on.
    """

    process: int
    name: str
    stuck: bool
    ended: bool
    mapped: tuple[MappedModel, ...]


@dataclass(frozen=True, slots=True)
class BrokerStatus:
    """A broker: its arena in granules, the models that clients have registered, and the clients.

    ``nbytes_loaded`` are the bytes that it has loaded into the arena since it began. Layers that an
    earlier broker has left in the arena do not count.
    """

    granule_bytes: int
    granules: int
    granules_free: int
    nbytes_loaded: int
    models: tuple[BrokerModel, ...]
    clients: tuple[BrokerClient, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the arena."""
        return self.granules * self.granule_bytes

    @property
    def nbytes_free(self) -> int:
        """Bytes of the granules that no layer occupies."""
        return self.granules_free * self.granule_bytes


def broker_status(path: str | os.PathLike[str]) -> BrokerStatus:
    """Ask the broker that listens at a path for its state. It needs no runtime.

    Parameters
    ----------
    path : path
        Of the broker's socket.

    Raises
    ------
    WarmServeError
        No broker listens there, or it refuses this process.
    TimeoutError
        The broker does not answer within ten seconds.
    """
    state = connect(path, _NAME).state(ANSWER_WITHIN_S)
    return BrokerStatus(
        granule_bytes=state.granule_bytes,
        granules=state.granules,
        granules_free=state.granules_free,
        nbytes_loaded=state.bytes_loaded,
        models=tuple(BrokerModel(x.name, x.bytes, x.bytes_resident) for x in state.models),
        clients=tuple(_clients(state.clients)),
    )


def _clients(found: Iterable[_native.ClientState]) -> Iterable[BrokerClient]:
    for each in found:
        mapped = tuple(MappedModel(x.model, x.layers, x.layers_held, x.bytes) for x in each.mapped)
        if mapped or each.name != _NAME:
            yield BrokerClient(each.pid, each.name, each.stuck, each.ended, mapped)
