"""Risk: a system limit kills the process, or the error does not name the limit."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoints import write_model

from warmserve_rt import OutOfDeviceMemory, Runtime, _native

MIB = 1 << 20


def _run(code: str, *arguments: object) -> str:
    """Run a program in another process, with helpers such as `limit`; return its output."""
    begin = """
import resource, signal, sys
from warmserve_rt import *
from warmserve_rt import _native
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
def limit(which, value):
    resource.setrlimit(which, (value, resource.getrlimit(which)[1]))
def used():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
def error_of(call):
    try:
        call()
    except Exception as error:
        print(type(error).__name__, error)
    else:
        print("no error")
"""
    command = [sys.executable, "-c", begin + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/")
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout


LOAD = """
def load(arena):
    with Runtime(arena=arena, tensors="numpy", loaders=1) as runtime:
        runtime.register("m", sys.argv[1])
        with runtime.lease("m") as lease:
            print(len(lease.tensors), "tensors")
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "m.safetensors", "m", [3 * MIB, 5 * MIB])


def test_an_arena_below_the_limit_of_file_sizes_works(model: Path) -> None:
    assert "2 tensors" in _run(
        LOAD + "limit(resource.RLIMIT_FSIZE, 64 << 20); load('32MiB')", model
    )


def test_an_arena_above_the_limit_of_file_sizes_names_it_and_is_not_killed(model: Path) -> None:
    said = _run(
        LOAD + "limit(resource.RLIMIT_FSIZE, 64 << 20); error_of(lambda: load('96MiB'))", model
    )
    assert said.startswith("OutOfDeviceMemory")
    assert "ftruncate" in said
    assert "RLIMIT_FSIZE (ulimit -f) is 64 MiB" in said


def test_an_arena_below_the_limit_of_addresses_works(model: Path) -> None:
    code = LOAD + "limit(resource.RLIMIT_AS, used() + (256 << 20)); load('32MiB')"
    assert "2 tensors" in _run(code, model)


def test_an_arena_above_the_limit_of_addresses_names_it(model: Path) -> None:
    code = LOAD + "limit(resource.RLIMIT_AS, used() + (256 << 20)); error_of(lambda: load('1GiB'))"
    said = _run(code, model)
    assert said.startswith("OutOfDeviceMemory")
    assert "mmap of" in said
    assert "errno 12" in said
    assert "RLIMIT_AS (ulimit -v) is" in said


def test_a_model_above_the_limit_of_addresses_can_be_tried_again(model: Path) -> None:
    code = """
with Runtime(arena="32MiB", tensors="numpy", loaders=1) as runtime:
    runtime.register("m", sys.argv[1])
    before = resource.getrlimit(resource.RLIMIT_AS)[0]
    limit(resource.RLIMIT_AS, used() + (1 << 20))
    error_of(lambda: runtime.prewarm("m"))
    limit(resource.RLIMIT_AS, before)
    runtime.prewarm("m").wait()
    print("loaded")
"""
    said = _run(code, model)
    assert said.startswith("OutOfDeviceMemory")
    assert "RLIMIT_AS" in said
    assert "loaded" in said


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        ("lambda: _native.host_driver()", "WarmServeError", "memfd_create"),
        ("runtime.fileno", "WarmServeError", "eventfd"),
    ],
)
def test_a_call_without_a_descriptor_names_itself_and_the_limit(
    call: str, error: str, name: str
) -> None:
    code = f"""
import os
with Runtime(arena="4MiB", tensors="numpy", loaders=1) as runtime:
    limit(resource.RLIMIT_NOFILE, os.dup(0) + 1)
    error_of({call})
"""
    said = _run(code)
    assert said.startswith(f"{error} {name}")
    assert "errno 24" in said
    assert "RLIMIT_NOFILE (ulimit -n) is" in said


def _machine(root: Path, available: int) -> None:
    (root / "proc" / "self").mkdir(parents=True, exist_ok=True)
    (root / "proc" / "meminfo").write_text(f"MemAvailable: {available // 1024} kB\n")


def _group(root: Path, version: int, limits: list[tuple[str, int, int]]) -> None:
    """Write nested control groups, outermost first, each as (name, limit, use) in bytes."""
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    folder = root / "sys/fs/cgroup/memory"
    if version == 2:
        names, folder = ("memory.max", "memory.current"), root / "sys/fs/cgroup"
    path = ""
    for name, most, used in limits:
        path += f"/{name}"
        group = folder / path[1:]
        group.mkdir(parents=True, exist_ok=True)
        (group / names[0]).write_text(f"{most}\n")
        (group / names[1]).write_text(f"{used}\n")
    line = f"0::{path}\n" if version == 2 else f"4:memory:{path}\n0::/\n"
    (root / "proc/self/cgroup").write_text(line)


@pytest.mark.parametrize("version", [0, 1, 2])
def test_trimmed_memory_is_taken_again_only_if_available(
    tmp_path: Path, version: int, model: Path
) -> None:
    """Version 0 has no control groups: the machine itself has too little memory."""
    root = tmp_path / "root"

    def leave(nbytes: int) -> None:
        _machine(root, nbytes if version == 0 else 1 << 40)
        if version == 0:
            (root / "proc/self/cgroup").write_text("0::/\n")
        else:  # the outer of the two groups has the tighter limit
            limits = [("outer", 1 << 30, (1 << 30) - nbytes), ("inner", 1 << 40, 0)]
            _group(root, version, limits)
        time.sleep(0.1)  # the driver reuses a reading for a moment

    leave(256 * MIB)
    driver = _native.host_driver(root=str(root))
    with Runtime(arena="16MiB", tensors="numpy", loaders=1, driver=driver) as runtime:
        runtime.register("m", model)
        assert runtime.trim() == 16 * MIB
        leave(17 * MIB)
        with pytest.raises(OutOfDeviceMemory, match="are available in the machine and its control"):
            runtime.lease("m", timeout=30).acquire()
        runtime.check_invariants()
        leave(256 * MIB)
        with runtime.lease("m", timeout=30) as lease:
            assert len(lease.tensors) == 2


def _real_group() -> Path | None:
    for parent in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")):
        group = parent / f"warmserve-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        if any((group / name).exists() for name in ("memory.limit_in_bytes", "memory.max")):
            return group
        group.rmdir()
    return None


def test_the_kernel_kills_no_process_that_loads_after_trim(tmp_path: Path) -> None:
    """Use a real control group if one can be made, else none; the test above simulates groups."""
    model = write_model(tmp_path / "m.safetensors", "m", [20 * MIB] * 5)
    group = _real_group()
    join = ""
    if group:
        name = "memory.max" if (group / "memory.max").exists() else "memory.limit_in_bytes"
        (group / name).write_text(str(300 * MIB))
        join = f"open({str(group / 'cgroup.procs')!r}, 'w').write('0')\n"
    code = (
        join
        + """
runtime = Runtime(arena="100MiB", tensors="numpy", loaders=1)
runtime.register("m", sys.argv[1])
runtime.trim()
room = runtime.native.device_memory()[0]
others = bytearray(b"1") * (room - (40 << 20)) if room < (300 << 20) else None
error_of(lambda: runtime.lease("m", timeout=60).acquire())
others = None
error_of(lambda: runtime.lease("m", timeout=60).acquire())
"""
    )
    try:
        said = _run(code, model).splitlines()
    finally:
        if group:
            for _ in range(100):
                try:
                    group.rmdir()
                    break
                except OSError:
                    time.sleep(0.05)
    assert said[0].startswith("OutOfDeviceMemory") if group else said[0] == "no error"
    assert said[1] == "no error"
