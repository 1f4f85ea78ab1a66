"""Risk: bad input, or a call at a bad moment, harms other models or the runtime.

test_checkpoint_refusals.py covers malformed checkpoint files; this file covers the cases that need
a runtime. After each refusal the invariants hold, other models serve, and a retry with good input
works.
"""

from __future__ import annotations

import math
import os
import resource
import select
import shutil
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from checkpoints import GRANULE, content, write_model, write_safetensors
from conftest import Device, bytes_of, on_the_host

from warmserve_rt import (
    Busy,
    Cancelled,
    CorruptCheckpoint,
    OutOfDeviceMemory,
    Runtime,
    StaleView,
    WarmServeError,
)

SIZES = [2 * GRANULE, 5]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "m", "m", SIZES)


@pytest.fixture
def runtime(device: Device, tmp_path: Path) -> Iterator[Runtime]:
    made = device.runtime()
    made.register("other", write_model(tmp_path / "other", "other", [1000]))
    yield made
    made.check_invariants()
    with made.lease("other"):
        assert bytes_of(made, "other", "model.layers.0.weight") == content("other", 0, 1000)


def assert_serves(runtime: Runtime, name: str, revision: int = 0) -> None:
    with runtime.lease(name):
        for layer, nbytes in enumerate(SIZES):
            wanted = content("m", layer, nbytes, revision)
            assert bytes_of(runtime, name, f"model.layers.{layer}.weight") == wanted


def replace(path: Path) -> None:
    aside = path.with_suffix(".new")
    write_model(aside, "m", SIZES, revision=1)
    os.replace(aside, path)


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def touch(path: Path) -> None:
    os.utime(path)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\0")


CHANGES = [replace, shorten, touch, overwrite]


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_changed_between_two_loads_is_refused(
    runtime: Runtime, model: Path, change: Callable[[Path], None]
) -> None:
    runtime.register("m", model)
    assert_serves(runtime, "m")
    runtime.evict("m")
    change(model)
    with pytest.raises(CorruptCheckpoint, match=r"m was replaced or changed|inside a tensor"):
        runtime.lease("m").acquire()
    runtime.unregister("m")
    replace(model)
    runtime.register("m", model)
    assert_serves(runtime, "m", revision=1)


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_changed_during_a_load_gives_no_wrong_bytes(
    device: Device, tmp_path: Path, model: Path, change: Callable[[Path], None]
) -> None:
    for steps in range(1, 6):
        path = tmp_path / f"copy{steps}"
        shutil.copyfile(model, path)
        runtime = device.runtime(pump=True)
        runtime.register("m", path)
        ticket = runtime.prewarm("m")
        for _ in range(steps):
            runtime.step()
        change(path)
        try:
            ticket.wait()
        except CorruptCheckpoint:
            while runtime.step():
                pass
            states = {layer.residency for layer in runtime.snapshot().models["m"].layers}
            assert states <= {"absent", "resident"}
            refused = steps
        else:  # the load had read the whole file before the change
            assert_serves(runtime, "m")
            break
        runtime.check_invariants()
    assert refused


def test_a_replaced_file_never_mixes_with_resident_layers(runtime: Runtime, model: Path) -> None:
    runtime.register("m", model)
    runtime.prewarm("m").wait()
    replace(model)
    assert_serves(runtime, "m")  # all resident bytes are those of the old file


def test_a_model_larger_than_the_arena_is_refused(runtime: Runtime, tmp_path: Path) -> None:
    big = write_safetensors(tmp_path / "big", {"w": ("U8", [17 << 20], bytes(17 << 20))})
    runtime.register("big", big)
    for attempt in (lambda: runtime.prewarm("big"), lambda: runtime.lease("big").acquire()):
        with pytest.raises(OutOfDeviceMemory, match=r"18 MiB of a budget of 16 MiB") as raised:
            attempt()
        assert isinstance(raised.value, MemoryError)


def test_a_prewarm_that_cannot_fit_beside_leased_layers_is_refused(
    runtime: Runtime, tmp_path: Path, model: Path
) -> None:
    big = write_safetensors(tmp_path / "big", {"w": ("U8", [12 << 20], bytes(12 << 20))})
    runtime.register("big", big)
    runtime.register("m", model)
    with runtime.lease("m"):
        with pytest.raises(Busy, match=r"'m' 6 MiB \(leased\)"):
            runtime.prewarm("big")
        with pytest.raises(Busy):
            runtime.swap(evict="other", load="big")
    runtime.prewarm("big").wait()


def test_a_lease_that_takes_the_room_of_a_prewarm_fails_it(
    device: Device, tmp_path: Path, model: Path
) -> None:
    runtime = device.runtime(pump=True)
    runtime.register("m", model)
    big = write_safetensors(tmp_path / "big", {"w": ("U8", [12 << 20], bytes(12 << 20))})
    runtime.register("big", big)
    ticket = runtime.prewarm("big")
    with runtime.lease("m"), pytest.raises(Busy, match="prewarm of 'big' needs 12 MiB"):
        ticket.wait()


def test_an_arena_larger_than_memory_is_refused() -> None:
    with pytest.raises(OutOfDeviceMemory, match="free of"):
        Runtime(arena="100TiB")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"staging": "1MiB", "chunk": "2MiB"}, "staging of 1 MiB is smaller than a chunk of 2 MiB"),
        ({"chunk": 1000}, "not a positive multiple of 4 KiB"),
        ({"chunk": 0}, "not a positive multiple of 4 KiB"),
        ({"granule": "1MiB"}, "not a positive multiple of the device's 2 MiB"),
        ({"granule": 0}, "not a positive multiple"),
        ({"arena": 5}, "holds no whole granule"),
        ({"arena": -1}, "arena must be a whole number of bytes"),
        ({"arena": "2 parsecs"}, "arena must be a whole number of bytes"),
        ({"loaders": 0}, "got 0; for no threads set pump=True"),
        ({"device": "gpu"}, "no device 'gpu'"),
        ({"tensors": "cupy"}, "cannot see this device's memory"),
        ({"tensors": "jax"}, "tensors must be 'torch', 'numpy', 'cupy' or 'dlpack', got 'jax'"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Runtime(**{"arena": "16MiB", "staging": "4MiB", "chunk": "2MiB", **options})  # type: ignore[arg-type]


def test_unknown_and_repeated_names_are_refused(runtime: Runtime, model: Path) -> None:
    made = runtime.register("m", model)
    with pytest.raises(ValueError, match="'m' is registered already"):
        runtime.register("m", model)
    for layer in (-1, 2, 99):
        with pytest.raises(ValueError, match="2 layers"):
            runtime.read_back("m", layer)
    with pytest.raises(ValueError, match="no layer 2"):
        runtime.set_keep_value("m", 1.0, layer=2)
    with pytest.raises(ValueError, match="nan"):
        runtime.set_keep_value("m", float("nan"))
    with pytest.raises(ValueError, match="no model 'x'"):
        runtime.prewarm("x")
    with pytest.raises(ValueError, match="at least one model"):
        runtime.lease([])
    with pytest.raises(ValueError, match="itself"):
        runtime.swap(evict="m", load="m")
    with pytest.raises(StaleView, match="layer 0 of 'm' is absent"):
        runtime.read_back("m", 0)
    runtime.unregister("m")
    with pytest.raises(ValueError, match="no model"):
        runtime.prewarm(made)
    runtime.register("m", model)
    with pytest.raises(ValueError, match="no model"):
        runtime.prewarm(made)  # the model of the earlier registration
    assert_serves(runtime, "m")


def test_a_model_of_another_runtime_is_refused(
    runtime: Runtime, device: Device, model: Path
) -> None:
    stranger = device.runtime()
    with pytest.raises(ValueError, match="no model"):
        runtime.prewarm(stranger.register("m", model))


def test_every_use_after_close_is_refused(device: Device, model: Path) -> None:
    runtime = device.runtime()
    registered = runtime.register("m", model)
    ticket = runtime.prewarm("m")
    lease = runtime.lease("m")
    native = runtime.native
    runtime.close()
    runtime.close()
    for use in (
        lambda: runtime.register("n", model),
        lambda: runtime.snapshot(),
        lambda: runtime.trim(),
        lambda: runtime.stream(),
        lambda: lease.acquire(),
        lambda: native.prewarm(registered.native, None, 0, None, math.inf),
        lambda: native.state(),
    ):
        with pytest.raises(WarmServeError, match="closed"):
            use()
    with suppress(Cancelled):
        ticket.wait(5)


def test_a_copy_whose_wait_fails_keeps_its_chunk(device: Device, model: Path) -> None:
    """The load fails, its only chunk is not reused too early, and the next load succeeds."""
    if device.host_view:
        pytest.skip("this device needs no staging")
    device.simulation["h2d"] = 1e9  # no copy is complete before the runtime waits for it
    runtime, watched = device.watched_runtime(
        staging="2MiB", chunk="2MiB", staging_timeout=2.0, pump=True
    )
    runtime.register("m", model)
    watched.faults.arm([(1, None)], only="event_wait")
    with pytest.raises(WarmServeError, match="event_wait: failed"):
        runtime.prewarm("m").wait()
    watched.faults.disarm()
    assert_serves(runtime, "m")


def test_a_bounded_staging_pool_does_not_grow(device: Device, model: Path) -> None:
    runtime, watched = device.watched_runtime(staging="2MiB", chunk="2MiB", loaders=3)
    runtime.register("m", model)
    watched.faults.delay("event_query", 0.01)
    for _ in range(5):
        assert_serves(runtime, "m")
        runtime.evict("m")
        assert runtime.snapshot().pinned_bytes <= GRANULE


def test_a_ticket_reports_its_end_and_progress(runtime: Runtime, model: Path) -> None:
    runtime.register("m", model)
    ticket = runtime.prewarm("m")
    assert select.select([ticket.fileno()], [], [], 20)[0]
    assert ticket.done
    assert ticket.progress == (3 * GRANULE, 3 * GRANULE)
    ticket.cancel()  # does nothing, because the ticket is done
    ticket.wait(0)
    with pytest.raises(ValueError, match="nan"):
        ticket.wait(float("nan"))


def test_a_cancelled_ticket_raises_cancelled(device: Device, model: Path) -> None:
    runtime = device.runtime(pump=True)
    runtime.register("m", model)
    ticket = runtime.prewarm("m")
    runtime.step()
    ticket.cancel()
    ticket.cancel()
    with pytest.raises(Cancelled, match="prewarm of 'm' was cancelled"):
        ticket.wait()
    assert_serves(runtime, "m")


def test_a_load_continues_after_a_wait_times_out(device: Device, model: Path) -> None:
    runtime, watched = device.watched_runtime()
    runtime.register("m", model)
    watched.faults.delay("map", 0.3)
    ticket = runtime.prewarm("m")
    with pytest.raises(TimeoutError, match=r"in time: [\d.]+ ([MK]i)?B of 6 MiB arrived"):
        ticket.wait(0.01)
    ticket.wait(20)  # the load continued after the timeout


PREAMBLE = """
import os, signal, sys, time
import numpy as np
from warmserve_rt import Runtime, WarmServeError
runtime = Runtime(arena="16MiB", tensors="numpy")
model = runtime.register("m", sys.argv[1])
runtime.prewarm("m").wait()
"""


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(str(arguments[0])).parent,  # the source tree would shadow the installed package
    )


def test_fork_gives_the_child_an_error_and_spares_the_parent(model: Path) -> None:
    done = run(
        """
        view = model.layer_bytes(0, 0, 100)
        lease = runtime.lease("m").acquire()
        child = os.fork()
        if child == 0:
            ok = 0
            for use in (lambda: runtime.prewarm("m"), lambda: runtime.evict("m"),
                        lambda: runtime.lease("m").acquire(), runtime.snapshot, runtime.close):
                try:
                    use()
                except WarmServeError as error:
                    ok += "process" in str(error)
            lease.release()
            maps = open("/proc/self/maps").read()
            inherited = "memfd:warmserve" in maps
            del runtime, model, lease, view
            sys.exit(0 if ok == 5 and not inherited else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        before = lease.tensors["model.layers.0.weight"].tobytes()
        lease.release()
        runtime.evict("m")
        with runtime.lease("m") as lease:
            assert lease.tensors["model.layers.0.weight"].tobytes() == before
        runtime.check_invariants()
        runtime.close()
        print("fine")
        """,
        model,
    )
    assert done.stdout == "fine\n", done.stderr


def test_an_in_place_write_to_weights_faults(model: Path) -> None:
    done = run(
        """
        import ctypes
        with runtime.lease("m") as lease:
            array = lease.tensors["model.layers.0.weight"]
            assert not array.flags.writeable
            print("reads", array[0] >= 0, flush=True)
            ctypes.memset(array.ctypes.data, 0, 1)
        """,
        model,
    )
    assert done.stdout == "reads True\n"
    assert done.returncode == -11


@on_the_host
def test_a_writable_model_loses_its_writes_at_eviction(runtime: Runtime, model: Path) -> None:
    runtime.register("m", model, writable=True)
    with runtime.lease("m") as lease:
        array = lease.tensors["model.layers.0.weight"]
        array[:] = 7
        assert (array == 7).all()
    runtime.evict("m")
    assert_serves(runtime, "m")


def test_reading_an_evicted_view_faults(model: Path) -> None:
    done = run(
        """
        array = runtime.tensors("m")["model.layers.0.weight"]
        runtime.evict("m")
        print("evicted", flush=True)
        array[0]
        """,
        model,
    )
    assert (done.stdout, done.returncode) == ("evicted\n", -11)


@on_the_host
def test_poison_keeps_evicted_views_readable_as_nan(device: Device, tmp_path: Path) -> None:
    path = write_safetensors(
        tmp_path / "f", {"w": ("F32", [300, 1000], struct.pack("<f", 1.5) * 300000)}
    )
    runtime = device.runtime(poison=True)
    runtime.register("f", path)
    array = runtime.tensors("f")["w"]
    for _ in range(3):
        with runtime.lease("f"):
            assert (array == 1.5).all()
        runtime.evict("f")
        assert (array != array).all()


def test_sigkill_in_the_middle_of_a_load_leaves_nothing(model: Path) -> None:
    shared = set(os.listdir("/dev/shm"))
    done = run(
        """
        runtime.evict("m")
        runtime.prewarm("m")
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        model,
    )
    assert done.returncode == -9
    assert set(os.listdir("/dev/shm")) == shared


@pytest.mark.parametrize(
    "how",
    [
        "",
        "lease = runtime.lease('m').acquire()",
        "runtime.evict('m'); runtime.prewarm('m')",
    ],
)
def test_the_interpreter_exits_cleanly_with_anything_open(model: Path, how: str) -> None:
    done = run(how + "\nprint('bye')", model)
    assert (done.stdout, done.returncode) == ("bye\n", 0), done.stderr


def test_registering_without_a_free_descriptor_can_be_repeated(
    runtime: Runtime, model: Path
) -> None:
    """The limit allows the runtime to open the file, but not to duplicate its descriptor."""
    probe = os.dup(0)
    os.close(probe)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (probe + 1, before[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            runtime.register("m", model)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    runtime.register("m", model)
    assert_serves(runtime, "m")
