"""Risk: an engine dies of work that no lease has recorded, and its user cannot tell why."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from checkpoints import GRANULE, content
from cuda_runtime import SIZES, WEIGHT, make

from warmserve_rt import WarmServeError, testing
from warmserve_rt.testing.cuda_api import Cuda


@pytest.mark.parametrize("fence", ["device", "streams"])
def test_unrecorded_work_is_waited_for_with_a_fence_of_the_device(
    two_files: dict[str, Path], fence: str
) -> None:
    with testing.simulated_cuda(check=False) as cuda:
        raw = Cuda(cuda.library).start()
        runtime = make(cuda, two_files, fence=fence)
        stream, out = raw.stream(), raw.pinned(GRANULE)
        with runtime.lease("a") as lease:
            raw.sleep(stream, 100_000)
            raw.dtoh(out.address, lease.tensors[WEIGHT].address, GRANULE, stream)
        with suppress(WarmServeError):
            runtime.evict("a")
        if fence == "device":
            assert out[0:GRANULE] == content("a", 0, SIZES[0])[:GRANULE]
            assert not cuda.violations
        else:
            assert "use-while-unmapped" in {violation.kind for violation in cuda.violations}
        with suppress(WarmServeError):
            runtime.close()
