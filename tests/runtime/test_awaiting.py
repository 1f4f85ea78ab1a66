"""Risk: a waiting task costs a descriptor, is never woken, or loses its cancellation."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import GRANULE, write_model

from warmserve_rt import Runtime

SIZES = {"a": [3 * GRANULE], "b": [2 * GRANULE], "c": [4 * GRANULE]}


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    with Runtime(arena=5 * GRANULE, granule=GRANULE) as runtime:
        for name, sizes in SIZES.items():
            runtime.register(name, write_model(tmp_path / name, name, sizes))
        yield runtime


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def use(runtime: Runtime, name: str, used: list[str], timeout: float | None = None) -> None:
    async with runtime.lease(name, timeout=timeout):
        used.append(name)


def test_200_tasks_that_wait_share_one_descriptor(runtime: Runtime) -> None:
    async def main() -> list[str]:
        used: list[str] = []
        runtime.prewarm("a").wait()
        before = descriptors()
        async with runtime.lease("a"):
            waiting = [asyncio.create_task(use(runtime, "c", used)) for _ in range(200)]
            await asyncio.sleep(0.05)
            assert descriptors() == before + 1
            assert not used
        await asyncio.gather(*waiting)
        assert descriptors() == before
        return used

    assert asyncio.run(main()) == ["c"] * 200
    assert runtime.snapshot().leases == 0


LIMITED = """
import asyncio, resource, sys
from warmserve_rt import Runtime
async def use(runtime, name):
    async with runtime.lease(name):
        await asyncio.sleep(0)
async def main():
    with Runtime(arena="10MiB") as runtime:
        for name in "ac":
            runtime.register(name, f"{sys.argv[1]}/{name}")
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        async with runtime.lease("a"):
            waiting = [asyncio.create_task(use(runtime, "ac"[i % 2])) for i in range(200)]
            await asyncio.sleep(0.1)
        await asyncio.gather(*waiting)
        print(runtime.snapshot().leases)
asyncio.run(main())
"""


def test_200_leases_wait_where_64_files_may_be_open(tmp_path: Path) -> None:
    for name in "ac":
        write_model(tmp_path / name, name, SIZES[name])
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/")
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_each_loop_is_woken_in_its_own_thread(runtime: Runtime) -> None:
    used: list[str] = []
    errors: list[BaseException] = []

    def serve() -> None:
        async def main() -> None:
            await asyncio.gather(*(use(runtime, name, used, 60) for name in "acbacb" * 3))

        try:
            asyncio.run(main())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=serve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors
    assert sorted(used) == sorted("acbacb" * 3 * 4)


def test_a_task_that_is_cancelled_as_its_lease_arrives_stays_cancelled(runtime: Runtime) -> None:
    """Cancel at each moment, including between the lease's arrival and the task's next turn."""

    async def main() -> None:
        for turns in range(6):
            holder = runtime.lease("a")
            await holder.__aenter__()
            used: list[str] = []
            task = asyncio.create_task(use(runtime, "c", used))
            await asyncio.sleep(0.01)
            await holder.__aexit__()
            for _ in range(turns):
                await asyncio.sleep(0)
            if turns == 5:
                await asyncio.sleep(0.05)
            late = task.done()
            task.cancel()
            if late:
                await task
            else:
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert not used
            assert runtime.snapshot().leases == 0
            runtime.evict("c")

    asyncio.run(main())


def test_a_ticket_can_be_awaited_by_many(runtime: Runtime) -> None:
    async def main() -> None:
        ticket = runtime.prewarm("a")
        before = descriptors()

        async def use() -> None:
            await ticket

        await asyncio.gather(*(use() for _ in range(50)))
        assert ticket.done
        await ticket  # returns at once
        assert descriptors() == before

    asyncio.run(main())


def test_a_wait_that_times_out_raises_timeout_error(runtime: Runtime) -> None:
    # Another task holds "a", because a task that would wait for itself is refused.
    async def apart() -> None:
        entered, leave = asyncio.Event(), asyncio.Event()

        async def hold() -> None:
            async with runtime.lease("a"):
                entered.set()
                await leave.wait()

        holder = asyncio.create_task(hold())
        await entered.wait()
        for timeout in (0.02, 0):
            with pytest.raises(TimeoutError):
                await use(runtime, "c", [], timeout)
        leave.set()
        await holder

    asyncio.run(apart())


def test_a_loop_closed_under_a_waiter_leaves_no_descriptor(runtime: Runtime) -> None:
    before = descriptors()
    holder = runtime.lease("a").acquire()
    loop = asyncio.new_event_loop()
    task = loop.create_task(use(runtime, "c", []))
    loop.run_until_complete(asyncio.sleep(0.02))
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    holder.release()
    del task, loop
    gc.collect()
    assert descriptors() <= before
    with runtime.lease("c", timeout=20):
        pass
    assert runtime.snapshot().leases == 0
