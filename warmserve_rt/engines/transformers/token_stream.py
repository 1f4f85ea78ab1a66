"""Streams the tokens that a module generates to asyncio, under a lease that ends with them."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING, Any, overload

import torch
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList, TextStreamer
from transformers.generation.streamers import BaseStreamer

if TYPE_CHECKING:
    from warmserve_rt.core.lease import Lease
    from warmserve_rt.core.runtime import Runtime


@overload
def stream_tokens(
    runtime: Runtime,
    module: PreTrainedModel,
    inputs: torch.Tensor | Mapping[str, Any],
    *,
    tokenizer: None = None,
    timeout: float | None = None,
    streaming: bool = False,
    buffer: int = 16,
    **generate: Any,
) -> AsyncGenerator[int, None]: ...
@overload
def stream_tokens(
    runtime: Runtime,
    module: PreTrainedModel,
    inputs: torch.Tensor | Mapping[str, Any],
    *,
    tokenizer: Any,
    timeout: float | None = None,
    streaming: bool = False,
    buffer: int = 16,
    **generate: Any,
) -> AsyncGenerator[str, None]: ...
def stream_tokens(
    runtime: Runtime,
    module: PreTrainedModel,
    inputs: torch.Tensor | Mapping[str, Any],
    *,
    tokenizer: Any = None,
    timeout: float | None = None,
    streaming: bool = False,
    buffer: int = 16,
    **generate: Any,
) -> AsyncGenerator[Any, None]:
    """Generate the continuation of one prompt, token by token, for ``async for``.

    The first step waits for a lease on the module's model (at most ``timeout`` seconds, with
    ``streaming`` as in `Runtime.lease`). ``module.generate`` then runs in a thread of its own, and
    the lease ends with that thread. When the consumer goes away (its task is cancelled, it breaks
    out of the loop, it calls ``aclose()``, its event loop is closed), generation stops after the
    token that it computes. Cancelling and ``aclose()`` return when the thread has ended.

    Yields token ids, or pieces of text if there is a ``tokenizer``: a piece has whole characters
    and words. ``inputs``: token ids, of shape (1, n), or what a tokenizer returns. ``buffer``:
    tokens that may wait for the consumer; when there are so many the thread waits too, and the
    lease with it. ``generate``: arguments of ``module.generate``, such as ``max_new_tokens``.

    Raises what acquiring a lease raises, and what ``generate`` raised, after the tokens before it;
    ValueError for a module that is not bound to a runtime, several prompts, or a streamer.
    """
    if not hasattr(module, "warmserve_model"):
        raise ValueError("the module is not bound to a runtime: make it with load()")
    if buffer < 1:
        raise ValueError(f"buffer must be at least 1, got {buffer}")
    if "streamer" in generate:
        raise ValueError("stream_tokens has a streamer of its own: do not pass one")
    arguments = dict(inputs) if isinstance(inputs, Mapping) else {"inputs": inputs}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and len(value) != 1:
            shape = tuple(value.shape)
            raise ValueError(f"{name} must have one prompt (shape (1, n)), got {shape}")
    if tokenizer is not None and "stop_strings" in generate:
        arguments["tokenizer"] = tokenizer
    model: Any = module.warmserve_model
    lease = runtime.lease(model, streaming=streaming, timeout=timeout)
    return _stream(lease, module, {**arguments, **generate}, tokenizer, buffer)


async def _stream(
    lease: Lease, module: PreTrainedModel, arguments: dict[str, Any], tokenizer: Any, buffer: int
) -> AsyncGenerator[Any, None]:
    channel = _Channel(asyncio.get_running_loop(), buffer)
    streamer = _Tokens(channel) if tokenizer is None else _Text(channel, tokenizer)
    criteria = StoppingCriteriaList(arguments.pop("stopping_criteria", None) or ())
    criteria.append(_Stopped(channel))

    def run() -> None:
        error: BaseException | None = None
        try:
            generate: Any = module.generate
            generate(**arguments, streamer=streamer, stopping_criteria=criteria)
        except BaseException as raised:
            error = raised
        finally:
            lease.release()
            channel.finish(error)

    await lease.__aenter__()
    thread = threading.Thread(
        target=contextvars.copy_context().run, args=(run,), name="warmserve-stream"
    )
    try:
        thread.start()
    except BaseException:  # the thread would have released it
        lease.release()
        raise
    try:
        while await channel.arrival():
            yield channel.take()
    finally:
        try:
            await channel.close()
        finally:  # also if the task was cancelled meanwhile
            thread.join()  # its last act was to say that it is over


class _Channel:
    """A bounded queue from a thread to an event loop, which the loop may close."""

    def __init__(self, loop: asyncio.AbstractEventLoop, size: int) -> None:
        self._loop = loop
        self._size = size
        self._news = asyncio.Event()  # the loop's
        self._room = threading.Condition()  # over all below
        self._items: deque[Any] = deque()
        self._over = False
        self._error: BaseException | None = None
        self.stopped = False

    # By the thread.

    def put(self, item: Any) -> None:
        """Blocks while the queue is full. Drops the item if nobody will take it."""
        with self._room:
            while len(self._items) >= self._size and not self.stopped:
                self._room.wait(0.2)
                self.stopped |= self._loop.is_closed()  # then nobody says so
            if self.stopped:
                return
            self._items.append(item)
        self._tell()

    def finish(self, error: BaseException | None) -> None:
        with self._room:
            self._over, self._error = True, error
        self._tell()

    def _tell(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._news.set)
        except RuntimeError:  # the loop is closed
            self.stopped = True

    # By the loop.

    async def arrival(self) -> bool:
        """Waits for an item. False: there are no more. Raises the thread's error, once."""
        while True:
            self._news.clear()
            with self._room:
                if self._items:
                    return True
                if self._over:
                    error, self._error = self._error, None
                    if error is not None:
                        raise error
                    return False
            await self._news.wait()

    def take(self) -> Any:
        with self._room:
            self._room.notify()
            return self._items.popleft()

    async def close(self) -> None:
        """Stops the thread, and waits until it is over, also if the task is cancelled meanwhile."""
        with self._room:
            self.stopped = True
            self._room.notify()
        cancelled: asyncio.CancelledError | None = None
        while True:
            self._news.clear()
            with self._room:
                if self._over:
                    break
            try:
                await self._news.wait()
            except asyncio.CancelledError as again:
                cancelled = again
        if cancelled is not None:
            raise cancelled


class _Stopped(StoppingCriteria):
    def __init__(self, channel: _Channel) -> None:
        self._channel = channel

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        stopped = self._channel.stopped
        return torch.full((len(input_ids),), stopped, device=input_ids.device, dtype=torch.bool)


class _Tokens(BaseStreamer):
    """Token ids, but for the prompt, which comes first."""

    def __init__(self, channel: _Channel) -> None:
        self._channel = channel
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        if value.dim() > 1 and len(value) > 1:
            raise ValueError(f"one sequence can be streamed, got {len(value)}")
        if self._prompt:
            self._prompt = False
            return
        for token in value.flatten().tolist():
            self._channel.put(token)

    def end(self) -> None:
        self._prompt = True


class _Text(TextStreamer):
    """Pieces of text that later tokens do not change."""

    def __init__(self, channel: _Channel, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._channel = channel

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._channel.put(text)
