"""Risk: our tests draw wrong conclusions, because the simulated driver's clock, faults, counts or
options are not what they claim."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from warmserve_rt.testing import simulated_cuda, simulated_cuda_fixture
from warmserve_rt.testing.cuda_api import PAGE, Cuda, code
from warmserve_rt.testing.simcuda import SimulatedCuda

G = 2 << 20
RATE = 1e9

plain = simulated_cuda_fixture(memory="64MiB", leaks=True)


def test_the_fixture_gives_an_unused_driver(plain: SimulatedCuda) -> None:
    cuda = Cuda(plain.library).start()
    assert cuda.memory() == (64 << 20, 64 << 20)
    cuda.release_primary()


def elapsed(simulated: SimulatedCuda, work: Callable[[], object]) -> float:
    before = simulated.now
    work()
    return simulated.now - before


def test_copies_take_bytes_over_bandwidth() -> None:
    with simulated_cuda(clock="virtual", h2d=RATE, d2h=RATE / 2) as simulated:
        cuda = Cuda(simulated.library).start()
        host, there, back = cuda.pinned(4 * G), cuda.mapped(4 * G), cuda.mapped(4 * G)
        one, two = cuda.stream(), cuda.stream()

        def copies(*each: tuple[str, int]) -> Callable[[], object]:
            def run() -> None:
                for direction, stream in each:
                    if direction == "h2d":
                        cuda.htod(there, host.address, G, stream)
                    else:
                        cuda.dtoh(host.address + G, back, G, stream)
                cuda.synchronize(one)
                cuda.synchronize(two)

            return run

        cuda.memset(back, 0, G, one)
        cuda.synchronize(one)
        seconds = G / RATE
        assert elapsed(simulated, copies(("h2d", one))) == pytest.approx(seconds, rel=1e-6)
        assert elapsed(simulated, copies(("d2h", one))) == pytest.approx(2 * seconds, rel=1e-6)
        # Each direction has one engine: copies overlap across directions, not within one.
        assert elapsed(simulated, copies(("h2d", one), ("d2h", two))) == pytest.approx(
            2 * seconds, rel=1e-6
        )
        assert elapsed(simulated, copies(("d2h", one), ("d2h", one))) == pytest.approx(
            4 * seconds, rel=1e-6
        )
        assert simulated.copied == {"h2d": 2 * G, "d2h": 4 * G, "d2d": 0}


def test_engines_are_shared_between_streams() -> None:
    with simulated_cuda(clock="virtual", h2d=RATE) as simulated:
        cuda = Cuda(simulated.library).start()
        host, there = cuda.pinned(2 * G), cuda.mapped(2 * G)
        streams = [cuda.stream(), cuda.stream()]
        begun = simulated.now
        for i, stream in enumerate(streams):
            cuda.htod(there + i * G, host.address + i * G, G, stream)
        cuda.context_synchronize()
        assert simulated.now - begun == pytest.approx(2 * G / RATE, rel=1e-6)


def test_calls_take_their_given_cost() -> None:
    costs = {"cuMemMap": (1.5, 0.25), "cuMemSetAccess": (3.0, 36.0), "cuMemUnmap": (0.0, 26.0)}
    with simulated_cuda(clock="virtual", costs=costs) as simulated:
        cuda = Cuda(simulated.library).start()
        address, large, small = cuda.reserve(6 * G), cuda.create(5 * G), cuda.create(G)
        us = {
            "map": elapsed(simulated, lambda: cuda.map(address, 5 * G, large)),
            "map more": elapsed(simulated, lambda: cuda.map(address + 5 * G, G, small)),
            "access": elapsed(simulated, lambda: cuda.set_access(address, 6 * G)),
            "unmap": elapsed(simulated, lambda: cuda.unmap(address, 6 * G)),
            "free": elapsed(simulated, lambda: cuda.address_free(address, 6 * G)),
        }
        expected = {
            "map": 2.75e-6,
            "map more": 1.75e-6,
            "access": 75e-6,  # for two mappings
            "unmap": 52e-6,
            "free": 0.0,
        }
        assert us == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", ["cuMemRelease", "cuEventDestroy", "cuEventDestroy_v2"])
def test_calls_without_bytes_pay_no_cost_per_byte(name: str) -> None:
    with simulated_cuda(clock="virtual", costs={name: (3.0, 100.0)}) as simulated:
        cuda = Cuda(simulated.library).start()
        handle, event = cuda.create(G), cuda.event()

        def calls() -> None:
            cuda.release(handle)
            cuda.event_destroy(event)

        assert elapsed(simulated, calls) == pytest.approx(3e-6, abs=1e-9)


def test_a_plain_name_means_all_versions_of_a_function() -> None:
    with simulated_cuda(clock="virtual", costs={"cuMemcpyHtoD": (5.0, 0.0)}) as simulated:
        cuda = Cuda(simulated.library).start()
        address, host = cuda.mapped(G), cuda.pinned(PAGE)
        assert elapsed(simulated, lambda: cuda.htod(address, host.address, 8)) == pytest.approx(
            5e-6
        )
    with simulated_cuda(clock="virtual", costs={"cuCtxSynchronize": (5.0, 0.0)}) as simulated:
        cuda = Cuda(simulated.library).start()
        assert elapsed(simulated, cuda.context_synchronize) == pytest.approx(5e-6)
        newer = lambda: cuda.call("cuCtxSynchronize_v2", cuda.current())  # noqa: E731
        assert elapsed(simulated, newer) == pytest.approx(5e-6)


def test_calls_take_their_given_cost_by_the_real_clock_too() -> None:
    with simulated_cuda(costs={"cuMemAddressReserve": (2e3, 0)}) as simulated:
        cuda = Cuda(simulated.library).start()
        taken = [elapsed(simulated, lambda: cuda.reserve(G)) for _ in range(20)]
        assert min(taken) >= 0.002
        assert min(taken) < 0.0025


def test_the_virtual_clock_is_deterministic() -> None:
    def run() -> dict[str, object]:
        options = {"cuMemcpyHtoDAsync_v2": (2.8, 0.0), "cuEventQuery": (1.0, 0.0)}
        with simulated_cuda(clock="virtual", h2d=RATE / 10, costs=options) as simulated:
            cuda = Cuda(simulated.library).start()
            host, there = cuda.pinned(2 * G), cuda.mapped(2 * G)
            event, streams = cuda.event(), [cuda.stream(), cuda.stream()]
            for i in range(10):
                cuda.htod(there + i, host.address, 1000 * i + 1, streams[0])
            cuda.record(event, streams[0])
            polls = 0
            while not cuda.done(event):
                polls += 1
            return {**simulated.report(), "polls": polls}

    first = run()
    assert first == run()
    assert isinstance(first["polls"], int)
    assert first["polls"] > 10


def test_polling_without_costs_comes_to_an_end() -> None:
    with simulated_cuda(clock="virtual", h2d=RATE) as simulated:
        cuda = Cuda(simulated.library).start()
        event, stream = cuda.event(), cuda.stream()
        cuda.htod(cuda.mapped(G), cuda.pinned(G).address, G, stream)
        cuda.record(event, stream)
        assert any(cuda.done(event) for _ in range(100_000))


def test_content_may_be_a_sample() -> None:
    with simulated_cuda(memory="64MiB", content=PAGE) as simulated:
        cuda = Cuda(simulated.library).start()
        address, host = cuda.mapped(2 * G), cuda.pinned(2 * G, b"\x07" * 2 * G)
        cuda.htod(address, host.address, 2 * G)
        granule = b"\x07" * PAGE + bytes(G - PAGE)
        assert simulated.peek(address, 2 * G) == granule * 2
        cuda.dtoh(host.address, address, 2 * G)
        assert host[: 2 * G] == granule * 2


def test_memory_is_bounded_and_shared_with_other_processes() -> None:
    with simulated_cuda(memory="8MiB") as simulated:
        cuda = Cuda(simulated.library).start()
        held = [cuda.create(G)]
        simulated.others_hold(2 * G)
        assert cuda.memory() == (G, 4 * G)
        held.append(cuda.create(G))
        assert code(cuda.create, G) == 2
        cuda.release(held.pop())
        assert code(cuda.create, 2 * G) == 2
        simulated.others_hold(0)
        assert cuda.memory() == (3 * G, 4 * G)
        cuda.create(3 * G)


def test_faults_fail_the_chosen_calls() -> None:
    with simulated_cuda() as simulated:
        cuda = Cuda(simulated.library).start()
        faults, address, handle = simulated.faults, cuda.reserve(G), cuda.create(G)
        faults.arm([(2, 3), (5, None)], only="cuMemUnmap", status="out_of_memory")
        results = []
        for _ in range(6):
            cuda.map(address, G, handle)  # works only if the unmap before it did
            results.append(code(cuda.unmap, address, G))
            if results[-1]:
                assert code(cuda.map, address, G, handle) == 1
                break
        assert (results, faults.calls, faults.injected, faults.last) == ([0, 2], 2, 1, "cuMemUnmap")
        faults.disarm()
        cuda.unmap(address, G)
        faults.arm([(2, 2)], status=801)
        assert [code(cuda.reserve, G), code(cuda.create, G), code(cuda.create, G)] == [0, 801, 0]
        assert (faults.calls, faults.injected, faults.last) == (3, 1, "cuMemCreate")
        faults.arm([(1, None)], status="device_lost")
        assert code(cuda.memory) == 700
        faults.disarm()
        assert faults.calls == 0
        assert code(cuda.memory) == 700  # the context stays dead
        with pytest.raises(ValueError, match="status must be one of failed, out_of_memory"):
            faults.arm([], status="bad")
        with pytest.raises(ValueError, match="unknown function 'cuMemPonder'"):
            faults.arm([(1, 1)], only="cuMemPonder")


def test_calls_are_counted_and_leaks_reported() -> None:
    with simulated_cuda(check=False) as simulated:
        cuda = Cuda(simulated.library).start()
        cuda.create(G)
        stream = cuda.stream()
        assert code(cuda.unmap, 0, G) == 1
        assert (simulated.calls["cuMemUnmap"], simulated.calls["cuMemCreate"]) == (1, 1)
        cuda.stream_destroy(stream)
        left = {kind: count for kind, count in simulated.live.items() if count}
        simulated.check(leaks=False)
        with pytest.raises(AssertionError, match="leak") as raised:
            simulated.check()
        assert len(left) == str(raised.value).count("  leak")


def test_a_new_driver_starts_without_earlier_state() -> None:
    for _ in range(2):
        with simulated_cuda() as simulated:
            cuda = Cuda(simulated.library)
            assert code(cuda.memory) == 3
            assert simulated.report()["violations"] == []
            cuda.start().mapped(G)
            assert cuda.memory()[0] == (8 << 30) - G
    with pytest.raises(AssertionError, match="leak"), simulated_cuda(leaks=True) as simulated:
        Cuda(simulated.library).start().mapped(G)


def test_options_reach_programs() -> None:
    with simulated_cuda(
        devices=3, visible="2,0,9,1", driver_version=12040, capability=80, integrated=True
    ) as simulated:
        cuda = Cuda(simulated.library).start()
        assert cuda.device_count() == 2
        assert cuda.out("cuDriverGetVersion") == 12040
        assert [cuda.attribute(75), cuda.attribute(76), cuda.attribute(18)] == [8, 0, 1]
        found = subprocess.run(
            [
                sys.executable,
                "-c",
                "import ctypes; cuda = ctypes.CDLL('libcuda.so.1'); n = ctypes.c_int();"
                "cuda.cuInit(0); cuda.cuDeviceGetCount(ctypes.byref(n)); print(n.value)",
            ],
            env=simulated.environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert found.stdout == "2\n"


def test_a_process_can_open_only_one_driver() -> None:
    with simulated_cuda(), pytest.raises(ValueError, match="already open"), simulated_cuda():
        raise AssertionError
    with simulated_cuda():
        pass


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"clock": "fast"}, "invalid option: clock=fast"),
        ({"integrated": True, "content": PAGE}, "content must be 0 with host_numa or integrated"),
        ({"granularity": 3000}, "invalid option: granularity=3000"),
        ({"h2d": -1}, "invalid option: h2d=-1"),
        ({"costs": {"cuMemPonder": (1, 1)}}, r"invalid option: cost\.cuMemPonder=1\+1"),
        ({"memory": "lots"}, "memory must be a whole number of bytes or a string .*, got 'lots'"),
        ({"library": "/nowhere.so"}, "/nowhere.so does not exist"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence), simulated_cuda(**options):  # type: ignore[arg-type]
        raise AssertionError
    with simulated_cuda():
        pass
