"""Risk: evict, unregister or close gives up too early, waits for ever, or blocks an event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import Device, on_the_host

from warmserve_rt import Busy, Runtime, StaleView, WarmServeError

pytestmark = on_the_host

# Each call removes the model "a", or all models.
CALLS: dict[str, Callable[..., None]] = {
    "evict": lambda runtime, **options: runtime.evict("a", **options),
    "unregister": lambda runtime, **options: runtime.unregister("a", **options),
    "close": lambda runtime, **options: runtime.close(**options),
}
ASYNC: dict[str, Callable[..., Awaitable[None]]] = {
    "aevict": lambda runtime, **options: runtime.aevict("a", **options),
    "aunregister": lambda runtime, **options: runtime.aunregister("a", **options),
    "aclose": lambda runtime, **options: runtime.aclose(**options),
}


@pytest.fixture
def runtime(device: Device, two_files: dict[str, Path]) -> Iterator[Runtime]:
    made = device.runtime(arena="32MiB")
    for name, path in two_files.items():
        made.register(name, path)
    yield made
    made.close(wait="leases", timeout=20)


@contextmanager
def leased(runtime: Runtime) -> Iterator[Callable[[], None]]:
    """Let another thread lease "a" until the yielded function is called or the block ends."""
    holding, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with runtime.lease("a"):
            holding.set()
            leave.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    assert holding.wait(10)
    try:
        yield leave.set
    finally:
        leave.set()
        thread.join(20)


def gone(runtime: Runtime, name: str) -> bool:
    """Return whether the call of that name has done its work."""
    if "close" in name:
        return "closed" in repr(runtime)
    if "unregister" in name:
        return [model.name for model in runtime.models] == ["b"]
    return all(layer.residency == "absent" for layer in runtime.snapshot().models["a"].layers)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("options", [{}, {"wait": "streams"}, {"wait": "nothing", "timeout": 20}])
def test_a_lease_makes_the_call_busy_unless_it_may_wait(
    runtime: Runtime, name: str, options: dict[str, Any]
) -> None:
    with leased(runtime), pytest.raises(Busy, match="'a' is leased"):
        CALLS[name](runtime, **options)
    runtime.check_invariants()
    with runtime.lease("a"):  # the refused call has changed nothing
        pass


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("options", [{"timeout": 20}, {"wait": "leases"}])
def test_the_call_waits_for_the_lease_to_end(
    runtime: Runtime, name: str, options: dict[str, Any]
) -> None:
    with leased(runtime) as release:
        timer = threading.Timer(0.1, release)
        timer.start()
        begun = time.monotonic()
        CALLS[name](runtime, **options)
        assert time.monotonic() - begun >= 0.09
        timer.join()
    assert gone(runtime, name)


@pytest.mark.parametrize("name", CALLS)
def test_a_timeout_changes_nothing(runtime: Runtime, name: str) -> None:
    with leased(runtime):
        with pytest.raises(TimeoutError, match="'a' was still leased at the end of the timeout"):
            CALLS[name](runtime, timeout=0.05)
        with runtime.lease("a"):
            pass
    runtime.check_invariants()


@pytest.mark.parametrize("name", CALLS)
def test_invalid_waits_and_timeouts_are_refused(runtime: Runtime, name: str) -> None:
    with pytest.raises(ValueError, match="'lease'; did you mean 'leases'"):
        CALLS[name](runtime, wait="lease")
    for timeout in (-1, float("nan")):
        with pytest.raises(ValueError, match="timeout must be zero or more seconds"):
            CALLS[name](runtime, timeout=timeout)
    with pytest.raises(TypeError, match="timeout must be a number of seconds, got '3'"):
        CALLS[name](runtime, timeout="3")
    assert not gone(runtime, name) or name == "evict"


def test_a_stream_in_use_makes_the_call_busy_or_late(
    device: Device, two_files: dict[str, Path]
) -> None:
    runtime = device.runtime(arena="32MiB", pump=True)  # a stream advances only when stepped
    runtime.register("a", two_files["a"])
    stream = runtime.stream()
    with runtime.lease("a") as lease:
        out = bytearray(16)
        stream.copy_from(out, runtime.model("a").layer_bytes(0, 0, 16))
        lease.record(stream)
    for call in CALLS.values():
        with pytest.raises(Busy, match="a stream still uses"):
            call(runtime, wait="nothing")
    assert runtime.models
    stream.synchronize()
    runtime.close(wait="nothing")


def test_close_is_idempotent(runtime: Runtime) -> None:
    runtime.close()
    runtime.close(wait="leases", timeout=0)
    asyncio.run(runtime.aclose())
    with pytest.raises(WarmServeError, match="closed"):
        runtime.evict("a")


@pytest.mark.parametrize("name", ASYNC)
def test_the_event_loop_continues_during_a_wait(runtime: Runtime, name: str) -> None:
    async def main() -> int:
        turns = 0
        task = asyncio.ensure_future(ASYNC[name](runtime, timeout=20))
        while turns < 20:
            await asyncio.sleep(0.005)
            turns += 1
        assert not task.done()
        release()
        await task
        return turns

    with leased(runtime) as release:
        assert asyncio.run(main()) == 20
    assert gone(runtime, name)


@pytest.mark.parametrize("name", ASYNC)
def test_a_wait_needs_no_thread_of_the_executor(runtime: Runtime, name: str) -> None:
    """All threads of the loop's executor are busy; a wait must not need one of them."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        busy = [loop.run_in_executor(None, finish.wait, 20) for _ in range(64)]
        release()
        await asyncio.wait_for(ASYNC[name](runtime, timeout=20), 10)
        finish.set()
        await asyncio.gather(*busy)

    finish = threading.Event()
    with leased(runtime) as release:
        asyncio.run(main())
    assert gone(runtime, name)


@pytest.mark.parametrize("name", ASYNC)
def test_a_cancelled_task_ends_the_wait(runtime: Runtime, name: str) -> None:
    async def main() -> None:
        task = asyncio.ensure_future(ASYNC[name](runtime, wait="leases"))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    before = threading.active_count()
    with leased(runtime):
        asyncio.run(main())
        deadline = time.monotonic() + 20  # a thread ends a moment after its result is known
        while threading.active_count() > before + 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert threading.active_count() <= before + 1  # one thread still holds the lease
    assert not gone(runtime, name)
    runtime.check_invariants()


def test_errors_reach_the_task(runtime: Runtime) -> None:
    async def main() -> None:
        with pytest.raises(TimeoutError, match="still leased"):
            await runtime.aevict("a", timeout=0.05)
        with pytest.raises(Busy, match="'a' is leased"):
            await runtime.aunregister("a")
        with pytest.raises(ValueError, match="no model 'x'"):
            await runtime.aevict("x")

    with leased(runtime):
        asyncio.run(main())


def test_async_with_closes_the_runtime(device: Device, two_files: dict[str, Path]) -> None:
    async def main() -> Runtime:
        async with device.runtime() as runtime:
            runtime.register("a", two_files["a"])
        return runtime

    assert "closed" in repr(asyncio.run(main()))


def test_leases_that_wait_for_an_unregistered_model_end(runtime: Runtime) -> None:
    with leased(runtime) as release:
        release()
        runtime.unregister("a", timeout=20)
    with pytest.raises(ValueError, match="no model 'a'"):
        runtime.lease("a")
    with pytest.raises(StaleView):
        runtime.read_back("b", 0)
