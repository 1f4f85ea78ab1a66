"""E12: captured events, streams of others, dependent launches, and waits of unregister."""

from __future__ import annotations

import ctypes
from signal import Signals

from lib.cuda import Gate, Gpu, NotRun, code
from parts.gpu.part import GRANULE, Part
from warmserve_rt.testing.cuda_api import PAGE, READ
from warmserve_rt.testing.cuda_types import SIGNATURES, i32, pointer, u32, u64

from . import experiment, ipc
from .channel import child
from .ptx import TRIGGERING, PeekCall, SpinCall, functions

_SERIALIZATION = 6  # attribute of a launch: it may begin before the kernel before it has ended
_SPIN = 10_000_000  # nanoseconds of the first kernel of a pair
_DELAY = 2000  # microseconds before the copy, so that a kernel that does not wait reads old bytes


class _Attribute(ctypes.Structure):
    _fields_ = [("id", i32), ("value", u64 * 8)]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", u32 * 3),
        ("block", u32 * 3),
        ("shared_bytes", u32),
        ("stream", u64),
        ("attributes", pointer),
        ("count", u32),
    ]


SIGNATURES |= {
    "cuCtxCreate_v2": (pointer, u32, i32),
    "cuLaunchKernelEx": (pointer, u64, pointer, pointer),
}


@experiment("E12")
def borders(part: Part) -> None:
    """Decide how the runtime must guard captures, streams of others and dependent launches.

    Expected: 907 for a query of an event recorded in a capture; 400 for a record on a stream that
    is destroyed or of another context; a dependent launch reads what a copy before its wait wrote;
    unregistering waits for its own context's streams alone.
    """
    cuda = Gpu()
    with part.question("an event recorded in a capture"):
        _captured_event(part, cuda)
    with part.question("a stream of another context"):
        _foreign_stream(part, cuda)
    with part.question("unregistering"):
        _unregister(part, cuda)
    with part.question("a dependent launch"):
        _dependent_launch(part, cuda)
    with part.question("a destroyed stream"):
        _destroyed_stream(part)


def _captured_event(part: Part, cuda: Gpu) -> None:
    stream, event = cuda.stream(), cuda.event()
    cuda.begin_capture(stream)
    cuda.record(event, stream)
    query = code(cuda.done, event)
    end = code(cuda.end_capture, stream)
    part.row("captured_event_query", query, "code")
    part.row("captured_event_end_capture", end, "code")
    part.decide(
        f"the query of an event recorded in a capture returns {query}, the capture ends with "
        f"{end}: a fence must "
        + (
            "refuse streams that are captured"
            if query
            else "recognise captured events in another way"
        )
    )


def _other_context(cuda: Gpu) -> tuple[int, int]:
    """Return another context of the device and a stream of it; the current context stays."""
    own = cuda.current()
    other = cuda.out("cuCtxCreate_v2", 0, 0)
    stream = cuda.stream()
    cuda.set_current(own)
    return other, stream


def _foreign_stream(part: Part, cuda: Gpu) -> None:
    _, stream = _other_context(cuda)
    result = code(cuda.record, cuda.event(), stream)
    after = code(cuda.context_synchronize)
    part.row("record_on_foreign_stream", result, "code")
    part.row("synchronize_after_it", after, "code")
    part.decide(
        f"a record on a stream of another context returns {result}, and the device "
        + ("is lost" if after else "works on: the error must not count as a lost device")
    )


def _unregister(part: Part, cuda: Gpu) -> None:
    own, stream = cuda.current(), cuda.stream()
    other, foreign = _other_context(cuda)
    waits = {}
    for name, context, busy in (("own", own, stream), ("other", other, foreign)):
        host = cuda.pinned(PAGE)
        cuda.set_current(context)
        with Gate(cuda, busy) as gate:
            cuda.set_current(own)
            cuda.unregister(host.address)
            waits[name] = gate.expired
        part.row(f"unregister_waits_for_{name}_context", int(waits[name]), "")
    part.decide(
        "unregistering waits for "
        + (
            "streams of every context"
            if waits["other"]
            else "streams of its own context alone"
            if waits["own"]
            else "no stream"
        )
    )


def _launch_dependent(cuda: Gpu, function: int, call: ctypes.Structure, stream: int) -> None:
    attribute = _Attribute(id=_SERIALIZATION)
    attribute.value[0] = 1
    ones = (u32 * 3)(1, 1, 1)
    launch = _Launch(ones, ones, 0, stream, ctypes.addressof(attribute), 1)
    parameters = (pointer * 1)(ctypes.addressof(call))
    cuda.call("cuLaunchKernelEx", ctypes.byref(launch), function, parameters, None)


def _dependent_launch(part: Part, cuda: Gpu) -> None:
    """Fill a granule through one alias while a kernel runs whose dependent reads another alias."""
    if not cuda.simulated and cuda.attribute(75) < 9:  # the compute capability's major number
        raise NotRun("the device has no dependent launches")
    spin, peek = functions(cuda, TRIGGERING)
    handle = cuda.create(GRANULE)
    written = ipc.mapped(cuda, handle, GRANULE)
    read = ipc.mapped(cuda, handle, GRANULE, READ)
    clock, out = cuda.mapped(GRANULE), cuda.mapped(GRANULE)
    copies, kernels, event = cuda.stream(), cuda.stream(), cuda.event()

    def content(address: int) -> int:
        host = cuda.pinned(PAGE)
        cuda.dtoh(host.address, address, 8)
        return int.from_bytes(host[:8], "little")

    cuda.launch(spin, SpinCall(_SPIN, clock), kernels)
    _launch_dependent(cuda, peek, PeekCall(clock, out), kernels)
    cuda.synchronize(kernels)
    overlaps = content(out) < content(clock)
    part.row("dependent_launch_overlaps", int(overlaps), "")
    wrong, rounds = 0, part.scale(20, 5)
    for turn in range(1, rounds + 1):
        source = cuda.pinned(PAGE, turn.to_bytes(8, "little"))
        cuda.sleep(copies, _DELAY)
        cuda.htod(written, source.address, 8, copies)
        cuda.record(event, copies)
        cuda.launch(spin, SpinCall(_SPIN, 0), kernels)
        cuda.wait(kernels, event)
        _launch_dependent(cuda, peek, PeekCall(read, out), kernels)
        cuda.synchronize(kernels)
        wrong += content(out) != turn
    part.row("dependent_launch_wrong", wrong, "rounds")
    if not overlaps:
        part.decide("a dependent launch does not overlap here, so its reads prove nothing")
    elif wrong:
        part.decide("a dependent launch overtakes a wait: it must be forbidden behind arrivals")
    else:
        part.decide("a dependent launch behind a wait reads what the copy wrote")


def _destroyed_stream(part: Part) -> None:
    with child("record_destroyed") as channel:
        try:
            result = channel.receive()[0]
        except NotRun:
            assert channel.process
            part.decide(
                "a record on a destroyed stream ends the process by "
                f"{Signals(-channel.process.wait()).name}: streams of others must be alive"
            )
            return
    part.row("record_on_destroyed_stream", int(result), "code")
    part.decide(f"a record on a destroyed stream returns {result}")
