"""Host memory that a driver may have registered."""

from __future__ import annotations

import ctypes
import mmap
import weakref
from typing import ClassVar

PAGE = mmap.PAGESIZE


class Pinned:
    """Page-aligned memory of this process, which may be registered with the driver.

    It is freed with the object, but never while the driver has it registered. Registering any
    address inside the memory is enough to keep it.
    """

    made: ClassVar[weakref.WeakSet[Pinned]] = weakref.WeakSet()
    # Registered memory by library and address. An entry outlives the object that registered it,
    # because a driver that outlives the test still has the memory registered.
    registered: ClassVar[dict[str, dict[int, Pinned]]] = {}

    def __init__(self, nbytes: int) -> None:
        self.view = memoryview(mmap.mmap(-1, nbytes))
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.view))
        self.made.add(self)

    @classmethod
    def at(cls, address: int) -> Pinned | None:
        for made in list(cls.made):
            if made.address <= address < made.address + made.view.nbytes:
                return made
        return None

    def __getitem__(self, index: slice) -> bytes:
        return bytes(self.view[index])

    def __setitem__(self, index: slice, content: bytes) -> None:
        self.view[index] = content
