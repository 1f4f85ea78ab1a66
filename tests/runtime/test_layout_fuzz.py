"""Risk: a layout whose sizes overflow is mapped over another tenant, or kills the process.

``python tests/support/layout_fuzz.py --layouts 100000 --seed 1`` tries more layouts.
"""

from __future__ import annotations

import json
import os
import struct

import pytest
from layout_fuzz import DEVICES, GRANULE, SparseFile, fuzzer, run

from warmserve_rt import OutOfDeviceMemory, Runtime


@pytest.mark.parametrize("device", DEVICES)
def test_every_layout_is_loaded_or_refused_as_a_plain_model_predicts(device: str) -> None:
    outcomes = run(device, 400, 7, SparseFile())
    assert min(outcomes[kind] for kind in ("loaded", "OutOfDeviceMemory")) > 20
    assert outcomes["ValueError at registration"] > 5
    assert outcomes["CorruptCheckpoint at registration"] > 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("extra", [0, 1, 4])
def test_a_model_of_2_to_the_32_granules_overlaps_no_other(device: str, extra: int) -> None:
    """Such layers once overlapped, because granules were summed in 32 bits."""
    sizes = [4, *[2**40] * 8191, 2**40 - GRANULE, *[4] * extra]
    with fuzzer(device, SparseFile()) as made:
        model = made.runtime.register(
            "m", [made.file.native], [(nbytes, []) for nbytes in sizes], writable=False
        )
        with pytest.raises(OutOfDeviceMemory):
            made.runtime.begin_lease([model], 2, [0, len(sizes) - 1])
        made.runtime.unregister(model, None, "streams")


def test_a_model_of_more_than_2_to_the_63_bytes_is_refused_in_one_sentence() -> None:
    files = []
    for number in range(17):
        nbytes = 2**59
        entry = {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}
        raw = json.dumps({f"{number}.w": entry}).encode()
        fd = os.memfd_create("sparse")
        os.write(fd, struct.pack("<Q", len(raw)) + raw)
        os.truncate(fd, 8 + len(raw) + nbytes)
        files.append(fd)
    try:
        with Runtime(arena="4MiB", tensors="numpy") as runtime:
            with pytest.raises(ValueError, match=r"more than 2\*\*63 - 1 bytes"):
                runtime.register("m", [f"/proc/self/fd/{fd}" for fd in files])
            with pytest.raises(OutOfDeviceMemory, match="RLIMIT_AS"):
                runtime.prewarm(runtime.register("m", f"/proc/self/fd/{files[0]}"))
    finally:
        for fd in files:
            os.close(fd)


@pytest.mark.parametrize("option", ["arena", "staging", "granule", "chunk", "headroom"])
@pytest.mark.parametrize("nbytes", [2**63 - 1, 2**63, 2**64 - (2 << 20), 2**64])
def test_a_size_near_the_end_of_64_bits_is_refused(option: str, nbytes: int) -> None:
    sizes = {"arena": GRANULE, option: nbytes}
    with pytest.raises((ValueError, TypeError, OutOfDeviceMemory)):
        Runtime(tensors="numpy", **sizes)
