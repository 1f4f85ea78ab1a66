"""Risk: a driver call is made under the runtime's lock, so that a driver that waits stops every
lease. The checking driver reports such a call when a test's device is finished."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Device

from warmserve_rt import Busy


def test_many_recorded_streams(device: Device, two_files: dict[str, Path]) -> None:
    """More uses than are kept before those in the past are removed."""
    runtime = device.runtime()
    runtime.register("a", two_files["a"])
    stream = runtime.stream()
    with runtime.lease("a") as lease:
        for _ in range(20):
            lease.record(stream)
    stream.synchronize()
    del stream
    runtime.evict("a")


@pytest.mark.parametrize("call", ["evict", "close"])
def test_streams_that_are_not_to_be_waited_for(
    device: Device, two_files: dict[str, Path], call: str
) -> None:
    runtime = device.runtime(pump=True)
    runtime.register("a", two_files["a"])
    stream = runtime.stream()
    out = device.pinned(16)
    with runtime.lease("a") as lease:
        stream.copy_from(out, runtime.model("a").layer_bytes(0, 0, 16))
        lease.record(stream)
    leave = {
        "evict": lambda: runtime.evict("a", wait="nothing"),
        "close": lambda: runtime.close(wait="nothing"),
    }[call]
    if device.steps:
        with pytest.raises(Busy, match="a stream still uses"):
            leave()
    stream.synchronize()
    leave()


def test_a_read_that_fails(device: Device, two_files: dict[str, Path]) -> None:
    runtime, watched = device.watched_runtime()
    runtime.register("a", two_files["a"])
    with runtime.lease("a"):
        watched.faults.arm([(1, 1)], only="stream_synchronize")
        with pytest.raises(Exception, match="stream_synchronize"):
            runtime.read_back("a", 0)
        watched.faults.disarm()
    runtime.evict("a")
