"""Checks that torch sees the file's bytes on a CUDA device: with zero-copy tensors, a product and a
torch graph."""

from __future__ import annotations

from typing import Any

import numpy as np

from parts.gpu.part import NotRun, Part, arena_for, layer_address, layer_bytes
from warmserve_rt import Busy, Model, Runtime

NAME = "model.layers.0.self_attn.q_proj.weight"


def torch(part: Part) -> None:
    torch = torch_with_cuda()
    arena = 2 * arena_for(part, "small_a", "small_b")  # for both models
    with part.runtime(arena=arena, staging="32MiB", tensors="torch") as runtime:
        a, b = part.register(runtime, "small_a", "small_b")
        with runtime.lease(a) as lease:
            weight, spec = lease.tensors[NAME], a.layout.tensors[NAME]
            address = layer_address(a, spec.layer) + spec.offset
            part.yes("torch_address", weight.data_ptr() == address)
            part.target("torch_tensors_differing", _differing(torch, part, a), "tensors", "=", 0)
            on_host = _product(torch, weight.cpu())
            part.yes(
                "torch_product",
                torch.allclose(_product(torch, weight).cpu(), on_host, rtol=1e-2, atol=1e-1),
            )
        _graph(part, torch, runtime, a, b)
        _pass_that_outlives_its_lease(part, torch, runtime, a)


def torch_with_cuda() -> Any:
    try:
        import torch
    except ImportError:
        raise NotRun("torch is not installed") from None
    backend: Any = torch.backends.cuda
    if not backend.is_built():
        raise NotRun("torch is built without CUDA")
    if not torch.cuda.is_available():
        raise NotRun("torch sees no CUDA device")
    return torch


def _differing(torch: Any, part: Part, model: Model) -> int:
    """Return the number of tensors whose bytes differ from the file's."""
    count = 0
    for name, tensor in model.tensors().items():
        spec = model.layout.tensors[name]
        layer = layer_bytes(model, part.path(model.name), spec.layer)
        got = tensor.reshape(-1).view(torch.uint8).cpu().numpy()
        count += not np.array_equal(got, layer[spec.offset : spec.offset + spec.nbytes])
    return count


def _product(torch: Any, weight: Any) -> Any:
    """Return the product of ones and the weight. Its bytes are random, so NaN counts as 0."""
    finite = torch.nan_to_num(weight.float(), 0.0, 0.0, 0.0).clamp(-1, 1)
    return torch.ones(4, weight.shape[1], device=weight.device) @ finite.T


def _graph(part: Part, torch: Any, runtime: Runtime, a: Model, b: Model) -> None:
    """Capture a graph in the strictest mode while the runtime loads another model, then replay it
    with other granules mapped at the weight's address."""
    weight, graph = a.tensors()[NAME], torch.cuda.CUDAGraph()
    with runtime.lease(a):
        wanted = _product(torch, weight).cpu()
        with torch.cuda.graph(graph):
            out = _product(torch, weight)
            runtime.prewarm(b).wait(30)
    part.yes("torch_capture_beside_loads", runtime.snapshot().models[b.name].resident)
    for model in (a, b):
        runtime.evict(model)
    for model in (b, a):
        runtime.prewarm(model).wait()
    with runtime.lease(a):
        out.zero_()
        graph.replay()
        torch.cuda.synchronize()
        part.yes("torch_graph_after_swaps", torch.equal(out.cpu(), wanted))


def _pass_that_outlives_its_lease(part: Part, torch: Any, runtime: Runtime, model: Model) -> None:
    """Check that an eviction waits for a guarded module's pass that still runs after its lease."""
    from warmserve_rt.engines.torch.gates import guard

    weight = model.tensors()[NAME]
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    guard(module, runtime, model)
    inputs = torch.ones(4, weight.shape[1], dtype=weight.dtype, device=weight.device)
    with runtime.lease(model, stream=None):  # only the pass records
        module(inputs)  # the first pass loads kernels, which waits for all work
        torch.cuda.synchronize()
        torch.cuda._sleep(1 << 30)  # cycles: half a second
        module(inputs)
    try:
        runtime.evict(model, wait="nothing")
    except Busy:
        waits = True
    else:
        waits = False
    part.yes("torch_pass_is_recorded", waits)
    torch.cuda.synchronize()
    runtime.evict(model, wait="nothing")
