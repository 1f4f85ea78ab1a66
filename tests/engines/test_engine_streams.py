"""Risk: an engine's work on a CUDA device is in flight when its lease or its pass ends, and the
weights are unmapped under it.

No GPU is needed: the device is simulated, and torch.cuda is a stand-in that enqueues nothing.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from framework_streams import Gpu, TorchCuda, simulated_gpu  # noqa: E402

from warmserve_rt import Busy, Lease, Model  # noqa: E402
from warmserve_rt.engines.torch.gates import Gates  # noqa: E402


@pytest.fixture
def gpu(two_files: dict[str, Path]) -> Iterator[Gpu]:
    with simulated_gpu(two_files) as made:
        yield made


@pytest.fixture
def torch_cuda(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> TorchCuda:
    made = TorchCuda(gpu.cuda.library)
    monkeypatch.setattr(torch.cuda, "current_stream", made.current_stream)
    monkeypatch.setitem(sys.modules, "torch.cuda", made)
    monkeypatch.delitem(sys.modules, "cupy.cuda", raising=False)
    made.current[0] = gpu.raw.stream()
    return made


# Passes of a bound module


class Work(torch.nn.Module):
    """A part whose forward calls a function."""

    def __init__(self, weight: Any, work: Callable[[], object]) -> None:
        super().__init__()
        self.weight, self._work = torch.nn.Parameter(weight, requires_grad=False), work

    def forward(self) -> None:
        self._work()


def gated(gpu: Gpu, *work: Callable[[], object]) -> Any:
    """Return a module with a part for each layer of "a", with the gates of a CUDA device."""
    model = gpu.runtime.model("a")
    tensors = {spec.name: torch.zeros(1) for layer in model.layers for spec in layer.tensors}
    views: Any = _Views(model, tensors)
    parts = [Work(tensor, each) for tensor, each in zip(tensors.values(), work, strict=True)]
    module = torch.nn.ModuleList(parts)
    module.forward = lambda: [part() for part in parts]  # type: ignore[method-assign]
    gates = Gates(module, gpu.runtime, views)
    gates.on_cuda, gates._device = True, 0
    module.forward = gates.guarded(module)  # type: ignore[method-assign]
    return module


class _Views:
    """A model whose tensors torch can see."""

    def __init__(self, model: Model, tensors: dict[str, Any]) -> None:
        self._model, self._tensors = model, tensors

    def tensors(self, framework: str) -> dict[str, Any]:
        return self._tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def released_elsewhere(lease: Lease) -> None:
    thread = threading.Thread(target=lease.release)
    thread.start()
    thread.join()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_pass_is_recorded_whose_lease_another_thread_has_ended(
    gpu: Gpu, torch_cuda: TorchCuda, streaming: bool
) -> None:
    stream = torch_cuda.current[0]
    lease = gpu.runtime.lease("a", streaming=streaming, stream=None).acquire()

    def last() -> None:
        gpu.read(stream, 1)
        released_elsewhere(lease)

    gated(gpu, lambda: gpu.read(stream, 0), last)()
    assert gpu.runtime.snapshot().leases == 0
    with pytest.raises(Busy, match="a stream still uses"):
        gpu.runtime.evict("a", wait="nothing")
    assert not gpu.faults()


def test_a_pass_that_fails_is_recorded_too(gpu: Gpu, torch_cuda: TorchCuda) -> None:
    stream = torch_cuda.current[0]

    def fail() -> None:
        gpu.read(stream, 1)
        raise KeyError("stop")

    with gpu.runtime.lease("a", stream=None), pytest.raises(KeyError, match="stop"):
        gated(gpu, lambda: gpu.read(stream, 0), fail)()
    assert not gpu.faults()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_captured_pass_leaves_the_capture_valid(
    gpu: Gpu, torch_cuda: TorchCuda, streaming: bool
) -> None:
    """Under a streaming lease the thread waits for the layers, because the graph must not."""
    stream = torch_cuda.current[0]
    module = gated(gpu, lambda: gpu.read(stream, 0), lambda: gpu.read(stream, 1))
    torch_cuda.current[0] = 0
    with gpu.runtime.lease("a", streaming=streaming) as lease:
        torch_cuda.current[0] = stream
        gpu.raw.begin_capture(stream)
        module()
        graph = gpu.raw.instantiate(gpu.raw.end_capture(stream))
        gpu.raw.launch_graph(graph, stream)
        assert lease.held
    assert not gpu.faults()


# vLLM's worker, which runs without vLLM


class _Base:
    """vLLM's GPU worker, whose methods are the test's."""

    device: Any = None


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import the worker with stand-ins for the modules of vLLM that it imports."""
    ours = "warmserve_rt.engines.vllm"
    if importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed: its own worker is tested in with_vllm/")
    stubs = {
        "vllm": {},
        "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: False)},
        "vllm.v1": {},
        "vllm.v1.worker": {},
        "vllm.v1.worker.gpu_worker": {"Worker": _Base},
        "vllm.device_allocator": {},
        "vllm.device_allocator.sleep_mode_backend": {
            "CuMemBackend": object,
            "SleepModeBackend": object,
        },
    }
    for name, content in stubs.items():
        stub = ModuleType(name)
        vars(stub).update(content)
        monkeypatch.setitem(sys.modules, name, stub)
    for name in (f"{ours}.worker", f"{ours}.sleep"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(f"{ours}.worker").Worker
    for name in (f"{ours}.worker", f"{ours}.sleep"):
        sys.modules.pop(name, None)
    package = importlib.import_module(ours)
    for name in ("worker", "sleep"):
        with suppress(AttributeError):
            delattr(package, name)


def leasing(worker: Any, gpu: Gpu) -> Any:
    """Return a worker with one model, as after load_model()."""
    made = worker.__new__(worker)
    made._weights = [SimpleNamespace(runtime=gpu.runtime, model=gpu.runtime.model("a"))]
    made._lease = gpu.runtime.lease("a")
    made._gated, made._verified = False, True
    return made


@pytest.mark.parametrize("halves", [1, 2])
def test_a_step_records_the_stream_that_vllm_sets_under_the_lease(
    gpu: Gpu,
    torch_cuda: TorchCuda,
    worker: Any,
    monkeypatch: pytest.MonkeyPatch,
    halves: int,
) -> None:
    """vLLM's current_stream() sets a stream of its own on first use."""
    first, second = torch_cuda.current[0], gpu.raw.stream()

    def execute(self: Any, output: Any) -> Any:
        gpu.read(first, 0)
        torch_cuda.current[0] = second
        gpu.read(second, 1)
        return "output" if halves == 1 else None

    monkeypatch.setattr(_Base, "execute_model", execute, raising=False)
    monkeypatch.setattr(_Base, "sample_tokens", lambda self, _: "output", raising=False)
    made = leasing(worker, gpu)
    made.execute_model(SimpleNamespace(total_num_scheduled_tokens=1))
    if halves == 2:
        assert made._lease.held
        assert made.sample_tokens(None) == "output"
    assert not made._lease.held
    assert not gpu.faults()


def test_work_outside_a_step_is_recorded(
    gpu: Gpu, torch_cuda: TorchCuda, worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warm_up(self: Any) -> None:
        torch_cuda.current[0] = gpu.raw.stream()
        gpu.read(torch_cuda.current[0])

    monkeypatch.setattr(_Base, "compile_or_warm_up_model", warm_up, raising=False)
    leasing(worker, gpu).compile_or_warm_up_model()
    assert not gpu.faults()


# The weights of an engine whose worker takes no leases


def test_closing_kept_weights_waits_for_the_device(
    gpu: Gpu, torch_cuda: TorchCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    from warmserve_rt.engines.vllm.weights import Arena, Weights

    device = torch.device("cuda", 0)
    views: Any = _Views(
        gpu.runtime.model("a"), {"weight": SimpleNamespace(is_cuda=True, device=device)}
    )
    views.native, views.layers = gpu.runtime.model("a").native, gpu.runtime.model("a").layers
    synchronized: list[Any] = []

    def synchronize(device: Any) -> None:
        synchronized.append(device)
        gpu.raw.context_synchronize()

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    weights = Weights.__new__(Weights)
    weights.arena, weights.model, weights.kept = Arena(gpu.runtime), views, True
    weights._hold, weights._closed = gpu.runtime.lease("a").acquire(), True
    gpu.read(gpu.raw.stream())  # a stream that is never torch's current one
    weights.close()
    assert synchronized == [device]
    assert not gpu.faults()
