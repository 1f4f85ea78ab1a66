"""Risk: a runtime that uses a broker's arena answers otherwise than one with its own arena."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from checkpoints import GRANULE, write_model

from processes import SIZES, Process, Processes, expected
from warmserve_rt import CorruptCheckpoint

# Expressions and statements, in order. Values must be equal in one process and over a broker.
PROGRAM = """
[model.name for model in runtime.models]
runtime.model('a').nbytes
mapped('a')
runtime.prewarm('a').wait()
mapped('a')
weights('a')
weights('a', layers=[1])
runtime.lease('a', layers=['model.layers.2']).acquire().release()
[runtime.digest('a', i).tolist() for i in range(3)]
runtime.read_back('a', 1).tobytes()
runtime.evict('a', layers=[0, 2])
mapped('a')
runtime.read_back('a', 0)
weights('a')
lease = runtime.lease('b', streaming=True).acquire()
[lease.wait(i) for i in range(3)]
lease.wait(3)
parts('b')
runtime.snapshot().models['b'].leases
runtime.evict('b')
runtime.evict('b', wait='nothing')
lease.release()
runtime.evict('b', wait='nothing')
mapped('b')
runtime.lease(['a', 'b']).acquire().release()
runtime.set_keep_value('a', 2.0)
runtime.set_keep_values('b', [0.0, 1.0, 3.0])
[layer.keep_value for layer in runtime.snapshot().models['b'].layers]
runtime.swap(evict='b', load='c').wait()
mapped('c')
weights('c')
runtime.prewarm('b', layers=[0], evict_below=0.5).wait()
runtime.prewarm('b', evict_below=0.5, deadline=30).wait()
runtime.snapshot().granules
runtime.unregister('b')
runtime.lease('b')
runtime.register('b', files['b']).name
weights('b')
runtime.model('b').layers[1].nbytes
runtime.check_invariants()
runtime.close()
runtime.prewarm('a')
"""


def values(process: Process) -> list[object]:
    found: list[object] = []
    for line in PROGRAM.strip().splitlines():
        try:
            found.append((line, process.run(line)))
        except Exception as error:
            found.append((line, type(error).__name__, str(error)))
    return found


def test_a_client_gets_the_values_and_errors_of_a_runtime_of_its_own(
    machine: Processes, files: dict[str, Path]
) -> None:
    broker = machine.broker(20)
    client = machine.client(**files)
    alone = machine.process(
        "runtime = Runtime('host', arena='20MiB', tensors='numpy')\n"
        "for each in files: runtime.register(each, files[each])",
        files=files,
    )
    client.run("None", files=files)
    for over_broker, by_itself in zip(values(client), values(alone), strict=True):
        assert over_broker == by_itself
    broker.run("runtime.check_invariants()")


def test_a_model_that_one_client_has_loaded_is_resident_for_another(
    machine: Processes, files: dict[str, Path]
) -> None:
    broker = machine.broker(16)
    first, second = machine.client(**files), machine.client(**files)
    assert first.run("weights('a')") == expected("a")
    loaded = broker.run("runtime.snapshot().bytes_loaded")
    assert loaded == sum(SIZES)
    first.kill()
    assert second.run("mapped('a')") == []
    assert second.run("weights('a')") == expected("a")
    assert broker.run("runtime.snapshot().bytes_loaded") == loaded
    assert broker.run("[model.name for model in runtime.models]") == []  # only clients name them


def test_the_layers_of_a_streaming_lease_can_be_read_one_after_the_other(
    machine: Processes, tmp_path: Path
) -> None:
    sizes = [GRANULE] * 6
    path = write_model(tmp_path / "a", "a", sizes)
    machine.broker(16, read_bandwidth=40 * GRANULE)
    client = machine.client(a=path)
    early = client.run(
        "lease = runtime.lease('a', streaming=True).acquire()\n"
        "views = list(runtime.tensors('a').values())\n"
        "read, early = [], 0\n"
        "for i in range(6):\n"
        "    lease.wait(i)\n"
        "    early += len(mapped('a')) < 6\n"
        "    read.append(views[i].tobytes())"
    )
    assert early is None
    assert client.run("early") > 0
    assert client.run("read") == expected("a", sizes)


def test_two_clients_register_one_model_by_one_name(
    machine: Processes, files: dict[str, Path], tmp_path: Path
) -> None:
    broker = machine.broker(16)
    first, second = machine.client(a=files["a"]), machine.client(a=files["a"])
    copy = shutil.copy(files["a"], tmp_path / "copy")
    first.run("runtime.unregister('a')")  # the other client's model, and the broker's, remain
    with pytest.raises(ValueError, match="'a' with other files"):
        first.run("runtime.register('a', path)", path=copy)
    with pytest.raises(ValueError, match="'a' with another number of layers"):
        first.run("runtime.register('a', path, layers=lambda name: 'all')", path=files["a"])
    assert second.run("weights('a')") == expected("a")
    first.run("runtime.register('copy', path).name", path=copy)
    assert first.run("weights('copy')") == expected("a")
    assert broker.run("runtime.snapshot().bytes_loaded") == 2 * sum(SIZES)


def test_digests_are_checked_by_the_broker(
    machine: Processes, files: dict[str, Path], tmp_path: Path
) -> None:
    machine.broker(16)
    client = machine.client(**files)
    client.run(
        "from warmserve_rt import kernels\n"
        "names = [layer.name for layer in runtime.model('a').layers]\n"
        "runtime.prewarm('a').wait()\n"
        "good = {name: runtime.digest('a', i) for i, name in enumerate(names)}\n"
        "bad = {**good, names[1]: good[names[1]] + 1}"
    )
    client.run("runtime.register('good', files['a'], digests=good).name", files=files)
    assert client.run("weights('good')") == expected("a")
    client.run("runtime.register('bad', files['a'], digests=bad).name")
    with pytest.raises(CorruptCheckpoint, match="'bad'"):
        client.run("weights('bad')")
    assert client.run("weights('bad', layers=[0])") == expected("a")[:1]


def test_a_client_without_threads_answers_its_broker_in_its_own_calls(
    machine: Processes, files: dict[str, Path]
) -> None:
    machine.broker(8)
    pumped = machine.process(
        "runtime = Runtime('host', broker=path, pump=True, tensors='numpy')\n"
        "for each in files: runtime.register(each, files[each])",
        files=files,
    )
    assert pumped.run("weights('a')") == expected("a")
    other = machine.client(**files)
    other.begin("weights('b')")
    pumped.run("while mapped('a'): runtime.step()")
    assert other.result() == expected("b")
    other.begin("runtime.evict('b')")
    assert pumped.run("weights('a')") == expected("a")
    other.result()
