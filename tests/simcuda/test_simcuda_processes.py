"""Risk: processes on one simulated machine see other memory than they would on a GPU."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from warmserve_rt import WarmServeError, _native, testing
from warmserve_rt.testing import SimulatedCuda, simulated_cuda
from warmserve_rt.testing.cuda_api import PAGE, POSIX_FD, READ_WRITE, Cuda, CudaError, code
from warmserve_rt.testing.cuda_types import Prop

G = 2 << 20
EXPORT, IMPORT = "cuMemExportToShareableHandle", "cuMemImportFromShareableHandle"

# Runs each line that it receives, and answers with the value of `answer`. A message may bring a
# descriptor, which the line finds in `given`; it sends the descriptor `gives`, if one is set.
PROCESS = """
import ctypes, os, socket, sys
from warmserve_rt.testing.cuda_api import PAGE, READ, READ_WRITE, Cuda, code
from warmserve_rt.testing.cuda_types import Prop
link, G = socket.socket(fileno=int(sys.argv[1])), 2 << 20
cuda = Cuda("libcuda.so.1").start()
def shared(nbytes=G):
    prop = Prop()
    prop.handle_types = 1
    return cuda.create(nbytes, prop)
def mapped(handle, access=READ_WRITE, nbytes=G):
    address = cuda.reserve(nbytes)
    cuda.map(address, nbytes, handle)
    cuda.set_access(address, nbytes, access)
    return address
def write(address, content):
    cuda.htod(address, cuda.pinned(PAGE, content).address, len(content))
def read(address, nbytes):
    host = cuda.pinned(PAGE)
    cuda.dtoh(host.address, address, nbytes)
    return bytes(host[:nbytes])
while True:
    line, descriptors, _, _ = socket.recv_fds(link, 1 << 16, 1)
    if not line:
        break
    given = descriptors[0] if descriptors else None
    answer, gives = None, None
    exec(line.decode(), globals())
    socket.send_fds(link, [repr(answer).encode()], [] if gives is None else [gives])
"""


class Process:
    """Another process on the simulated machine."""

    def __init__(self, simulated: SimulatedCuda) -> None:
        self.link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.given: int | None = None  # the descriptor of the last answer
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROCESS, str(theirs.fileno())],
                env=simulated.environment,
                pass_fds=[theirs.fileno()],
                cwd="/",  # it would import the package from the sources, which are not built
            )

    def run(self, line: str, descriptor: int | None = None) -> object:
        socket.send_fds(self.link, [line.encode()], [] if descriptor is None else [descriptor])
        answer, descriptors, _, _ = socket.recv_fds(self.link, 1 << 16, 1)
        assert answer, "the process has ended"
        self.given = descriptors[0] if descriptors else None
        return eval(answer, {})

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(60)
        self.link.close()

    def end(self) -> None:
        if self.process.poll() is None:
            self.link.close()
            assert self.process.wait(60) == 0


class Machine:
    def __init__(self, simulated: SimulatedCuda) -> None:
        self.simulated = simulated
        self.processes: list[Process] = []

    def process(self) -> Process:
        made = Process(self.simulated)
        self.processes.append(made)
        return made


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    with simulated_cuda(memory="64MiB", machine=tmp_path / "machine") as simulated:
        made = Machine(simulated)
        try:
            yield made
        finally:
            for process in made.processes:
                process.end()


def exported(process: Process, content: bytes = b"content") -> int:
    """Make a process write and export a granule; return the descriptor."""
    process.run(f"h = shared(); a = mapped(h); write(a, {content!r}); gives = cuda.export(h)")
    assert process.given is not None
    return process.given


def test_an_importer_reads_what_the_exporter_writes(machine: Machine) -> None:
    exporter, importer = machine.process(), machine.process()
    descriptor = exported(exporter, b"first")
    importer.run("a = mapped(cuda.imported(given), READ)", descriptor)
    assert importer.run("answer = read(a, 5)") == b"first"
    exporter.run("write(a, b'later')")
    assert importer.run("answer = read(a, 5)") == b"later"
    assert importer.run("answer = code(write, a, b'own')") == 1  # its access is READ
    os.close(descriptor)


def test_the_memory_outlives_the_exporter(machine: Machine) -> None:
    exporter, importer = machine.process(), machine.process()
    descriptor = exported(exporter)
    importer.run("h = cuda.imported(given); a = mapped(h, READ)", descriptor)
    exporter.kill()
    assert importer.run("answer = read(a, 7)") == b"content"
    importer.kill()
    third = machine.process()
    third.run("a = mapped(cuda.imported(given), READ)", descriptor)
    os.close(descriptor)
    assert third.run("answer = read(a, 7)") == b"content"


def test_the_bytes_of_other_processes_count_once(machine: Machine) -> None:
    exporter, importer, other = (machine.process() for _ in range(3))

    def used() -> int:
        free, total = other.run("answer = cuda.memory()")  # type: ignore[misc]
        assert total == 64 << 20
        return int(total - free)

    assert used() == 0
    exporter.run("private = cuda.create(3 * G)")
    assert used() == 3 * G
    descriptor = exported(exporter)
    assert used() == 4 * G
    importer.run("h = cuda.imported(given); a = mapped(h)", descriptor)
    assert used() == 4 * G
    exporter.run("cuda.unmap(a, G); cuda.release(h)")
    assert used() == 4 * G
    exporter.kill()
    assert used() == G
    importer.run("cuda.release(h)")
    assert used() == G
    importer.run("cuda.unmap(a, G)")
    assert used() == 0
    importer.run("h = cuda.imported(given)", descriptor)  # a descriptor keeps the contents
    os.close(descriptor)
    assert used() == G
    importer.kill()
    assert used() == 0


def test_a_process_cannot_take_what_others_hold(machine: Machine) -> None:
    first, second = machine.process(), machine.process()
    first.run("h = cuda.create(20 * G)")
    assert second.run("answer = code(cuda.create, 13 * G)") == 2
    assert second.run("answer = code(cuda.create, 12 * G)") == 0
    assert first.run("answer = code(cuda.create, G)") == 2
    second.kill()
    assert first.run("answer = code(cuda.create, 12 * G)") == 0


def test_many_granules_are_counted_by_the_byte(machine: Machine) -> None:
    """The table reuses the entry of a granule that no process holds any more."""
    first, second = machine.process(), machine.process()
    for _ in range(3):
        first.run("h = [shared() for _ in range(20)]")
        for i in range(20):
            first.run(f"gives = cuda.export(h[{i}])")
            assert first.given is not None
            second.run("cuda.imported(given); os.close(given)", first.given)
            os.close(first.given)
        assert first.run("answer = cuda.memory()[0]") == 12 * G
        second.kill()
        assert first.run("answer = cuda.memory()[0]") == 12 * G
        first.run("[cuda.release(one) for one in h]")
        assert first.run("answer = cuda.memory()[0]") == 32 * G
        second = machine.process()


def test_processes_with_other_devices_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "machine"
    with simulated_cuda(memory="64MiB", machine=path):
        pass
    with (
        pytest.raises(ValueError, match="a machine whose devices are different"),
        simulated_cuda(memory="32MiB", machine=path),
    ):
        pass
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="machine"), simulated_cuda(memory="64MiB", machine=path):
        pass
    assert path.read_bytes() == b"something else"


def _exportable(cuda: Cuda) -> tuple[int, int]:
    prop = Prop()
    prop.handle_types = POSIX_FD
    handle = cuda.create(G, prop)
    address = cuda.reserve(G)
    cuda.map(address, G, handle)
    cuda.set_access(address, G)
    return handle, address


def test_bytes_are_written_for_the_importer_too(tmp_path: Path) -> None:
    with simulated_cuda(memory="64MiB", check=False) as simulated:
        exporter = Process(simulated)
        # Before the export, after it, and by the importer.
        exporter.run("h = shared(); a = mapped(h); write(a, b'1'); gives = cuda.export(h)")
        descriptor = exporter.given
        assert descriptor is not None
        exporter.run("write(a + 8, b'2')")
        cuda = Cuda(simulated.library).start()
        handle, address = cuda.imported(descriptor), cuda.reserve(G)
        os.close(descriptor)
        cuda.map(address, G, handle)
        cuda.set_access(address, G)
        host = cuda.pinned(PAGE, b"3")
        cuda.htod(address + 16, host.address, 1)
        for offset, expected in ((0, b"1"), (8, b"2"), (16, b"3")):
            cuda.dtoh(host.address, address + offset, 1)
            assert host[:1] == expected
        assert simulated.violations == []
        cuda.dtoh(host.address, address + 24, 1)
        assert [each.kind for each in simulated.violations] == ["uninitialised-read"]
        exporter.run("answer = read(a + 16, 1)")
        exporter.end()


def test_the_first_export_keeps_the_contents() -> None:
    with simulated_cuda(memory="64MiB", host_numa=True) as simulated:
        cuda = Cuda(simulated.library).start()
        handle, address = _exportable(cuda)
        host = cuda.pinned(PAGE, b"device")
        cuda.htod(address + G - 6, host.address, 6)
        descriptor = cuda.export(handle)
        assert simulated.peek(address + G - 6, 6) == b"device"
        again = cuda.export(handle)
        assert os.fstat(again).st_ino == os.fstat(descriptor).st_ino
        os.close(again)
        os.close(descriptor)

        prop = Prop(location=3)
        prop.handle_types = POSIX_FD
        handle = cuda.create(G, prop)
        address = cuda.reserve(G)
        cuda.map(address, G, handle)
        cuda.share(address, G, READ_WRITE)
        ctypes.memset(address, 7, 9)
        os.close(cuda.export(handle))
        assert ctypes.string_at(address, 10) == b"\7" * 9 + b"\0"
        ctypes.memset(address + 9, 8, 1)
        assert simulated.peek(address, 10) == b"\7" * 9 + b"\10"


def test_an_import_in_the_same_process_is_the_same_allocation() -> None:
    with simulated_cuda(memory="64MiB", leaks=True) as simulated:
        cuda = Cuda(simulated.library).start()
        handle, address = _exportable(cuda)
        descriptor = cuda.export(handle)
        again = cuda.imported(descriptor)
        os.close(descriptor)
        assert cuda.memory()[0] == (64 << 20) - G
        cuda.release(handle)
        cuda.unmap(address, G)
        assert cuda.memory()[0] == (64 << 20) - G
        cuda.release(again)
        assert cuda.memory()[0] == 64 << 20
        cuda.address_free(address, G)
        cuda.release_primary()


def test_a_race_after_the_export_is_found() -> None:
    with simulated_cuda(memory="64MiB", clock="virtual", check=False) as simulated:
        cuda = Cuda(simulated.library).start()
        handle, address = _exportable(cuda)
        first, second = cuda.stream(), cuda.stream()
        cuda.memset(address, 1, 8, first)
        os.close(cuda.export(handle))
        cuda.memset(address + 4, 2, 8, second)
        assert [each.kind for each in simulated.violations] == ["race"]


def test_driver_shares_granules_between_processes(machine: Machine) -> None:
    simulated = machine.simulated
    watched = testing.watch(cuda=simulated)
    granule = _native.MappedGranule(watched.driver, G)
    granule.write(b"weights")
    shared = granule.share()
    other = machine.process()
    other.run(
        "from warmserve_rt import _native, testing\n"
        "driver = _native.cuda_driver(library='libcuda.so.1', kernels=b'simulated')\n"
        "strict = _native.StrictDriver(driver)\n"
        "one = _native.MappedGranule(strict, G, shared=(given, 0), writable=False)\n"
        "answer = one.read(7)",
        shared[0],
    )
    os.close(shared[0])
    assert other.run("answer = one.read(7)") == b"weights"
    assert other.run("del one; answer = strict.violations, sum(strict.live.values())") == ([], 0)
    assert granule.read(7) == b"weights"
    del granule
    watched.check()


def test_driver_refuses_to_write_an_import(machine: Machine) -> None:
    other = machine.process()
    descriptor = exported(other)
    driver = testing.cuda_driver(machine.simulated)
    with pytest.raises(WarmServeError, match="a granule of another process can only be read"):
        _native.MappedGranule(driver, G, shared=(descriptor, 0))
    imported = _native.MappedGranule(driver, G, shared=(descriptor, 0), writable=False)
    assert imported.read(7) == b"content"
    with pytest.raises(WarmServeError, match="granule_export: invalid"):
        imported.share()
    # A second import has the same handle, so it cannot be released on its own.
    with pytest.raises(WarmServeError, match="granule_import: invalid"):
        _native.MappedGranule(driver, G, shared=(descriptor, 0), writable=False)
    assert imported.read(7) == b"content"
    with pytest.raises(WarmServeError, match="granule_import: invalid"):
        _native.MappedGranule(driver, G, shared=(descriptor, G), writable=False)
    os.close(descriptor)
    del imported


def test_a_failed_import_leaves_nothing(machine: Machine) -> None:
    other = machine.process()
    descriptor = exported(other)
    cuda = Cuda(machine.simulated.library).start()
    before = cuda.memory()
    with pytest.raises(CudaError, match=IMPORT):
        cuda.imported(descriptor, 8)
    assert cuda.memory() == before
    machine.simulated.faults.arm([(1, 1)], only=EXPORT)
    assert code(cuda.export, _exportable(cuda)[0]) == 999
    machine.simulated.faults.disarm()
    os.close(descriptor)
