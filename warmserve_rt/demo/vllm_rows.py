"""The rows of vLLM: an engine restarted at each switch, or one per tenant on a shared arena."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count as count_from
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # engines in this process, in any environment

from .vllm_engines import answers, arena_engine, plain_engine, shut_down  # before vLLM

# isort: split
import vllm
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from warmserve_rt import Runtime
from warmserve_rt.engines.vllm import use

from .content import Content, differing
from .rows import InArena, Row, Say
from .tenants import Progress

_numbers = count_from()


class PlainVllm:
    """Plain vLLM with its own loader."""

    name = "vLLM"
    version: str = vllm.__version__

    @contextmanager
    def __call__(self, path: Path) -> Iterator[Callable[[list[int], int], list[int]]]:
        with _open(partial(plain_engine, path)) as llm:
            yield partial(self.answer, llm)

    @staticmethod
    def answer(llm: Any, prompt: list[int], tokens: int) -> list[int]:
        how = SamplingParams(temperature=0, max_tokens=tokens)
        return answers(llm, [prompt], how)[0]


class Restarted(Row):
    """One plain vLLM engine at a time, restarted at every switch."""

    name = "restart"
    title = "restart"

    def __init__(self, tenants: Mapping[str, Path], contents: Mapping[str, Content]) -> None:
        self._tenants, self._contents = tenants, contents
        self._running = ExitStack()
        self._current = ""
        self._llm: Any = None
        self._moved = 0

    def ready(self, tenant: str) -> bool:
        return tenant == self._current

    @contextmanager
    def serving(self, tenant: str) -> Iterator[Say]:
        if tenant != self._current:
            self.close()
            self._llm = self._running.enter_context(
                _open(partial(plain_engine, self._tenants[tenant]))
            )
            self._current = tenant
            self._moved += self._contents[tenant].nbytes
        yield partial(say, self._llm)

    def bytes_moved(self) -> int:
        return self._moved

    def close(self) -> None:
        self._llm, self._current = None, ""
        self._running.close()


class Vllm(InArena):
    """An engine for each tenant, all in this process. Each leases its weights for each step."""

    def __init__(
        self,
        tenants: Mapping[str, Path],
        arena: int,
        cache: Path,
        progress: Progress,
        *,
        prewarm: bool = False,
        mutation: random.Random | None = None,
    ) -> None:
        runtime = Runtime(device="host", arena=arena, loaders=1, tensors="torch")
        with ExitStack() as undo:
            undo.callback(runtime.close)
            use(runtime)
            self._engines: dict[str, Any] = {}
            for name, path in tenants.items():
                self._engines[name] = undo.enter_context(_open(partial(arena_engine, path, cache)))
                progress("starting engines", len(self._engines), len(tenants))
            self._weights = {
                name: llm.collective_rpc("get_model")[0].warmserve_weights
                for name, llm in self._engines.items()
            }
            models = {name: weights.model for name, weights in self._weights.items()}
            super().__init__(runtime, models, prewarm=prewarm, mutation=mutation)
            self._running = undo.pop_all()

    @contextmanager
    def answering(self, tenant: str) -> Iterator[Say]:
        if self._mutation:
            with self.runtime.lease(self._models[tenant]):
                self.mutate(tenant)
        yield partial(say, self._engines[tenant])

    def bytes_match(self, tenant: str) -> bool:
        """Compare every granule with the output of vLLM's own loader and processing."""
        return self._weights[tenant].differing() is None

    def differing(self, tenant: str, other: str) -> list[tuple[int, int]]:
        return differing(*([*self._weights[name].digests.values()] for name in (tenant, other)))

    def close(self) -> None:
        self._weights.clear()
        self._engines.clear()
        self._running.close()


def say(llm: Any, prompt: list[int], count: int, end: int) -> Iterator[int]:
    """Yield greedy tokens, each as soon as it is known."""
    how = SamplingParams(
        temperature=0,
        max_tokens=count,
        stop_token_ids=[end] if end >= 0 else None,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    engine = llm.llm_engine
    engine.add_request(str(next(_numbers)), {"prompt_token_ids": prompt}, how)
    while engine.has_unfinished_requests():
        for output in engine.step():
            yield from output.outputs[0].token_ids


@contextmanager
def _open(make: Callable[..., Any]) -> Iterator[Any]:
    llm = make(max_model_len=512, max_num_seqs=1, kv_cache_memory_bytes=1 << 25)
    try:
        yield llm
    finally:
        shut_down(llm)
        del llm
        gc.collect()
