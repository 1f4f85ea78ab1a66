"""Risk: a stream of tokens loses its thread, its lease, an error or a character."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tiny_transformers import PROMPT, plain, save  # noqa: E402

from warmserve_rt import Lease, OutOfDeviceMemory, Runtime  # noqa: E402
from warmserve_rt.engines.transformers import load, stream_tokens  # noqa: E402

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "a", "llama")


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    with Runtime(arena="12MiB", staging="16MiB") as runtime:
        yield runtime


@pytest.fixture
def module(runtime: Runtime, path: Path) -> Any:
    return load(runtime, path, name="a")


def wanted(path: Path, tokens: int) -> list[int]:
    made = plain(path).generate(PROMPT, max_new_tokens=tokens, **GREEDY)
    found: list[int] = made[0, PROMPT.shape[1] :].tolist()
    return found


def assert_nothing_is_left(runtime: Runtime) -> None:
    assert not [t for t in threading.enumerate() if t.name == "warmserve-stream"]
    assert runtime.snapshot().leases == 0
    runtime.evict("a", wait="nothing")


async def collect(stream: Any) -> list[Any]:
    return [item async for item in stream]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("inputs", [PROMPT, {"input_ids": PROMPT}], ids=["tensor", "mapping"])
def test_tokens_are_those_of_transformers(
    runtime: Runtime, module: Any, path: Path, inputs: Any, streaming: bool
) -> None:
    stream = stream_tokens(
        runtime, module, inputs, streaming=streaming, buffer=2, max_new_tokens=12, **GREEDY
    )
    assert asyncio.run(collect(stream)) == wanted(path, 12)
    assert_nothing_is_left(runtime)


class Bytes:
    """A tokenizer whose tokens are bytes, so that most characters take several tokens."""

    def __init__(self, text: str) -> None:
        self.text = text.encode()

    def decode(self, tokens: Any, **_: Any) -> str:
        ids = [tokens] if isinstance(tokens, int) else list(tokens)
        return bytes(ids).decode(errors="replace")


def test_text_comes_in_whole_characters(runtime: Runtime, module: Any) -> None:
    tokenizer = Bytes("añ漢字🙂 über\nfin")

    def generate(streamer: Any, **_: Any) -> None:
        streamer.put(PROMPT)
        for byte in tokenizer.text:
            streamer.put(torch.tensor([byte]))
        streamer.end()

    module.generate = generate
    pieces = asyncio.run(collect(stream_tokens(runtime, module, PROMPT, tokenizer=tokenizer)))
    assert "".join(pieces) == tokenizer.text.decode()
    assert len(pieces) > 3
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("how", ["cancel", "aclose", "break", "timeout"])
def test_generation_stops_at_the_next_token(runtime: Runtime, module: Any, how: str) -> None:
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1
        time.sleep(0.005)

    module.model.layers[0].register_forward_pre_hook(count)

    async def main() -> None:
        stream = stream_tokens(runtime, module, PROMPT, max_new_tokens=50, **GREEDY)
        if how in ("cancel", "timeout"):

            async def consume() -> None:
                async for _ in stream:
                    pass

            task = asyncio.create_task(consume())
            if how == "timeout":
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(task, 0.1)
            else:
                await asyncio.sleep(0.1)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
        else:
            async for _ in stream:
                break
            if how == "aclose":
                await stream.aclose()
            else:
                del stream
                gc.collect()
                for _ in range(100):
                    if not runtime.snapshot().leases:
                        break
                    await asyncio.sleep(0.01)
        seen = passes
        assert 0 < seen < 50
        assert_nothing_is_left(runtime)
        await asyncio.sleep(0.05)
        assert passes == seen

    asyncio.run(main())


def test_a_second_cancellation_waits_for_the_thread_too(runtime: Runtime, module: Any) -> None:
    inside, may_go = threading.Event(), threading.Event()

    def stop(*_: Any) -> None:
        inside.set()
        may_go.wait(20)

    module.model.layers[0].register_forward_pre_hook(stop)

    async def main() -> None:
        stream = stream_tokens(runtime, module, PROMPT, max_new_tokens=4, **GREEDY)
        task = asyncio.create_task(collect(stream))
        await asyncio.to_thread(inside.wait, 20)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0.02)
        assert not task.done()
        assert runtime.snapshot().leases == 1
        may_go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert_nothing_is_left(runtime)

    asyncio.run(main())


def test_a_slow_consumer_delays_the_generating_thread(
    runtime: Runtime, module: Any, path: Path
) -> None:
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    module.model.layers[0].register_forward_pre_hook(count)

    async def main() -> None:
        stream = stream_tokens(runtime, module, PROMPT, max_new_tokens=30, buffer=3, **GREEDY)
        first = await stream.__anext__()
        await asyncio.sleep(0.3)
        assert passes <= 1 + 3 + 1
        assert [first, *await collect(stream)] == wanted(path, 30)

    asyncio.run(main())
    assert_nothing_is_left(runtime)


def test_an_error_of_the_release_ends_the_stream(
    runtime: Runtime, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = Lease.release

    def fail(lease: Lease) -> None:
        release(lease)
        raise ValueError("not recorded")

    monkeypatch.setattr(Lease, "release", fail)
    stream = stream_tokens(runtime, module, PROMPT, max_new_tokens=2, **GREEDY)
    with pytest.raises(ValueError, match="not recorded"):
        asyncio.run(asyncio.wait_for(collect(stream), 20))
    assert_nothing_is_left(runtime)


def test_an_error_arrives_once_after_the_tokens_before_it(runtime: Runtime, module: Any) -> None:
    passes = 0

    def fail(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == 3:
            raise ArithmeticError("the third token")

    module.model.layers[0].register_forward_pre_hook(fail)

    async def main() -> list[int]:
        got: list[int] = []
        stream = stream_tokens(runtime, module, PROMPT, max_new_tokens=9, **GREEDY)

        async def consume() -> None:
            async for token in stream:
                got.append(token)

        with pytest.raises(ArithmeticError, match="the third token"):
            await consume()
        with pytest.raises(StopAsyncIteration):
            await stream.__anext__()
        return got

    assert len(asyncio.run(main())) == 2
    assert_nothing_is_left(runtime)


def test_a_stream_that_gets_no_lease_generates_nothing(
    runtime: Runtime, module: Any, tmp_path: Path
) -> None:
    other = load(runtime, save(tmp_path / "b", "llama", 1), name="b")
    stream = stream_tokens(runtime, module, PROMPT, timeout=0.05, max_new_tokens=2)
    with runtime.lease(other.warmserve_model), pytest.raises(TimeoutError):
        asyncio.run(collect(stream))
    assert_nothing_is_left(runtime)
    with Runtime(arena="4MiB") as small:
        module = load(small, tmp_path / "b")
        with pytest.raises(OutOfDeviceMemory):
            asyncio.run(collect(stream_tokens(small, module, PROMPT)))


def test_a_loop_that_is_closed_ends_the_thread(runtime: Runtime, module: Any) -> None:
    loop = asyncio.new_event_loop()
    stream = stream_tokens(runtime, module, PROMPT, max_new_tokens=50, buffer=1, **GREEDY)
    loop.run_until_complete(stream.__anext__())
    loop.close()
    for thread in threading.enumerate():
        if thread.name == "warmserve-stream":
            thread.join(20)
    assert_nothing_is_left(runtime)


def test_arguments_that_cannot_be_streamed_are_refused(
    runtime: Runtime, module: Any, path: Path
) -> None:
    for words, arguments in {
        "must be bound to a runtime": {"module": plain(path)},
        "buffer must be at least 1, got 0": {"buffer": 0},
        "streamer must be left out": {"streamer": object()},
        r"inputs must have one prompt \(shape \(1, n\)\), got \(2, 9\)": {
            "inputs": PROMPT.repeat(2, 1)
        },
        r"input_ids must have one prompt": {"inputs": {"input_ids": PROMPT.repeat(2, 1)}},
    }.items():
        every: Any = {"module": module, "inputs": PROMPT, **arguments}
        with pytest.raises(ValueError, match=words):
            stream_tokens(runtime, **every)
    stream = stream_tokens(runtime, module, PROMPT, num_return_sequences=2, do_sample=True)
    with pytest.raises(ValueError, match="one sequence"):
        asyncio.run(collect(stream))
    assert_nothing_is_left(runtime)
