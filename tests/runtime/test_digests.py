"""Risk: a digest of a resident layer is not the one of its bytes, or takes memory without limit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_model
from conftest import Device

from warmserve_rt import Runtime
from warmserve_rt.kernels import granule_digest

MIB = 1 << 20


@pytest.fixture
def runtime(device: Device, tmp_path: Path) -> Runtime:
    """Return a runtime on which a model of 5 MiB and three bytes is resident."""
    runtime = device.runtime()
    runtime.register("m", write_model(tmp_path / "m", "m", [5 * MIB + 3]))
    runtime.prewarm("m").wait()
    return runtime


@pytest.mark.parametrize("piece", [None, 4096, "1MiB", "2MiB", "3MiB", "8MiB", "1TiB"])
def test_a_digest_covers_a_piece_of_any_size(runtime: Runtime, piece: int | str | None) -> None:
    nbytes = {"1MiB": MIB, "3MiB": 3 * MIB, "8MiB": 8 * MIB, "1TiB": 1 << 40, 4096: 4096}
    whole = runtime.read_back("m", 0)
    expected = granule_digest(whole, nbytes.get(piece or "", 2 * MIB))
    assert np.array_equal(runtime.digest("m", 0, piece=piece), expected)


@pytest.mark.parametrize("piece", [0, 1, 4095, 4097, -4096])
def test_a_piece_that_is_no_multiple_of_4_kib_is_refused(runtime: Runtime, piece: int) -> None:
    with pytest.raises(ValueError, match="piece must be"):
        runtime.digest("m", 0, piece=piece)
