"""Kernels that no build of the package has, as PTX that the driver compiles.

The simulated device runs only the package's own kernels.
"""

from __future__ import annotations

import ctypes

from lib.cuda import Gpu, NotRun
from warmserve_rt.testing.cuda_types import u64

_HEAD = b".version %s\n.target %s\n.address_size 64\n"
_SPIN = b"""
.visible .entry spin(.param .align 8 .b8 call[16])
{
  .reg .u64 %%rd<6>;
  .reg .pred %%p<3>;
  %s
  ld.param.u64 %%rd1, [call];
  ld.param.u64 %%rd2, [call+8];
  mov.u64 %%rd3, %%globaltimer;
  setp.ne.u64 %%p1, %%rd2, 0;
AGAIN:
  mov.u64 %%rd4, %%globaltimer;
  @%%p1 st.volatile.global.u64 [%%rd2], %%rd4;
  sub.u64 %%rd5, %%rd4, %%rd3;
  setp.lt.u64 %%p2, %%rd5, %%rd1;
  @%%p2 bra AGAIN;
  ret;
}
"""
_PEEK = b"""
.visible .entry peek(.param .align 8 .b8 call[16])
{
  .reg .u64 %rd<4>;
  ld.param.u64 %rd1, [call];
  ld.param.u64 %rd2, [call+8];
  ld.global.u64 %rd3, [%rd1];
  st.global.u64 [%rd2], %rd3;
  ret;
}
"""
# The second module's spin lets a programmatic dependent launch begin at once; Hopper or newer.
PLAIN = _HEAD % (b"6.3", b"sm_60") + _SPIN % b"" + _PEEK
TRIGGERING = _HEAD % (b"7.8", b"sm_90") + _SPIN % b"griddepcontrol.launch_dependents;" + _PEEK


class SpinCall(ctypes.Structure):
    """Spin for this time; if `store` is an address, store the time there again and again."""

    _fields_ = [("nanoseconds", u64), ("store", u64)]


class PeekCall(ctypes.Structure):
    """Copy 8 bytes."""

    _fields_ = [("source", u64), ("to", u64)]


def functions(cuda: Gpu, source: bytes = PLAIN) -> tuple[int, int]:
    """Return the functions `spin` and `peek`."""
    if cuda.simulated:
        raise NotRun("the simulated device runs only the package's kernels")
    module = cuda.module(source)
    return cuda.function(module, "spin"), cuda.function(module, "peek")
