"""torch.multiprocessing refuses CUDA tensors of an arena in words.

It would ask CUDA for a handle of the tensor's memory, and CUDA has none for mapped granules.
"""

from __future__ import annotations

import threading
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from warmserve_rt import _native

if TYPE_CHECKING:
    from warmserve_rt.checkpoint.layout import Layout

_addresses: WeakKeyDictionary[_native.Model, range] = WeakKeyDictionary()
_changes = threading.Lock()  # protects _addresses


def refuse_sharing(model: _native.Model, layout: Layout) -> None:
    """Let torch.multiprocessing refuse the model's tensors, as long as the model exists."""
    import torch

    last = len(layout) - 1
    nbytes = layout.native.layer(last)[1]
    begin, end = (model.view(*at, [0], 0, 1, 8, 1).address for at in ((0, 0), (last, nbytes)))
    with _changes:
        _addresses[model] = range(begin, end)
    for kind in (torch.Tensor, torch.nn.Parameter):
        ForkingPickler.register(kind, _reduced)


def _reduced(tensor: Any) -> Any:
    from torch.multiprocessing.reductions import reduce_tensor

    if tensor.is_cuda:
        address = tensor.data_ptr()
        with _changes:
            names = [model.name for model, own in _addresses.items() if address in own]
        if names:
            raise TypeError(
                f"a tensor of {names[0]!r} is in an arena, and CUDA cannot share that memory with "
                "another process: send a copy, tensor.clone(), made under a lease"
            )
    return reduce_tensor(tensor)  # type: ignore[no-untyped-call]
