"""Risk: a user at a prompt cannot see the state of a runtime, or the remedy for a refusal."""

from __future__ import annotations

import asyncio
import gc
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import write_model, write_safetensors
from conftest import Device, on_the_host
from cuda_runtime import SIZES

import warmserve_rt
from warmserve_rt import Cancelled, CorruptCheckpoint, Runtime

pytestmark = on_the_host


@pytest.fixture
def runtime(device: Device, two_files: dict[str, Path]) -> Iterator[Runtime]:
    made = device.runtime(arena="32MiB")
    for name, path in two_files.items():
        made.register(name, path)
    return made


def test_a_ticket_can_be_awaited_by_many(runtime: Runtime) -> None:
    async def main() -> None:
        ticket = runtime.prewarm("a")

        async def arrive() -> None:
            await ticket

        await asyncio.gather(*(arrive() for _ in range(5)))
        assert ticket.done
        await ticket

    asyncio.run(main())


def test_an_awaited_ticket_raises_what_loading_raised(
    runtime: Runtime, two_files: dict[str, Path]
) -> None:
    two_files["a"].write_bytes(b"")

    async def main() -> None:
        with pytest.raises(CorruptCheckpoint):
            await runtime.prewarm("a")

    asyncio.run(main())


def test_a_ticket_shows_layers_bytes_and_its_end(
    device: Device, two_files: dict[str, Path]
) -> None:
    runtime = device.runtime(pump=True)
    runtime.register("a", two_files["a"])
    ticket = runtime.prewarm("a")
    assert f"prewarm of 'a': 0 of {len(SIZES)} layers, 0 B of" in repr(ticket)
    assert repr(ticket).endswith(", loading>")
    assert ticket.progress.fraction == 0
    nbytes, total = ticket.progress
    assert nbytes == 0
    assert total >= sum(SIZES)
    ticket.wait()
    assert f"{len(SIZES)} of {len(SIZES)} layers" in repr(ticket)
    assert repr(ticket).endswith(", done>")
    assert ticket.progress.fraction == 1
    runtime.evict("a")
    cancelled = runtime.prewarm("a")
    cancelled.cancel()
    assert repr(cancelled).endswith(", cancelled>")
    with pytest.raises(Cancelled):
        cancelled.wait()


def test_a_progress_bar_ends_with_the_ticket(
    runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tqdm")
    runtime.prewarm("a").show()
    assert "prewarm of 'a': 100%" in capsys.readouterr().err
    runtime.evict("a")
    with runtime.lease(["a", "b"]), pytest.raises(ValueError, match="timeout"):
        runtime.prewarm("a").show(timeout=-1)


def test_a_failure_that_nobody_waits_for_is_logged(
    runtime: Runtime, two_files: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    two_files["a"].write_bytes(b"")
    ticket = runtime.prewarm("a")
    while not ticket.done:
        pass
    del ticket
    gc.collect()
    assert [r.levelname for r in caplog.records if "never waited for" in r.getMessage()] == [
        "WARNING"
    ]
    caplog.clear()
    with pytest.raises(CorruptCheckpoint):
        runtime.prewarm("a").wait()
    gc.collect()
    assert not [r for r in caplog.records if "never waited for" in r.getMessage()]


def test_the_log_names_loads_and_evictions(
    device: Device, two_files: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "warmserve_rt")
    runtime = device.runtime()
    runtime.register("a", two_files["a"])
    runtime.register("a@2", two_files["a"])
    runtime.promote("a@2")
    with runtime.lease("a"):
        pass
    with runtime.lease("a"):  # logs nothing, because it does not wait
        pass
    runtime.evict("a")
    runtime.unregister("a@2")
    runtime.close()
    said = [(r.levelname, r.getMessage().split()[0]) for r in caplog.records]
    assert said == [
        ("INFO", "made"),
        ("INFO", "registered"),
        ("INFO", "registered"),
        ("INFO", "promoted"),
        ("DEBUG", "waited"),
        ("DEBUG", "evicted"),
        ("INFO", "unregistered"),
        ("INFO", "closed"),
    ]


def test_the_log_is_silent_by_default(device: Device, two_files: dict[str, Path]) -> None:
    script = f"""
from warmserve_rt import Runtime
with Runtime(arena="32MiB") as runtime:
    runtime.register("a", {str(two_files["a"])!r})
    runtime.prewarm("a").wait()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_representations_are_short(runtime: Runtime, tmp_path: Path) -> None:
    tensors = {f"model.layers.{i}.w": ("U8", [1], b"0") for i in range(2000)}
    runtime.register("wide", write_safetensors(tmp_path / "wide", tensors))
    lease = runtime.lease("a")
    shown = [runtime, runtime.model("wide"), lease, runtime.snapshot(), *runtime.models]
    shown += runtime.snapshot().models.values()
    assert max(len(repr(each)) for each in shown) < 600
    assert "3 models" in repr(runtime)
    assert "not held" in repr(lease)
    with lease:
        assert repr(lease).endswith("held>")
        assert "1 lease>" in repr(runtime)
    assert "2000 layers" in repr(runtime.model("wide"))
    for model in range(40):
        runtime.register(f"m{model}", write_model(tmp_path / f"m{model}", "m", [5]))
    assert repr(runtime.snapshot()).endswith("and 23 more>")


def test_a_lease_that_times_out_says_who_holds_the_room(
    device: Device, two_files: dict[str, Path]
) -> None:
    runtime = device.runtime(arena="8MiB")
    for name, path in two_files.items():
        runtime.register(name, path)
    caught: list[TimeoutError] = []

    def ask() -> None:
        try:
            runtime.lease("b", timeout=0.1).acquire()
        except TimeoutError as error:
            caught.append(error)

    with runtime.lease("a"):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join(20)
    said = str(caught[0])
    assert said.startswith("lease on 'b' did not begin in time: it needs ")
    for part in ("of a budget of 8 MiB", "largest holders: 'a'", "(leased)", "can be evicted"):
        assert part in said


def test_messages_after_a_promotion_say_what_to_do(
    runtime: Runtime, two_files: dict[str, Path]
) -> None:
    first = runtime.model("a")
    assert runtime.why_not_leased(first) == (
        "'a' is not leased: run it under `with runtime.lease('a')`"
    )
    second = runtime.register("a@2", two_files["a"])
    assert runtime.why_not_leased(second).endswith("lease('a@2')` ('a' now stands for 'a')")
    runtime.promote("a@2")
    assert runtime.why_not_leased(first).startswith(
        "'a' now stands for 'a@2', and this module is bound to the revision registered as 'a'"
    )
    assert "warmserve_model" in runtime.why_not_leased(first)
    runtime.unregister("a@2")
    with pytest.raises(ValueError, match=r"'a' stands for no revision now.*runtime.promote\('a'\)"):
        runtime.lease("a")
    runtime.promote("a")
    with runtime.lease("a"):
        pass
    runtime.unregister("a")
    assert "it was unregistered: load the module again" in runtime.why_not_leased(first)
    runtime.register("a", two_files["a"])
    assert "'a' is another model now" in runtime.why_not_leased(first)
    with pytest.raises(ValueError, match="'a' is another model now"):
        runtime.lease(first)
    with pytest.raises(ValueError, match="no model 'bb' is registered"):
        runtime.lease("bb")
    runtime.close()
    assert "the runtime is closed" in runtime.why_not_leased(first)


def test_the_version_is_that_of_the_package(device: Device) -> None:
    from importlib.metadata import version

    assert warmserve_rt.__version__ == version("warmserve_rt")
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        _ = warmserve_rt.other  # type: ignore[attr-defined]
    done = subprocess.run(
        [sys.executable, "-m", "warmserve_rt", "--version"],
        capture_output=True,
        text=True,
        cwd="/",  # the source tree would shadow the installed package
    )
    assert done.stdout == f"warmserve-rt {warmserve_rt.__version__}\n"
