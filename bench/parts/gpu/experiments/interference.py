"""E3 and E8: how mapping and copies disturb calls of other threads, and a model's steps."""

from __future__ import annotations

import gc
import statistics
import sys
import threading
from collections.abc import Callable
from time import perf_counter
from typing import Any

from lib.cuda import DigestCall, Gpu, NotRun, Pinned, microseconds
from lib.harness import MIB
from parts.gpu.part import GRANULE, Part
from parts.gpu.with_torch import torch_with_cuda
from warmserve_rt import _native
from warmserve_rt.core.devices import open_driver
from warmserve_rt.testing.cuda_api import READ, READ_WRITE

from . import experiment
from .ptx import SpinCall, functions
from .tools import Cycle, share_below

_MAPPED = 256  # granules whose access is set
_BETWEEN = 32  # rounds between two waits, so that no queue fills up
_NOTICED = 50.0  # microseconds
_COPY = 64 * MIB

Call = Callable[[], object]


class _Disturber:
    """Repeats a call on a thread; `inside` tells whether it is in the call now."""

    def __init__(self, cuda: Gpu, calls: list[Call], after: Call) -> None:
        self._cuda, self._calls, self._after = cuda, calls, after
        self._stop, self.inside = threading.Event(), False
        self.taken: list[float] = []  # microseconds of each call

    def __enter__(self) -> _Disturber:
        self._context = self._cuda.current()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        self._cuda.set_current(self._context)
        while not self._stop.is_set():
            for call in self._calls:
                self.inside = True
                self.taken.append(microseconds(call))
                self.inside = False
            self._after()


def _measured(cuda: Gpu) -> tuple[dict[str, Call], int]:
    """Return the calls to measure, and their stream."""
    stream, host, address = cuda.stream(), cuda.pinned(4096), cuda.mapped(GRANULE)
    done, busy = cuda.event(), cuda.stream()
    cuda.record(done, busy)
    if cuda.simulated:
        kernel: Any = DigestCall(address, 64, GRANULE, host.address)
        function = cuda.function(cuda.module(cuda.kernel_image()), "ws_granule_digest")
    else:
        kernel, (function, _) = SpinCall(0, 0), functions(cuda)
    calls: dict[str, Call] = {
        "launch": lambda: cuda.launch(function, kernel, stream),
        "query": lambda: cuda.done(done),
        "copy": lambda: cuda.htod(address, host.address, 4096, stream),
    }
    return calls, stream


@experiment("E3")
def calls_beside_mapping(part: Part) -> None:
    """Decide whether one call that maps many granules holds up launches of other threads.

    Expected: the median does not change; 99.9 % of launches take less than 50 us if the driver's
    own lock is free during a mapping call, otherwise as long as the call for 256 granules, 8 ms.
    """
    cuda = Gpu()
    calls, stream = _measured(cuda)
    cycle = Cycle(cuda, GRANULE, part.scale(_MAPPED, 16))
    cycle.map()
    host = Pinned(part.scale(256, 8) * MIB)
    host[:] = bytes(len(host.view))  # touched

    def access(granules: int) -> list[Call]:
        """Return calls that set the access of all granules, this number of them at a time."""
        step = granules * GRANULE

        def call(at: int, kind: int) -> Call:
            return lambda: cuda.set_access(at, step, kind)

        places = range(cycle.address, cycle.address + cycle.nbytes, step)
        return [call(at, kind) for kind in (READ, READ_WRITE) for at in places]

    nothing: Call = lambda: None  # noqa: E731
    disturbing: dict[str, tuple[list[Call], Call]] = {
        "access_in_one_call": (access(cycle.count), nothing),
        "access_16_by_16": (access(min(16, cycle.count)), nothing),
        "register": (
            [lambda: cuda.register(host.address, len(host.view))],
            lambda: cuda.unregister(host.address),
        ),
    }
    sys.setswitchinterval(1e-4)  # the interpreter's lock must not look like the driver's
    gc.disable()
    time = part.scale(0.6, 0.05)
    alone = _latencies(part, calls, time, lambda: cuda.synchronize(stream), "alone")
    for name, (works, after) in disturbing.items():
        with _Disturber(cuda, works, after) as disturber:
            worst = _latencies(part, calls, time, lambda: cuda.synchronize(stream), name, disturber)
        length = statistics.median(disturber.taken)
        part.row(f"{name}_us", length, "us")
        _decide(part, name.replace("_", " "), worst, alone, length)


def _latencies(
    part: Part,
    calls: dict[str, Call],
    time: float,
    wait: Call,
    name: str,
    disturber: _Disturber | None = None,
) -> float:
    """Record the latencies of calls, in microseconds; return the longest of their 99.9 %."""
    samples: dict[str, list[float]] = {call: [] for call in calls}
    end, turn = perf_counter() + time, 0
    while perf_counter() < end:
        for call, work in calls.items():
            counts = not disturber or disturber.inside
            taken = microseconds(work)
            if counts:
                samples[call].append(taken)
        turn += 1
        if turn % _BETWEEN == 0:
            wait()
    if not all(samples.values()):
        raise NotRun(f"no call was made beside {name}")
    for call, found in samples.items():
        part.row(f"{call}_{name}_p50_us", statistics.median(found), "us")
        part.row(f"{call}_{name}_p999_us", share_below(found, 0.999), "us")
    return max(share_below(found, 0.999) for found in samples.values())


def _decide(part: Part, name: str, worst: float, alone: float, length: float) -> None:
    if worst < max(_NOTICED, 2 * alone):
        part.decide(f"{name}: calls of other threads are not held up")
    elif worst > length / 2:
        part.decide(f"{name}: calls of other threads wait for the whole call, which must be short")
    else:
        part.decide(f"{name}: calls of other threads wait up to {worst:.0f} us of {length:.0f} us")


@experiment("E8")
def decoding(part: Part) -> None:
    """Decide how much copies and mapping slow down the decoding of 1.2 billion parameters.

    Expected: beside copies at 55 GB/s a step takes at most 1.03 times as long as alone, and 1.05 at
    the 99th percentile, because copies take 1 % of the memory's bandwidth; beside mapping 1.1 at
    the 99th percentile.
    """
    if part.simulated:
        raise NotRun("the simulated device does not compute")
    torch = torch_with_cuda()
    try:
        from transformers import AutoModelForCausalLM, LlamaConfig

        from parts.engines.random_models import SIZES
    except ImportError as error:
        raise NotRun(f"transformers cannot be imported: {error}") from None
    device = torch.device(part.args.device)
    config = LlamaConfig(**SIZES[part.scale("1b", "tiny")], tie_word_embeddings=True)
    auto: Any = AutoModelForCausalLM
    with device, torch.inference_mode():
        module = auto.from_config(config, dtype=torch.bfloat16).eval()
        token = torch.zeros((1, 1), dtype=torch.long)
        steps = {"eager": _eager(torch, module, token)}
        with part.question("a captured step"):
            try:
                steps["graph"] = _captured(torch, module, token)
            except RuntimeError as error:
                raise NotRun(f"the step cannot be captured: {error}") from None
        for name, step in steps.items():
            _steps(part, name, step)


def _eager(torch: Any, module: Any, token: Any) -> Call:
    def step() -> None:
        module(token, use_cache=False)
        torch.cuda.current_stream().synchronize()

    for _ in range(5):
        step()
    return step


def _captured(torch: Any, module: Any, token: Any) -> Call:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        module(token, use_cache=False)

    def step() -> None:
        graph.replay()
        torch.cuda.current_stream().synchronize()

    step()
    return step


def _steps(part: Part, name: str, step: Call) -> None:
    """Time steps alone and beside each disturbance, which needs no Python while it runs."""
    cuda, driver = Gpu(), open_driver(part.args.device, pump=False)
    region = 256 * MIB
    host, address, stream = cuda.pinned(region, b"x" * region), cuda.mapped(region), cuda.stream()

    def copies(total: int) -> Call:
        for at in range(0, total, _COPY):
            cuda.htod(address + at % region, host.address + at % region, _COPY, stream)
        return lambda: not cuda.stream_query(stream)

    def mapping(rounds: int) -> Call:
        thread = threading.Thread(
            target=_native.time_driver,
            args=(driver,),
            kwargs={"granule": 16 * MIB, "batch": 16, "rounds": rounds},
        )
        thread.start()
        return thread.is_alive

    def both() -> Call:
        moving, mapped = copies(part.scale(30_000, 512) * MIB), mapping(part.scale(800, 20))
        return lambda: moving() and mapped()

    def while_true(running: Call) -> list[float]:
        found = []
        while running():
            found.append(microseconds(step))
        cuda.synchronize(stream)
        return found

    end = perf_counter() + 1
    alone = while_true(lambda: perf_counter() < end)
    p50, p99 = statistics.median(alone), share_below(alone, 0.99)
    part.row(f"{name}_alone_p50_us", p50, "us")
    part.row(f"{name}_alone_p99_us", p99, "us")
    disturbed: dict[str, Callable[[], Call]] = {
        "copies": lambda: copies(part.scale(40_000, 512) * MIB),
        "mapping": lambda: mapping(part.scale(1000, 20)),
        "both": both,
    }
    for what, begin in disturbed.items():
        found = while_true(begin())
        if not found:
            raise NotRun(f"no step ended beside {what}")
        median = statistics.median(found) / p50
        part.row(f"{name}_beside_{what}_p50", median, "times")
        part.row(f"{name}_beside_{what}_p99", share_below(found, 0.99) / p99, "times")
        part.decide(f"{name}: a step beside {what} takes {median:.2f} times as long as alone")
