"""Risk: a layout whose sizes overflow is mapped over another tenant, or kills the process.

``python tests/layout_fuzz.py --layouts 100000 --seed 1`` tries more.
"""

from __future__ import annotations

import pytest
from layout_fuzz import DEVICES, SparseFile, run


@pytest.mark.parametrize("device", DEVICES)
def test_every_layout_is_loaded_right_or_refused_as_a_plain_model_says(device: str) -> None:
    outcomes = run(device, 400, 7, SparseFile())
    assert min(outcomes[kind] for kind in ("loaded", "OutOfDeviceMemory")) > 20
    assert outcomes["ValueError at registration"] > 5
    assert outcomes["CorruptCheckpoint at registration"] > 0
