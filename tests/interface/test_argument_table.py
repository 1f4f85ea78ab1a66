"""Risk: a public call hands an ordinary argument to the native code unchecked, and the native code
fails with a message that only its author understands."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_model
from cuda_runtime import SIZES

from warmserve_rt import Runtime

Call = Callable[[Runtime, Path], Any]
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_model(tmp_path / "m", "a", SIZES)


@pytest.fixture
def runtime(path: Path) -> Iterator[Runtime]:
    with Runtime(arena="16MiB", staging="4MiB", chunk="2MiB", tensors="numpy") as made:
        made.register("m", path)
        yield made


def made(**options: Any) -> Call:
    """Return a call that makes a runtime with these options and closes it."""

    def call(runtime: Runtime, path: Path) -> None:
        Runtime(**{"arena": "8MiB", "tensors": "numpy", **options}).close()

    return call


ACCEPTED: dict[str, Call] = {
    "arena of numpy": made(arena=np.int64(8 << 20)),
    "arena, a float": made(arena=8e6),
    "arena in decimal": made(arena="8MB"),
    "arena in lower case": made(arena="8mib"),
    "arena, a share": made(arena="0.1%"),
    "headroom, a share": made(headroom="1%"),
    "staging, a share": made(staging="0.5%"),
    "granule of numpy": made(granule=np.uint32(4 << 20)),
    "loaders of numpy": made(loaders=np.int8(2)),
    "staging_timeout without end": made(staging_timeout=INF),
    "background_share, an integer": made(background_share=1),
    "background_share of numpy": made(background_share=np.float32(0.5)),
    "read_bandwidth, a float": made(read_bandwidth=1e9),
    "read_bandwidth in decimal": made(read_bandwidth="25GB"),
    "pump of numpy": made(pump=np.bool_(True)),
    "device in upper case": made(device="HOST"),
    "routes, none": made(routes=[]),
    "a path of bytes": lambda r, p: r.register("n", os.fsencode(p)),
    "a path": lambda r, p: r.register("n", p),
    "a tuple of paths of bytes": lambda r, p: r.register("n", (os.fsencode(p),)),
    "an iterator of paths": lambda r, p: r.register("n", iter([p])),
    "a name of numpy": lambda r, p: r.register(np.str_("n"), p),
    "writable of numpy": lambda r, p: r.register("n", p, writable=np.bool_(False)),
    "dtype of numpy": lambda r, p: r.register("n", p, dtype=np.float16),
    "priority of numpy": lambda r, p: r.prewarm("m", priority=np.int32(5)),
    "priority, the largest": lambda r, p: r.prewarm("m", priority=2**31 - 1),
    "deadline of numpy": lambda r, p: r.prewarm("m", deadline=np.float64(9)),
    "deadline without end": lambda r, p: r.prewarm("m", deadline=INF),
    "timeout of numpy": lambda r, p: r.prewarm("m").wait(np.float64(9)),
    "timeout without end": lambda r, p: r.prewarm("m").wait(INF),
    "timeout of a lease": lambda r, p: r.lease("m", timeout=np.int64(9)).acquire().release(),
    "stream, none": lambda r, p: r.lease("m", stream=None).acquire().release(),
    "stream of a lease": lambda r, p: r.lease("m", stream=r.stream()).acquire().release(),
    "timeout, a huge one": lambda r, p: r.lease("m", timeout=1e300).acquire().release(),
    "keep_value, an integer": lambda r, p: r.set_keep_value("m", 3),
    "keep_value of numpy": lambda r, p: r.set_keep_value("m", np.float32(3)),
    "keep_value, infinite": lambda r, p: r.set_keep_value("m", INF),
    "evict within a time": lambda r, p: r.evict("m", timeout=np.float64(1)),
}


@pytest.mark.parametrize("what", ACCEPTED)
def test_expected_arguments_are_accepted(what: str, runtime: Runtime, path: Path) -> None:
    ACCEPTED[what](runtime, path)
    runtime.check_invariants()


def leased(r: Runtime) -> Any:
    return r.lease("m").acquire()


REFUSED: list[tuple[Call, type[Exception], str]] = [
    (made(arena="2G"), ValueError, "arena must say whether it counts in 1000s or 1024s"),
    (made(arena="lots"), ValueError, "arena must be a whole number of bytes"),
    (made(arena=1.5), ValueError, "arena must be a whole number of bytes"),
    (made(arena=True), TypeError, "arena must be a whole number of bytes"),
    (made(arena=b"8MiB"), TypeError, "arena must be a whole number of bytes"),
    (made(arena="200%"), ValueError, "arena must be at most 100%"),
    (made(arena=2**80), ValueError, "arena must be less than 4 EiB"),
    (made(headroom=-1), ValueError, "headroom must be a whole number of bytes"),
    (made(staging=None), TypeError, "staging must be a whole number of bytes"),
    (made(granule="5%"), ValueError, "granule must be a whole number of bytes"),
    (made(granule=0), ValueError, "not a positive multiple of the device's 2 MiB"),
    (made(chunk=0), ValueError, "not a positive multiple of 4 KiB"),
    (made(chunk=NAN), ValueError, "chunk must be a whole number of bytes"),
    (made(loaders=1.5), TypeError, "loaders must be an integer from 0 to 1024, got 1.5"),
    (made(loaders=10**12), ValueError, "loaders must be an integer from 0 to 1024"),
    (made(loaders="2"), TypeError, "loaders must be an integer"),
    (made(staging_timeout="3"), TypeError, "staging_timeout must be a number of seconds"),
    (made(staging_timeout=-1), ValueError, "staging_timeout must be zero or more seconds"),
    (made(staging_timeout=NAN), ValueError, "staging_timeout must be zero or more seconds"),
    (made(background_share="x"), TypeError, r"background_share must be a number in \[0, 1\]"),
    (made(background_share=1.5), ValueError, r"background_share must be in \[0, 1\], got 1.5"),
    (made(background_share=NAN), ValueError, r"background_share must be in \[0, 1\], got nan"),
    (made(read_bandwidth=0), ValueError, "read_bandwidth must be at least one byte a second"),
    (made(read_bandwidth=-5), ValueError, "read_bandwidth must be a whole number of bytes"),
    (made(pump=1), TypeError, "pump must be True or False, got 1"),
    (made(poison="no"), TypeError, "poison must be True or False, got 'no'"),
    (made(fence="stream"), ValueError, "fence must be 'streams' or 'device', got 'stream'"),
    (made(tensors="jax"), ValueError, "jax"),
    (made(driver="cuda"), TypeError, "driver must be a device's driver, got 'cuda'"),
    (made(routes="cuda:1"), TypeError, "routes must be a sequence of 'cuda:N', got 'cuda:1'"),
    (made(device="cuda:0", routes=["gpu"]), ValueError, "route 'gpu' must be 'cuda:N'"),
    (made(routes=["cuda:1"]), ValueError, "only CUDA devices have routes"),
    (made(device="cuda:99999999999"), ValueError, "N must be an integer from 0 to 2147483647"),
    (made(device="cuda:" + "9" * 5000), ValueError, "N must be an integer from 0 to"),
    (made(device="cuda:-1"), ValueError, "no device 'cuda:-1': device must be"),
    (made(device="cuda:1.5"), ValueError, "no device 'cuda:1.5'"),
    (made(device="cpu"), ValueError, "did you mean 'host'"),
    (made(device=0), TypeError, "device must be 'host', 'cuda' or 'cuda:N', got 0"),
    (lambda r, p: r.register(b"n", p), TypeError, "name must be a string, got b'n'"),  # type: ignore[arg-type]
    (lambda r, p: r.register("", p), ValueError, "name must not be empty"),
    (lambda r, p: r.register("\ud800", p), ValueError, "name must be valid Unicode"),
    (lambda r, p: r.register("a@", p), ValueError, "must be 'name' or 'name@revision', got 'a@'"),
    (lambda r, p: r.register("n", 3), TypeError, "checkpoint must be a path .* sequence"),  # type: ignore[arg-type]
    (lambda r, p: r.register("n", [3]), TypeError, r"checkpoint\[0\] must be a path"),  # type: ignore[list-item]
    (lambda r, p: r.register("n", ""), ValueError, "checkpoint must not be an empty path"),
    (lambda r, p: r.register("n", "a\0b"), ValueError, "checkpoint must not contain a NUL"),
    (lambda r, p: r.register("n", []), ValueError, "at least one file"),
    (lambda r, p: r.register("n", p, dtype="int8"), ValueError, "dtype must be 'float32'"),
    (lambda r, p: r.register("n", p, dtype=3), ValueError, "dtype must be 'float32'"),
    (lambda r, p: r.register("n", p, dtype=np.int64), ValueError, "dtype must be 'float32'"),
    (lambda r, p: r.register("n", p, writable="no"), TypeError, "writable must be True or"),  # type: ignore[arg-type]
    (lambda r, p: r.model(3), TypeError, "model must be a name or a registered model, got 3"),  # type: ignore[arg-type]
    (lambda r, p: r.model(b"m"), TypeError, "model must be a name or a registered model"),  # type: ignore[arg-type]
    (
        lambda r, p: r.model("n"),
        ValueError,
        "no model 'n' is registered; did you mean 'm'|no model",
    ),
    (lambda r, p: r.promote(None), TypeError, "model must be a name or a registered model"),  # type: ignore[arg-type]
    (lambda r, p: r.prewarm("m", priority=10**12), ValueError, "from -2147483648 to 2147483647"),
    (lambda r, p: r.prewarm("m", priority=1.5), TypeError, "priority must be an integer"),  # type: ignore[arg-type]
    (lambda r, p: r.prewarm("m", priority="high"), TypeError, "priority must be an integer"),  # type: ignore[arg-type]
    (lambda r, p: r.prewarm("m", deadline=0), ValueError, "deadline must be more than 0 seconds"),
    (lambda r, p: r.prewarm("m", deadline=-1), ValueError, "deadline must be zero or more"),
    (lambda r, p: r.prewarm("m", deadline=NAN), ValueError, "deadline must be zero or more"),
    (lambda r, p: r.prewarm("m", deadline="3"), TypeError, "deadline must be a number of seconds"),  # type: ignore[arg-type]
    (lambda r, p: r.prewarm("m").wait(-1), ValueError, "timeout must be zero or more seconds"),
    (lambda r, p: r.prewarm("m").wait("3"), TypeError, "timeout must be a number of seconds"),  # type: ignore[arg-type]
    (lambda r, p: r.prewarm("m").wait(NAN), ValueError, "timeout must be zero or more seconds"),
    (lambda r, p: r.prewarm("m").wait(layer="x"), ValueError, "layer"),
    (lambda r, p: r.swap(evict="m", load="m", priority=10**12), ValueError, "priority must be"),
    (lambda r, p: r.swap(evict="m", load="m"), ValueError, "cannot be swapped for itself"),
    (lambda r, p: r.evict("m", wait="lease"), ValueError, "'leases', got 'lease'; did you mean"),  # type: ignore[arg-type]
    (lambda r, p: r.evict("m", wait=1), TypeError, "wait must be 'nothing', 'streams' or"),  # type: ignore[arg-type]
    (lambda r, p: r.evict("m", timeout=-1), ValueError, "timeout must be zero or more seconds"),
    (lambda r, p: r.unregister("m", timeout="3"), TypeError, "timeout must be a number"),  # type: ignore[arg-type]
    (lambda r, p: r.close(timeout=NAN), ValueError, "timeout must be zero or more seconds"),
    (lambda r, p: r.lease("m", timeout=-1), ValueError, "timeout must be zero or more seconds"),
    (lambda r, p: r.lease("m", timeout="3"), TypeError, "timeout must be a number of seconds"),  # type: ignore[arg-type]
    (lambda r, p: r.lease("m", streaming="yes"), TypeError, "streaming must be True or False"),  # type: ignore[arg-type]
    (lambda r, p: r.lease(3), TypeError, "model must be a name or a registered model, got 3"),  # type: ignore[arg-type]
    (lambda r, p: r.lease([3]), TypeError, "model must be a name or a registered model, got 3"),  # type: ignore[list-item]
    (lambda r, p: r.lease([]), ValueError, "a lease needs at least one model"),
    (lambda r, p: r.lease("m", stream="x"), TypeError, "stream must be one of Runtime.stream"),
    (lambda r, p: r.lease("m", stream=1), ValueError, "accepts only streams made by Runtime.str"),
    (lambda r, p: r.lease("m").acquire("x"), TypeError, "stream must be one of Runtime.stream"),
    (lambda r, p: r.lease("m").acquire(-1), ValueError, "stream must be an integer from 0 to"),
    (lambda r, p: r.set_keep_value("m", "x"), TypeError, "keep_value must be a number, got 'x'"),  # type: ignore[arg-type]
    (lambda r, p: r.set_keep_value("m", NAN), ValueError, "keep_value must be a number, got nan"),
    (lambda r, p: r.stream("high"), ValueError, "priority must be 'background', 'normal' or"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "error", "said"), REFUSED)
def test_other_arguments_are_refused_in_one_sentence(
    call: Call, error: type[Exception], said: str, runtime: Runtime, path: Path
) -> None:
    with pytest.raises(error, match=said) as raised:
        call(runtime, path)
    assert raised.type is error
    text = str(raised.value)
    assert "\n" not in text
    assert len(text) < 300
    assert "incompatible function arguments" not in text  # pybind11's words
    runtime.check_invariants()
    assert runtime.snapshot().leases == 0


def test_a_bound_module_is_not_accepted_as_a_model(runtime: Runtime) -> None:
    class Bound:
        warmserve_model = runtime.model("m")

    with pytest.raises(TypeError, match=r"a bound module's model is module\.warmserve_model"):
        runtime.lease(Bound())  # type: ignore[arg-type]


def test_a_torch_device_is_refused_with_the_right_name() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match="did you mean 'host'"):
        Runtime(torch.device("cpu"))  # type: ignore[arg-type]


def test_torch_dtypes_are_accepted(runtime: Runtime, path: Path) -> None:
    torch = pytest.importorskip("torch")
    runtime.register("n", path, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="dtype must be 'float32', 'float16' or 'bfloat16', got"):
        runtime.register("o", path, dtype=torch.int8)


def test_a_decimal_is_a_number(runtime: Runtime) -> None:
    runtime.set_keep_value("m", Decimal("2.5"))  # type: ignore[arg-type]
    assert runtime.snapshot().models["m"].layers[0].keep_value == 2.5
