"""Risk: a guard, which a client acquires without a lock, loses its layers while it is held,
or keeps them when it is not held."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from processes import SIZES, expected
from warmserve_rt import Broker, Busy, Model, Runtime, StaleView


def weights(model: Model) -> list[bytes]:
    return [tensor.tobytes() for tensor in model.tensors().values()]


@pytest.fixture
def memory(tmp_path: Path, files: dict[str, Path]) -> Iterator[Runtime]:
    """Return the runtime of a broker whose arena has room for one of the models."""
    with (
        Runtime("host", arena=8 << 20, tensors="numpy") as runtime,
        Broker(runtime, tmp_path / "run" / "s"),
    ):
        yield runtime


@pytest.fixture(params=["client", "alone"])
def runtime(
    request: pytest.FixtureRequest, memory: Runtime, tmp_path: Path, files: dict[str, Path]
) -> Iterator[Runtime]:
    """Return a runtime with two models, of which one fits: a client of a broker, or not."""
    options = (
        {"broker": tmp_path / "run" / "s"} if request.param == "client" else {"arena": 8 << 20}
    )
    with Runtime("host", tensors="numpy", **options) as made:
        for name in "ab":
            made.register(name, files[name])
        yield made


def test_a_guard_holds_its_layers_until_the_last_release(runtime: Runtime) -> None:
    guard = runtime.guard("a")
    with guard, guard:
        assert guard.holds == 2
        guard.release()
        assert weights(runtime.model("a")) == expected("a")
        with pytest.raises(Busy):
            runtime.evict("a", wait="nothing")
        guard.acquire()
    assert guard.holds == 0
    runtime.evict("a", wait="nothing")
    with guard:
        assert weights(runtime.model("a")) == expected("a")


def test_a_guard_that_is_not_held_gives_way_to_another_lease(runtime: Runtime) -> None:
    first, second = runtime.guard("a", timeout=10), runtime.guard("b", timeout=10)
    for _ in range(3):
        with first:
            assert weights(runtime.model("a")) == expected("a")
        with second:
            assert weights(runtime.model("b")) == expected("b")
    with runtime.lease("a", timeout=10) as lease:
        assert len(lease.tensors) == len(SIZES)


def test_a_guard_waits_for_room_and_for_at_most_its_timeout(runtime: Runtime) -> None:
    other, guard = runtime.guard("a"), runtime.guard("b", timeout=0.05)
    thread = threading.Thread(target=other.acquire)  # this thread would wait for itself
    thread.start()
    thread.join()
    with pytest.raises(TimeoutError):
        guard.acquire()
    assert guard.holds == 0
    other.release()
    with guard:
        assert weights(runtime.model("b")) == expected("b")


def test_a_guard_of_some_layers_loads_no_others(runtime: Runtime) -> None:
    with runtime.guard("a", layers=[1]):
        layers = runtime.snapshot().models["a"].layers
        assert [layer.residency for layer in layers] == ["absent", "resident", "absent"]


def test_a_guard_that_is_dropped_while_it_is_held_ends_its_hold(runtime: Runtime) -> None:
    guard = runtime.guard("a")
    guard.acquire()
    del guard
    runtime.evict("a", wait="nothing")
    with runtime.lease("b", timeout=10):
        runtime.check_invariants()


def test_a_release_without_a_hold_is_refused(runtime: Runtime) -> None:
    with pytest.raises(StaleView, match="not held"):
        runtime.guard("a").release()


def test_threads_may_share_a_guard(runtime: Runtime) -> None:
    guards = {name: runtime.guard(name, timeout=30) for name in "ab"}
    wrong: list[object] = []

    def use(name: str) -> None:
        try:
            for _ in range(100):
                with guards[name]:
                    if weights(runtime.model(name)) != expected(name):
                        wrong.append(name)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=use, args=(name,)) for name in "aabb"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    runtime.check_invariants()


def test_a_held_guard_keeps_its_layers_from_another_client(
    memory: Runtime, tmp_path: Path, files: dict[str, Path]
) -> None:
    socket = tmp_path / "run" / "s"
    with (
        Runtime("host", broker=socket, tensors="numpy") as one,
        Runtime("host", broker=socket, tensors="numpy") as two,
    ):
        one.register("a", files["a"])
        two.register("b", files["b"])
        guard = one.guard("a")
        with guard:
            with pytest.raises(TimeoutError):
                two.lease("b", timeout=0.3).acquire()
            assert weights(one.model("a")) == expected("a")
        with two.lease("b", timeout=10):
            assert weights(two.model("b")) == expected("b")
        with guard:
            assert weights(one.model("a")) == expected("a")


def test_a_served_arena_is_not_trimmed(memory: Runtime) -> None:
    with pytest.raises(ValueError, match=r"trim\(\)"):
        memory.trim()
