"""Risk: torch.multiprocessing cannot share a tensor of an arena, and its error names no reason."""

from __future__ import annotations

import gc
import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cuda_runtime import WEIGHT, make

torch = pytest.importorskip("torch")

from torch.multiprocessing import reductions  # noqa: E402

from warmserve_rt.testing.simcuda import SimulatedCuda  # noqa: E402


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the tensors that torch would share. Its build may be one without CUDA."""
    seen: list[Any] = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.utils.dlpack, "from_dlpack", lambda capsule: capsule)
    monkeypatch.setattr(reductions, "reduce_tensor", lambda tensor: seen.append(tensor) or (list,))
    return seen


def on_cuda(address: int) -> Any:
    return SimpleNamespace(is_cuda=True, data_ptr=lambda: address)


@pytest.mark.parametrize("kind", [torch.Tensor, torch.nn.Parameter])
def test_a_tensor_of_an_arena_is_refused_and_another_is_not(
    cuda: SimulatedCuda, two_files: dict[str, Path], shared: list[Any], kind: type
) -> None:
    with make(cuda, two_files) as runtime:
        model = runtime.model("a")
        model.tensors("torch")
        reduce = ForkingPickler._extra_reducers[kind]  # type: ignore[attr-defined]
        begin = model.layer_bytes(0).address
        last = model.layer_bytes(len(model.layers) - 1)
        end = last.address + last.nbytes
        for address in (begin, model.layers[0].nbytes + begin - 1, end - 1):
            with pytest.raises(TypeError, match=r"'a' is in an arena.*send a copy, tensor\.clone"):
                reduce(on_cuda(address))
        others = [on_cuda(begin - 1), on_cuda(end), on_cuda(0)]
        for other in others:
            reduce(other)
        assert shared == others
        assert WEIGHT in model.tensors("torch")
        runtime.unregister("a")
        del model, last
        gc.collect()
        reduce(on_cuda(begin))  # the addresses may be another library's now


def test_ordinary_tensors_are_sent_as_before(
    cuda: SimulatedCuda, two_files: dict[str, Path], shared: list[Any], monkeypatch: Any
) -> None:
    with make(cuda, two_files) as runtime:
        runtime.model("a").tensors("torch")
    monkeypatch.undo()
    sent = torch.arange(5)
    assert torch.equal(pickle.loads(ForkingPickler.dumps(sent)), sent)
