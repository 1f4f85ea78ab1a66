"""Times to first token in virtual time, on a simulated CUDA device of known speed."""

from __future__ import annotations

from pathlib import Path

from lib.bound import Bound
from lib.harness import Bench, Llama, write_hollow_checkpoint
from lib.simulated import BANDWIDTH, COSTS, computation
from warmserve_rt import Runtime, testing

MODEL = Llama(4096, 11008, 4096, 32000, 8)  # a 7B with a quarter of its blocks
QUICK = Llama(512, 1408, 64, 4000, 2)
READ = 1 << 16  # bytes of each layer that its computation reads


def ttft_on_the_simulator(bench: Bench, folder: Path, ratios: list[float]) -> None:
    """Measure times to first token for every number of layers kept."""
    path = folder / "hollow.safetensors"
    model = bench.size(MODEL, QUICK)
    write_hollow_checkpoint(path, model.shapes())
    worst = 0.0
    for ratio in ratios:
        worst = max(worst, max(_over_bound(path, model.blocks + 2, ratio)))
    bench.target("ttft_vs_bound_sim", worst, "", "<=", 1.03)


def _over_bound(path: Path, layers: int, ratio: float) -> list[float]:
    found = []
    nbytes = path.stat().st_size
    each = nbytes / BANDWIDTH / ratio / layers  # seconds of a layer
    with testing.simulated_cuda(
        clock="virtual", memory="16GiB", h2d=BANDWIDTH, d2h=READ / each, content=4096, costs=COSTS
    ) as cuda:
        runtime = Runtime(
            driver=testing.cuda_driver(cuda),
            arena="6GiB",
            granule="2MiB",
            max_padding=1,
            tensors="dlpack",
            pump=True,
        )
        model = runtime.register("m", path)
        assert len(model.layers) == layers
        bound = Bound([each] * layers, [x.nbytes for x in model.layers], BANDWIDTH)
        stream = runtime.stream()
        runtime.prewarm(model).wait()
        with computation(cuda, model, stream, READ) as compute:
            for kept in range(layers, -1, -1):
                runtime.evict(model, keep=kept)
                begin = cuda.now
                with runtime.lease(model, streaming=True) as lease:
                    compute(lease)
                found.append((cuda.now - begin) / bound.seconds(kept))
        del stream
        runtime.close()
    return found
