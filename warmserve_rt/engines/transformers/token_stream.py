"""Streams generated tokens from a module to asyncio, under a lease for the generation's time."""

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

    Parameters
    ----------
    runtime : Runtime
        The runtime of the module's model.
    module : PreTrainedModel
        A module that `load` has returned.
    inputs : tensor or mapping
        Token ids of shape (1, n), or the result of a tokenizer.
    tokenizer : tokenizer, optional
        If given, the generator yields pieces of text of whole characters and words. Otherwise it
        yields token ids.
    timeout : float, optional
        Seconds that the first step waits for the lease at most. Default: no limit.
    streaming : bool
        As in `Runtime.lease`.
    buffer : int
        Number of items that may wait for the consumer, at least 1. When the buffer is full the
        generating thread waits, and holds the lease while it waits.
    **generate
        Arguments of ``module.generate``, such as ``max_new_tokens``.

    Yields
    ------
    int or str

    Raises
    ------
    ValueError
        The module is not bound to a runtime, there are several prompts, a streamer is given, or
        ``buffer`` is below 1.
    Other
        The exceptions of acquiring a lease, and of ``module.generate`` after the tokens that it
        generated before the error.

    Notes
    -----
    The first step acquires a lease on the module's model. ``module.generate`` then runs in a thread
    of its own, and the lease ends with that thread. If the consumer stops (its task is cancelled,
    it breaks out of the loop, it calls ``aclose()``, its event loop is closed), generation stops
    after the current token. Cancelling and ``aclose()`` return when the thread has ended.
    """
    if not hasattr(module, "warmserve_model"):
        raise ValueError("module must be bound to a runtime: make it with load()")
    if buffer < 1:
        raise ValueError(f"buffer must be at least 1, got {buffer}")
    if "streamer" in generate:
        raise ValueError("streamer must be left out: stream_tokens has one of its own")
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
        try:
            lease.release()
        except BaseException as raised:
            error = error or raised
        channel.finish(error)

    await lease.__aenter__()
    thread = threading.Thread(
        target=contextvars.copy_context().run, args=(run,), name="warmserve-stream"
    )
    try:
        thread.start()
    except BaseException:  # the thread that would release the lease did not start
        lease.release()
        raise
    try:
        while await channel.arrival():
            yield channel.take()
    finally:
        try:
            await channel.close()
        finally:  # also if the task was cancelled meanwhile
            thread.join()  # short: finish() was the thread's last call


class _Channel:
    """A bounded queue from a thread to an event loop. The loop may close it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, size: int) -> None:
        self._loop = loop
        self._size = size
        self._news = asyncio.Event()  # used by the loop's thread only
        self._room = threading.Condition()  # protects the fields below
        self._items: deque[Any] = deque()
        self._over = False
        self._error: BaseException | None = None
        self.stopped = False

    # Called by the thread.

    def put(self, item: Any) -> None:
        """Append an item. Blocks while the queue is full; drops the item if the queue is closed."""
        with self._room:
            while len(self._items) >= self._size and not self.stopped:
                self._room.wait(0.2)
                self.stopped |= self._loop.is_closed()  # a closed loop cannot call close()
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

    # Called by the loop.

    async def arrival(self) -> bool:
        """Wait for an item. Return False after the last; raise the thread's error once."""
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
        """Stop the thread and wait until it has finished, even if the task is cancelled."""
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
    """Forwards token ids; skips the prompt, which generate() puts first."""

    def __init__(self, channel: _Channel) -> None:
        self._channel = channel
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        if value.dim() > 1 and len(value) > 1:
            raise ValueError(f"only one sequence can be streamed, got {len(value)}")
        if self._prompt:
            self._prompt = False
            return
        for token in value.flatten().tolist():
            self._channel.put(token)

    def end(self) -> None:
        self._prompt = True


class _Text(TextStreamer):
    """Forwards pieces of text that later tokens do not change."""

    def __init__(self, channel: _Channel, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._channel = channel

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._channel.put(text)
