"""Risk: code in the documents does not run.

The blocks of a page run in order and in one namespace. Blocks for a GPU run in a process that finds
the simulated driver in place of libcuda. Blocks for vLLM are compiled, and their options and names
are compared with the code, because vLLM has an environment of its own; there
`tests/engines/with_vllm` runs the same lines. The examples of docs/checkpoints.md are run by
`tests/checkpoint/test_checkpoint_changes.py`, and those of README.md by `test_readme.py`.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import content, write_model, write_safetensors
from documents import ROOT, Block, blocks
from tiny_transformers import PROMPT, plain, save

from warmserve_rt import Runtime, testing
from warmserve_rt.engines.transformers import load
from warmserve_rt.engines.vllm import WORKER
from warmserve_rt.engines.vllm.options import Options

LAYERS = 12
Page = Callable[[list[Block], Path, Any], None]
PAGES: dict[str, Page] = {}
ELSEWHERE = {"README.md", "checkpoints.md"}  # see above


def runs(name: str) -> Callable[[Page], Page]:
    """Make a function the one that runs the blocks of a page."""

    def register(function: Page) -> Page:
        PAGES[name] = function
        return function

    return register


def write_checkpoint(path: Path) -> Path:
    """Write a model of LAYERS layers and a norm, in float32."""
    data = np.arange(6, dtype=np.float32).tobytes()
    names = [f"model.layers.{i}.weight" for i in range(LAYERS)]
    return write_safetensors(path, {n: ("F32", [6], data) for n in [*names, "model.norm.weight"]})


def run_on_simulated_gpu(code: str, tmp_path: Path) -> None:
    """Run a program that takes the simulated driver for the system's.

    CuPy computes nothing there, because libcudart does not run on the simulated driver.
    """
    with testing.simulated_cuda(memory="5GiB") as cuda:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=tmp_path,
            env={**cuda.environment, "CUPY_CACHE_DIR": str(tmp_path)},
        )
    assert done.returncode == 0, done.stderr


@runs("getting-started.md")
def run_getting_started(found: list[Block], tmp_path: Path, capfd: Any) -> None:
    (example,) = found
    example.run({}, checkpoint=write_checkpoint(tmp_path / "m"))
    assert "'model.norm.weight': (6,)" in capfd.readouterr().out


@runs("guide.md")
def run_guide(found: list[Block], tmp_path: Path, capfd: Any) -> None:
    path = write_checkpoint(tmp_path / "m")
    with Runtime(arena="64MiB", tensors="numpy") as runtime:
        for name in ("chat", "code"):
            runtime.register(name, path)
        runtime.prewarm("code").wait()
        names: dict[str, Any] = {"runtime": runtime, "path": path}
        unmarked = [block for block in found if not block.marker]
        assert len(unmarked) == 7
        unmarked[0].run(names)
        state = runtime.snapshot().models
        assert [layer.residency for layer in state["chat"].layers] == ["resident"] * (LAYERS + 1)
        assert sum(layer.residency == "resident" for layer in state["code"].layers) == 8
        for block in unmarked[1:]:
            block.run(names)
        out = capfd.readouterr().out
        assert "['model.layers.0 to head']" in out  # merged
        assert "has arrived" in out
        assert "chat: 13 of 13 layers are resident" in out
        assert [model.name for model in runtime.models] == ["code", "narrow", "chat@2"]
    gpu, capture = (
        next(block for block in found if block.marker == marker)
        for marker in ("gpu-example", "capture-example")
    )
    run_on_simulated_gpu(
        f"""
import sys
from contextlib import nullcontext
from types import SimpleNamespace
stream = SimpleNamespace(cuda_stream=0)
replayed = []
cuda = SimpleNamespace(
    is_initialized=lambda: True, current_stream=lambda ordinal: stream, Stream=lambda: stream,
    stream=nullcontext, CUDAGraph=lambda: SimpleNamespace(replay=lambda: replayed.append(1)),
    graph=nullcontext,
)
sys.modules["torch"], sys.modules["torch.cuda"] = SimpleNamespace(cuda=cuda), cuda
path, inputs, called = {str(path)!r}, {{"x": 1}}, []
model = lambda **given: called.append(given)
{gpu.code.replace('headroom="4GiB"', 'headroom="4GiB", tensors="dlpack"')}
{capture.code}
assert called == [inputs] * 3 and replayed == [1]
assert runtime.snapshot().leases == 0 and runtime.snapshot().layers_loaded == 1  # merged
runtime.close()
""",
        tmp_path,
    )
    (frameworks,) = [block for block in found if block.marker == "frameworks-example"]
    run_on_simulated_gpu(
        f"""
import cupy
import numpy as np
from warmserve_rt import Runtime
runtime = Runtime("cuda:0", arena="32MiB", tensors="dlpack")
runtime.register("chat", {str(path)!r})
{frameworks.code}
    assert np.array_equal(array.copy_to_host(), np.arange(6, dtype=np.float32))
    mine = weights["model.norm.weight"]
    assert isinstance(mine, cupy.ndarray)
    assert (mine.data.ptr, mine.shape, mine.dtype) == (view.address, (6,), np.float32)
    assert "dltensor_versioned" in repr(capsule)
del weights, view, array, capsule, mine
runtime.close()
""",
        tmp_path,
    )
    asyncio_blocks = [block for block in found if block.marker.startswith("asyncio-")]
    assert len(unmarked) + 3 + len(asyncio_blocks) == len(found)
    run_under_asyncio(asyncio_blocks, tmp_path, capfd)


def run_under_asyncio(found: list[Block], tmp_path: Path, capfd: Any) -> None:
    """Run the blocks of the section on asyncio; each leaves no lease."""
    assert len(found) == 5
    path = save(tmp_path / "model", "llama")
    wanted = plain(path).generate(PROMPT, max_new_tokens=8, do_sample=False)
    capfd.readouterr()
    with Runtime(arena="16MiB", staging="16MiB") as runtime:
        module = load(runtime, path, name="chat")
        names: dict[str, Any] = {"runtime": runtime, "module": module}
        names |= {"prompt": PROMPT, "path": path}
        for block in found:
            block.run(names)
            assert runtime.snapshot().leases == 0
    printed = capfd.readouterr().out.splitlines()
    assert printed[0] == str(wanted.tolist())
    assert [int(line) for line in printed[1:9]] == wanted[0, PROMPT.shape[1] :].tolist()


@runs("transformers.md")
def run_transformers(found: list[Block], tmp_path: Path, capfd: Any) -> None:
    path = save(tmp_path / "model", "llama")
    with Runtime(arena="16MiB", staging="16MiB") as runtime:
        names: dict[str, Any] = {"runtime": runtime, "prompt": PROMPT}
        found[0].run(names, model=path)
        for block in found[1:]:
            block.run(names)
        assert names["tokens"].equal(plain(path).generate(PROMPT, max_new_tokens=8))
        assert str(names["private"].dtype) == "torch.float16"
        assert runtime.snapshot().leases == 0


@runs("vllm.md")
def run_vllm(found: list[Block], tmp_path: Path, capfd: Any) -> None:
    """Compare what the blocks say to vLLM with the parser of options and the worker's methods."""
    module, _, name = WORKER.rpartition(".")
    source = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text()
    (worker,) = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == name
    ]
    methods = {node.name for node in worker.body if isinstance(node, ast.FunctionDef)}
    checked = []
    for block in found:
        assert block.marker == "vllm-example"
        for node in ast.walk(ast.parse(block.code)):
            if not isinstance(node, ast.Call):
                continue
            given = {each.arg: ast.literal_eval(each.value) for each in node.keywords}
            if isinstance(node.func, ast.Name):
                assert node.func.id == "LLM"
                assert Options.parse(given.pop("model_loader_extra_config")).arena == "4GiB"
                assert given == {"load_format": "warmserve", "worker_cls": WORKER}
                checked.append("LLM")
            elif isinstance(node.func, ast.Attribute):
                assert node.func.attr == "collective_rpc"
                (called,) = node.args
                assert ast.literal_eval(called) in methods
                checked.append("collective_rpc")
    assert checked == ["LLM", "collective_rpc", "collective_rpc"]


@runs("processes.md")
def run_processes(found: list[Block], tmp_path: Path, capfd: Any) -> None:
    """Run the program of two engines, in an arena that holds one of their models."""
    engine, program = found
    assert engine.marker == "engine-example"
    assert len((engine.code + program.code).splitlines()) <= 60
    (tmp_path / "engine.py").write_text(engine.code)
    sizes = [2 << 20, 2 << 20, 5]
    paths = {name: write_model(tmp_path / name, name, sizes) for name in ("chat", "code")}
    small = replace(program, code=program.code.replace('arena="8GiB"', 'arena="6MiB"'))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        small.run({}, **paths)
    answers = {
        name: sum(map(sum, (content(name, i, n) for i, n in enumerate(sizes)))) for name in paths
    }
    *turns, chat, code, evicted = capfd.readouterr().out.splitlines()
    assert turns == [
        f"{name} answers request {turn}: {answer:g}"
        for turn in range(3)
        for name, answer in answers.items()
    ]
    nbytes = sum(sizes)
    assert chat == f"chat 0 of {nbytes} bytes are resident"
    assert code == f"code {nbytes} of {nbytes} bytes are resident"
    assert evicted == "15 layers were evicted for each other"


@runs("scheduling.md")
def run_scheduling(found: list[Block], tmp_path: Path, capfd: Any) -> None:
    with Runtime(arena="64MiB", tensors="numpy") as runtime:
        runtime.register("chat", write_checkpoint(tmp_path / "m"))
        names: dict[str, Any] = {"runtime": runtime}
        for block in found:
            block.run(names)
            assert not names["fleet"].errors


@runs("testing.md")
def run_testing_page(found: list[Block], tmp_path: Path, capfd: Any) -> None:
    names: dict[str, Any] = {"path": write_checkpoint(tmp_path / "m")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)  # programs that a block starts import the installed package
        for block in found:
            block.run(names)
            if "simulated_cuda(" in block.code:
                assert not names["cuda"].violations
    assert capfd.readouterr().out == "WarmServeError\n"


def test_every_block_of_python_is_run() -> None:
    assert {block.page for block in blocks("python")} == {*PAGES, *ELSEWHERE}
    directives = {"{graphviz}", "{toctree}", "{eval-rst}", "{include}"}
    languages = {block.language.split(" ")[0] for block in blocks()}
    assert languages == {"python", "sh", *directives}


@pytest.mark.parametrize("name", PAGES)
def test_the_blocks_of_a_page_run_in_order(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = blocks("python", page=name)
    assert found
    PAGES[name](found, tmp_path, capfd)
