# Types of the extension module that csrc/bind/module.cpp defines. Used by core/, checkpoint/ and
# kernels.py. All sizes are in bytes, all times in seconds. The file is long because the stub of a
# module is one file.
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, TypeAlias, TypeVar, overload

import numpy as np
import numpy.typing as npt
from typing_extensions import CapsuleType

from warmserve_rt.core.registration import SourceFile

# (bytes, [(file, file offset, layer offset, bytes in the layer, kind of cast)]).
LayerTuple: TypeAlias = tuple[int, Sequence[tuple[int, int, int, int, str | None]]]
# For each layer: [(granule, its digest, or None to compute it from the files)].
Checks: TypeAlias = Sequence[Sequence[tuple[int, int | None]]]
Bytes: TypeAlias = bytearray | memoryview | npt.NDArray[np.uint8]

_Row = TypeVar("_Row", bound=tuple[Any, ...])

class StringTable:
    def __len__(self) -> int: ...
    def find(self, arg0: str) -> str | None: ...
    # Items [arg0, arg1).
    def items(self, arg0: int, arg1: int) -> list[tuple[str, str]]: ...

# Tensors have numbers, in the order of the headers, and positions, in the order of the file.
class TensorTable:
    @overload
    def __init__(self) -> None: ...
    @overload
    def __init__(self, names: Sequence[str], sizes: Sequence[int]) -> None: ...
    def __len__(self) -> int: ...
    # Adds the next file and returns (its metadata, None). If another file has a tensor of the same
    # name, returns (None, (message, number of that file)).
    def add(
        self, header: bytes, start: int, size: int
    ) -> tuple[StringTable, None] | tuple[None, tuple[str, int]]: ...
    def names(self, first: int, last: int) -> list[str]: ...  # at positions [first, last)
    def find(self, arg0: str) -> int | None: ...
    # Name, type, shape, file, offset in the file, bytes.
    def entry(self, number: int) -> tuple[str, int, tuple[int, ...], int, int, int]: ...
    def types(self) -> npt.NDArray[np.uint8]: ...
    def groups(self) -> list[tuple[str, list[str]]]: ...

class Layout:
    def __len__(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def layer(self, arg0: int) -> tuple[str, int, int, int]: ...  # name, bytes, tensors, segments
    # Name, type, shape, layer, offset in the layer, bytes.
    def tensors(
        self, layer: int, first: int, last: int
    ) -> list[tuple[str, int, tuple[int, ...], int, int, int]]: ...
    # File, file offset, layer offset, bytes in the layer, kind of cast.
    def segments(
        self, layer: int, first: int, last: int
    ) -> list[tuple[int, int, int, int, str | None]]: ...

def element_types() -> list[tuple[str, int]]: ...  # (name, bits) by number of the type
def dlpack_types() -> list[tuple[int, int, int] | None]: ...  # (code, bits, lanes) by number
def lay_out_by_name(
    table: TensorTable,
    experts: bool,
    types: npt.NDArray[np.uint8],
    granule: int,
    max_padding: float,
) -> Layout: ...
def lay_out_groups(
    table: TensorTable,
    names: Sequence[str],
    group_of: npt.NDArray[np.uint32],
    types: npt.NDArray[np.uint8],
) -> Layout: ...
def strings_of(text: bytes, key: str, most: int) -> StringTable | None: ...
def under_stems(names: list[str], stems: list[str]) -> list[bool]: ...

class Driver:
    @property
    def name(self) -> str: ...
    @property
    def granularity(self) -> int: ...
    @property
    def cuda_ordinal(self) -> int: ...  # -1: not a CUDA device
    @property
    def no_kernels(self) -> str: ...  # why kernels cannot run; "": they can
    def memory(self) -> tuple[int, int]: ...  # available, total

class FaultyDriver(Driver):
    def __init__(self, inner: Driver) -> None: ...
    def arm(
        self,
        ranges: Sequence[tuple[int, int | None]],
        *,
        only: str | None = None,
        status: str = "failed",
    ) -> None: ...
    def disarm(self) -> None: ...
    def delay(self, primitive: str, seconds: float) -> None: ...
    def cap_memory(self, nbytes: int) -> None: ...
    @property
    def calls(self) -> int: ...
    @property
    def injected(self) -> int: ...
    @property
    def last(self) -> str: ...

class StrictDriver(Driver):
    def __init__(self, inner: Driver) -> None: ...
    @property
    def violations(self) -> list[str]: ...
    @property
    def live(self) -> dict[str, int]: ...

def host_driver(
    *,
    threads: bool = True,
    host_view: bool = True,
    huge_pages: bool = True,
    root: str = "",
    memory: int = -1,  # a descriptor; -1: the driver makes its memory
    contents: int = -1,  # a descriptor of the contents record of that memory
) -> Driver: ...
def bytes_of_contents(granules: int) -> int: ...  # of such a record
def cuda_driver(
    *,
    library: str = "libcuda.so.1",
    ordinal: int = 0,
    kernels: bytes = b"",
    peers: Sequence[int] = (),  # ordinals of devices that may write this device's memory
) -> Driver: ...

class MappedGranule:  # for tests of drivers
    def __init__(
        self,
        driver: Driver,
        nbytes: int,
        *,
        shared: tuple[int, int] | None = None,  # import what another process's share() returned
        writable: bool = True,
    ) -> None: ...
    def share(self) -> tuple[int, int]: ...  # descriptor, which the caller closes, and offset
    def read(self, nbytes: int) -> bytes: ...
    def write(self, data: bytes) -> None: ...
    @property
    def address(self) -> int: ...

def time_driver(
    driver: Driver, *, granule: int, batch: int, rounds: int, writable: bool = True
) -> dict[str, float]: ...

class View:
    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> CapsuleType: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...
    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

class Model:
    @property
    def name(self) -> str: ...
    @property
    def backing_epoch(self) -> int: ...
    # (whether every layer is leased and resident, lease epoch; 0: no lease on the model)
    @property
    def leased(self) -> tuple[bool, int]: ...
    # True: the layer is resident, and stays so while it is held.
    def wait(
        self, layer: int, stream: Stream | None = None, timeout: float | None = None
    ) -> bool: ...
    def record(self, stream: Stream) -> None: ...
    def begin_pass(self) -> Pass | None: ...  # a pass of this thread; None: no layer is leased
    def view(
        self,
        layer: int,
        offset: int,
        shape: Sequence[int],
        nbytes: int,
        code: int,
        bits: int,
        lanes: int,
    ) -> View: ...
    def tensor(
        self,
        layer: int,
        offset: int,
        shape: Sequence[int],
        nbytes: int,
        type: int,  # index of element_types()
        as_bytes: bool,
    ) -> View: ...
    # (names, versioned DLPack capsules) of the layer's tensors [first, last).
    def capsules(
        self, layout: Layout, layer: int, first: int, last: int
    ) -> tuple[list[str], list[CapsuleType]]: ...

class Waker:
    def fileno(self) -> int: ...  # owned by the waker; readable while take() would return tokens
    def take(self) -> list[int]: ...  # tokens woken since the last call

class Ticket:
    def wait(self, timeout: float | None = None, *, layer: int | None = None) -> None: ...
    def cancel(self) -> None: ...
    def fileno(self) -> int: ...
    def notify(self, waker: Waker, token: int) -> bool: ...  # False: the ticket is done already
    @property
    def done(self) -> bool: ...
    @property
    def progress(self) -> tuple[int, int]: ...  # bytes arrived, bytes in all
    @property
    def what(self) -> str: ...  # "prewarm of 'chat'"
    @property
    def layers_left(self) -> tuple[int, int]: ...  # layers still to arrive, layers in all

class Stream:
    @property
    def handle(self) -> int: ...  # CUDA: the CUstream
    def copy_from(self, out: Bytes, view: View) -> None: ...
    def refuse_capture(self) -> None: ...  # ValueError: the stream is being captured
    def step(self) -> bool: ...
    def synchronize(self) -> None: ...

class Lease:
    def wait(
        self, timeout: float | None = None, all: bool = True
    ) -> bool: ...  # False: the lease was admitted at once, with all layers resident
    def ready(self, all: bool = True) -> bool: ...
    def notify(self, waker: Waker, token: int, all: bool = True) -> bool: ...  # False: ready
    def wait_layer(
        self,
        model: Model,
        layer: int,
        stream: Stream | None = None,
        timeout: float | None = None,
    ) -> None: ...
    def arrived(self, model: Model, layer: int) -> bool: ...
    def share(self, owner: int) -> Lease: ...
    def record(self, stream: Stream) -> None: ...
    def release(self) -> None: ...

# A computation of one thread. It holds the layers that were leased when it began until release().
class Pass:
    @property
    def complete(self) -> bool: ...  # the pass holds every layer, and all are resident
    @property
    def lease_epoch(self) -> int: ...
    def wait(
        self, layer: int, stream: Stream | None = None, timeout: float | None = None
    ) -> bool: ...  # True: the layer is resident
    def record(self, stream: Stream) -> None: ...
    def release(self) -> None: ...

class ModelState:
    @property
    def name(self) -> str: ...
    @property
    def leases(self) -> int: ...
    @property
    def backing_epoch(self) -> int: ...
    # Each layer as a `row`, a subclass of tuple: (residency, nbytes, granules, leases,
    # keep_value, cached).
    def layers(self, row: type[_Row]) -> tuple[_Row, ...]: ...

class RouteState:
    @property
    def name(self) -> str: ...
    @property
    def nbytes(self) -> int: ...  # carried so far
    @property
    def bandwidth(self) -> float: ...  # bytes per second, as measured last; 0: not measured yet
    @property
    def error(self) -> str: ...  # why the route accepts no more copies; "": it does

class HostCacheState:
    @property
    def budget_bytes(self) -> int: ...
    @property
    def pinned_bytes(self) -> int: ...
    @property
    def bytes_in_use(self) -> int: ...
    @property
    def error(self) -> str: ...  # why fewer bytes than the budget are pinned; "": nothing failed
    @property
    def layers(self) -> int: ...
    @property
    def hits(self) -> int: ...
    @property
    def misses(self) -> int: ...
    @property
    def hit_bytes(self) -> int: ...
    @property
    def evictions(self) -> int: ...

class RuntimeState:
    @property
    def host_cache(self) -> HostCacheState: ...
    @property
    def granule_bytes(self) -> int: ...
    @property
    def pinned_bytes(self) -> int: ...
    @property
    def headroom_bytes(self) -> int: ...
    @property
    def granules(self) -> int: ...
    @property
    def granules_free(self) -> int: ...
    @property
    def granules_trimmed(self) -> int: ...
    @property
    def leases(self) -> int: ...
    @property
    def staging_chunks_free(self) -> int: ...
    @property
    def bytes_loaded(self) -> int: ...
    @property
    def layers_loaded(self) -> int: ...
    @property
    def layers_evicted(self) -> int: ...
    @property
    def layers_examined(self) -> int: ...
    @property
    def routes(self) -> list[RouteState]: ...
    @property
    def models(self) -> list[ModelState]: ...

class Guard:
    def acquire(self) -> None: ...
    def release(self) -> None: ...
    def __enter__(self) -> Guard: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None: ...
    @property
    def holds(self) -> int: ...

class BrokerConnection:
    def __init__(
        self,
        path: str,
        *,
        version: str,
        name: str,
        timeout: float | None,
        patience: float = 0.0,
    ) -> None: ...
    @property
    def granule_bytes(self) -> int: ...
    @property
    def granules(self) -> int: ...
    def state(self, timeout: float | None) -> BrokerState: ...

class MappedState:
    @property
    def model(self) -> str: ...
    @property
    def layers(self) -> int: ...
    @property
    def layers_held(self) -> int: ...
    @property
    def bytes(self) -> int: ...

class ClientState:
    @property
    def pid(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def stuck(self) -> bool: ...
    @property
    def ended(self) -> bool: ...
    @property
    def mapped(self) -> list[MappedState]: ...

class BrokerModelState:
    @property
    def name(self) -> str: ...
    @property
    def bytes(self) -> int: ...
    @property
    def bytes_resident(self) -> int: ...
    @property
    def leases(self) -> int: ...

class BrokerState:
    @property
    def granule_bytes(self) -> int: ...
    @property
    def granules(self) -> int: ...
    @property
    def granules_free(self) -> int: ...
    @property
    def bytes_loaded(self) -> int: ...
    @property
    def models(self) -> list[BrokerModelState]: ...
    @property
    def clients(self) -> list[ClientState]: ...

class BrokerServer:
    def __init__(
        self,
        runtime: Runtime,
        *,
        path: str,
        version: str,
        patience: float,
        keeper: int = -1,  # a socket; -1: no keeper
        former_clients: Sequence[tuple[int, int]] = (),  # descriptors: process, record
    ) -> None: ...
    def stop(self) -> None: ...

class Runtime:
    def __init__(
        self,
        driver: Driver,
        *,
        arena: int,
        staging: int,
        host_cache: int,
        granule: int,
        chunk: int,
        headroom: int,
        loaders: int,
        staging_timeout: float,
        poison: bool,
        fence_device: bool,
        background_share: float,
        read_bandwidth: int,
        peers: Sequence[Driver],
        broker: BrokerConnection | None = None,
    ) -> None: ...
    def drop_route(self, name: str) -> None: ...
    def register(
        self,
        name: str,
        files: Iterable[SourceFile],  # a descriptor is duplicated before the next item is requested
        layers: Layout | Sequence[LayerTuple],
        writable: bool,
        checks: Checks = ...,  # default: no checks
    ) -> Model: ...
    def reload(
        self,
        model: Model,
        files: Iterable[SourceFile],  # a descriptor is duplicated before the next item is requested
        layers: Layout,
        checks: Checks,
        timeout: float | None,
    ) -> None: ...
    def unregister(
        self,
        model: Model,
        timeout: float | None,
        wait: str,
        poll: Callable[[], None] | None = None,  # called while waiting; an exception ends the wait
    ) -> None: ...
    def prewarm(
        self,
        model: Model,
        layers: Sequence[int] | None,  # None: all
        priority: int,
        deadline: float | None,
        evict_below: float,
    ) -> Ticket: ...
    def prewarm_host(
        self, model: Model, layers: Sequence[int] | None, priority: int, deadline: float | None
    ) -> Ticket: ...
    def swap(self, evict: Model, load: Model, priority: int) -> Ticket: ...
    def guard(
        self,
        model: Model,
        layers: Sequence[int] | None,
        timeout: float | None,  # of each acquisition
    ) -> Guard: ...
    def evict(
        self,
        model: Model,
        layers: Sequence[int] | None,
        timeout: float | None,
        wait: str,
        poll: Callable[[], None] | None = None,
    ) -> None: ...
    def fileno(self) -> int: ...
    def trim(self) -> int: ...
    def set_keep_value(self, model: Model, value: float, layer: int | None = None) -> None: ...
    def set_keep_values(self, model: Model, values: Sequence[float]) -> None: ...
    def begin_lease(
        self, models: Sequence[Model], owner: int, layers: Sequence[int] | None = None
    ) -> Lease: ...
    def read_back(self, model: Model, layer: int, out: Bytes) -> None: ...
    def digest(self, model: Model, layer: int, piece: int) -> list[int]: ...
    def device_memory(self) -> tuple[int, int]: ...  # available, total; zeros: unknown
    def stream(self, priority: str) -> Stream: ...
    def adopt_stream(self, handle: int, refuse_capture: bool = False) -> Stream: ...
    def state(self) -> RuntimeState: ...
    def driver_calls(self) -> dict[str, tuple[int, int]]: ...  # calls, nanoseconds
    def step(self) -> bool: ...
    def stop(self) -> None: ...  # ends the loader threads, whatever is leased
    def check_invariants(self) -> None: ...
    def close(
        self,
        timeout: float | None = None,
        wait: str = "streams",
        poll: Callable[[], None] | None = None,
    ) -> None: ...

def process_exits() -> None: ...

# The kernels accept any contiguous buffers. They raise ValueError if the sizes do not match.
def digest(buffer: bytes | Bytes, granule_bytes: int) -> npt.NDArray[np.uint64]: ...
def cast(
    kind: str,
    from_: bytes | Bytes,
    to: Bytes,
    scales: bytes | Bytes | None = None,
    columns: int = 0,
    block_rows: int = 0,
    block_columns: int = 0,
) -> None: ...
def gather_rows(from_: bytes | Bytes, to: Bytes, rows: int, row_bytes: int, pitch: int) -> None: ...
