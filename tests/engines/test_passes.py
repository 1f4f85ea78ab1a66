"""Risk: weights are evicted while a module computes with them, or an eviction waits for ever."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny_transformers import PROMPT, plain_logits, save  # noqa: E402

from warmserve_rt import Busy, Runtime, StaleView, WarmServeError  # noqa: E402
from warmserve_rt.engines.transformers import load  # noqa: E402


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: save(folder / name, "llama", seed) for seed, name in enumerate("ab")}


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    with Runtime(arena="12MiB", staging="16MiB") as runtime:  # 5 layers each: one of two fits
        yield runtime


class Pass:
    """A pass of a module in a separate thread, which stops at a part of the module until `end`."""

    def __init__(self, module: Any, part: Any) -> None:
        self.inside, self.may_go = threading.Event(), threading.Event()
        self.logits: Any = None
        self.error: BaseException | None = None
        self._hook = part.register_forward_pre_hook(self._stop)
        self._thread = threading.Thread(target=self._run, args=(module,))
        self._thread.start()
        assert self.inside.wait(20)

    def _stop(self, *_: Any) -> None:
        self._hook.remove()
        self.inside.set()
        assert self.may_go.wait(20)

    def _run(self, module: Any) -> None:
        try:
            with torch.no_grad():
                self.logits = module(PROMPT).logits
        except BaseException as error:
            self.error = error

    def end(self) -> Any:
        self.may_go.set()
        self._thread.join(20)
        assert not self._thread.is_alive()
        if self.error:
            raise self.error
        return self.logits


@contextmanager
def pass_beyond_its_lease(runtime: Runtime, module: Any) -> Iterator[Pass]:
    """Yield a pass that has reached the second block and whose lease has ended."""
    with runtime.lease(module.warmserve_model):
        under_way = Pass(module, module.model.layers[1])
    try:
        yield under_way
    finally:
        under_way.may_go.set()
        under_way.end()


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(0.1)
    assert thread.is_alive()  # it waits
    return thread


def test_a_pass_keeps_its_weights_when_its_lease_ends(
    runtime: Runtime, files: dict[str, Path]
) -> None:
    a, b = (load(runtime, files[name], name=name) for name in "ab")
    with pass_beyond_its_lease(runtime, a) as under_way:
        assert runtime.snapshot().leases == 0
        done: list[Any] = []

        def other() -> None:
            with runtime.lease("b"), torch.no_grad():
                done.append(b(PROMPT).logits)

        waiting = in_thread(other)
        assert torch.equal(under_way.end(), plain_logits(files["a"]))
        waiting.join(20)
        assert torch.equal(done[0], plain_logits(files["b"]))
    runtime.check_invariants()


def test_a_pass_after_the_lease_is_refused(runtime: Runtime, files: dict[str, Path]) -> None:
    """The pass is refused even if another thread's pass still holds the weights."""
    a = load(runtime, files["a"], name="a")
    with pass_beyond_its_lease(runtime, a):
        with pytest.raises(StaleView, match="'a' is not leased"):
            a(PROMPT)
        assert not runtime.model("a").leased


def test_evictions_wait_for_a_pass_as_for_streams(runtime: Runtime, files: dict[str, Path]) -> None:
    a = load(runtime, files["a"], name="a")
    for evict in (
        lambda: runtime.evict("a"),
        lambda: runtime.evict("a", wait="leases"),
        lambda: runtime.evict("a", layers=[2]),
        lambda: runtime.unregister("a"),
    ):
        with pass_beyond_its_lease(runtime, a) as under_way:
            with pytest.raises(Busy, match="a pass still computes with 'a'"):
                runtime.evict("a", wait="nothing")
            with pytest.raises(TimeoutError):
                runtime.evict("a", timeout=0.01)
            with pytest.raises(Busy):
                runtime.close()
            waiting = in_thread(evict)
            under_way.end()
            waiting.join(20)
            assert not waiting.is_alive()
        runtime.check_invariants()
    assert "a" not in runtime.snapshot().models


def test_a_swap_of_a_computing_model_is_refused(runtime: Runtime, files: dict[str, Path]) -> None:
    a = load(runtime, files["a"], name="a")
    load(runtime, files["b"], name="b")
    busy = pytest.raises(Busy, match="a pass still computes with 'a'")
    with pass_beyond_its_lease(runtime, a), busy:
        runtime.swap(evict="a", load="b")
    runtime.swap(evict="a", load="b").wait()


def test_an_eviction_that_waits_for_a_pass_fails_at_a_new_lease(
    runtime: Runtime, files: dict[str, Path]
) -> None:
    a = load(runtime, files["a"], name="a")
    refused: list[BaseException] = []

    def evict() -> None:
        try:
            runtime.evict("a")
        except Busy as busy:
            refused.append(busy)

    with pass_beyond_its_lease(runtime, a):
        waiting = in_thread(evict)
        with runtime.lease("a"):
            waiting.join(20)
    assert "'a' is leased" in str(refused[0])


def test_a_thread_cannot_wait_for_its_own_pass(runtime: Runtime, files: dict[str, Path]) -> None:
    a = load(runtime, files["a"], name="a")
    load(runtime, files["b"], name="b")
    lease = runtime.lease("a").acquire()
    refused: list[str] = []

    def inside(*_: Any) -> None:
        if lease.held:
            lease.release()
        for wait in (
            lambda: runtime.evict("a", wait="streams", timeout=2),
            lambda: runtime.evict("a", wait="leases", timeout=2),
            lambda: runtime.unregister("a", wait="streams", timeout=2),
            lambda: runtime.lease("b", timeout=2).acquire(),
            runtime.close,
        ):
            with pytest.raises(Busy) as error:
                wait()
            refused.append(str(error.value))
        with runtime.lease("a"):  # the pass holds it already
            pass

    a.model.layers[1].register_forward_pre_hook(inside)
    with torch.no_grad():
        assert torch.equal(a(PROMPT).logits, plain_logits(files["a"]))
    assert len(refused) == 5
    assert "would wait for itself" in refused[0]
    runtime.evict("a")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, asyncio.CancelledError])
def test_a_failed_pass_releases_its_layers(
    runtime: Runtime, files: dict[str, Path], error: type[BaseException]
) -> None:
    """torch runs no hooks after an interrupt; the pass must still end."""
    a = load(runtime, files["a"], name="a")

    def fail(*_: Any) -> None:
        raise error("in the middle")

    for options in ({}, {"streaming": True}, {"layers": 3}):
        hook = a.model.layers[1].register_forward_pre_hook(fail)
        with runtime.lease("a", **options), pytest.raises(error, match="in the middle"):
            a(PROMPT)
        hook.remove()
        runtime.evict("a", wait="nothing")
    with runtime.lease("a"), torch.no_grad():
        assert torch.equal(a(PROMPT).logits, plain_logits(files["a"]))


def test_a_pass_within_a_pass_outlives_the_lease(runtime: Runtime, files: dict[str, Path]) -> None:
    """The base model is also an entry point, and a module may call itself."""
    a = load(runtime, files["a"], name="a")
    lease = runtime.lease("a").acquire()
    again: list[Any] = []

    def recurse(*_: Any) -> None:
        hook.remove()
        lease.release()
        again.append(a(PROMPT).logits)
        with pytest.raises(Busy):  # the outer pass goes on
            runtime.evict("a", wait="nothing")

    hook = a.model.layers[1].register_forward_pre_hook(recurse)
    with torch.no_grad():
        assert torch.equal(a(PROMPT).logits, plain_logits(files["a"]))
    assert torch.equal(again[0], plain_logits(files["a"]))
    runtime.evict("a", wait="nothing")


def test_a_pass_holds_only_the_leased_layers(runtime: Runtime, files: dict[str, Path]) -> None:
    a = load(runtime, files["a"], name="a")
    runtime.prewarm("a").wait()
    with runtime.lease("a", layers=3):
        under_way = Pass(a, a.model.layers[1])
    runtime.evict("a", layers=[3, 4], wait="nothing")
    with pytest.raises(Busy):
        runtime.evict("a", layers=[2], wait="nothing")
    with runtime.lease("a", layers=[4]), pytest.raises(StaleView):
        a(PROMPT)  # holds only the last layer; the other pass does not count
    with pytest.raises(StaleView, match="layer 3 of 'a' is not leased"):
        under_way.end()
    runtime.evict("a", wait="nothing")
    runtime.check_invariants()


def test_a_pass_takes_layers_that_are_leased_while_it_runs(
    runtime: Runtime, files: dict[str, Path]
) -> None:
    a = load(runtime, files["a"], name="a")
    with runtime.lease("a", layers=3):
        under_way = Pass(a, a.model.layers[1])
        with runtime.lease("a", layers=[3, 4]):
            assert torch.equal(under_way.end(), plain_logits(files["a"]))
    runtime.evict("a", wait="nothing")
    runtime.check_invariants()


def test_a_pass_without_gates_removes_none_of_another_pass(
    runtime: Runtime, files: dict[str, Path]
) -> None:
    """The first pass holds some layers. The second holds all and removes no gate of the first."""
    a = load(runtime, files["a"], name="a")
    with runtime.lease("a", layers=3):
        under_way = Pass(a, a.model.layers[1])
    with runtime.lease("a"), torch.no_grad():
        a(PROMPT)
    runtime.evict("a", layers=[3, 4], wait="nothing")
    with pytest.raises(StaleView, match="layer 3"):
        under_way.end()


def test_a_layer_whose_lease_ends_before_it_arrives_is_not_waited_for(
    files: dict[str, Path],
) -> None:
    with Runtime(arena="12MiB", staging="16MiB", read_bandwidth=30_000) as runtime:
        a = load(runtime, files["a"], name="a")
        lease = runtime.lease("a", streaming=True).acquire()
        errors: list[BaseException] = []

        def compute() -> None:
            try:
                a(PROMPT)
            except StaleView as error:
                errors.append(error)

        waiting = in_thread(compute)
        lease.release()
        waiting.join(20)
        assert not waiting.is_alive()
        assert "its lease ended before it arrived" in str(errors[0])
        runtime.check_invariants()


def test_threads_compute_under_leases_that_come_and_go(
    runtime: Runtime, files: dict[str, Path]
) -> None:
    modules = {name: load(runtime, files[name], name=name) for name in "ab"}
    wanted = {name: plain_logits(files[name]) for name in "ab"}
    over = threading.Event()
    wrong: list[object] = []
    computed = dict.fromkeys("ab", 0)

    def compute(name: str) -> None:
        with torch.no_grad():
            while not over.is_set():
                try:
                    logits = modules[name](PROMPT).logits
                except StaleView:
                    continue
                except BaseException as error:
                    wrong.append(error)
                    return
                computed[name] += 1
                if not torch.equal(logits, wanted[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=compute, args=(name,)) for name in "abab"]
    for thread in threads:
        thread.start()
    for turn in range(40):
        with runtime.lease("ab"[turn % 2], streaming=turn % 3 == 0, timeout=60):
            threading.Event().wait(0.01)
    over.set()
    for thread in threads:
        thread.join(20)
    assert not wrong
    assert all(computed.values())
    runtime.check_invariants()
    for name in "ab":
        runtime.evict(name, wait="nothing")


def test_a_forked_child_has_no_pass(runtime: Runtime, files: dict[str, Path]) -> None:
    a = load(runtime, files["a"], name="a")
    codes: list[int] = []

    def fork(*_: Any) -> None:
        child = os.fork()
        if child == 0:
            try:
                a(PROMPT)
            except WarmServeError:
                os._exit(7)
            os._exit(1)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    a.model.layers[1].register_forward_pre_hook(fork)
    with runtime.lease("a"), torch.no_grad():
        a(PROMPT)
    assert codes == [7]
    runtime.evict("a", wait="nothing")


HANG_UP = """
import asyncio, sys, torch
from warmserve_rt import Runtime, StaleView
from warmserve_rt.engines.transformers import load
torch.set_num_threads(1)
runtime = Runtime(arena="12MiB", staging="16MiB")
a, b = (load(runtime, path) for path in sys.argv[1:])
prompt = torch.ones(64, 4, dtype=torch.long)
ended = []
def compute():
    try:
        while True:
            a(prompt)
    except StaleView:
        ended.append("stale")
async def request():
    async with runtime.lease("a"):
        await asyncio.to_thread(compute)
async def main():
    for _ in range(10):
        task = asyncio.create_task(request())
        await asyncio.sleep(0.05)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            pass
        async with runtime.lease("b"):
            b(prompt)
asyncio.run(main())
print(len(ended), runtime.snapshot().leases)
"""


def test_a_client_that_hangs_up_does_not_crash_the_process(files: dict[str, Path]) -> None:
    command = [sys.executable, "-c", HANG_UP, *map(str, files.values())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/")
    assert (done.returncode, done.stdout) == (0, "10 0\n"), done.stderr
