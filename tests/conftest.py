"""The devices every test of the runtime runs on, each under the checking driver."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import Phase, settings

from warmserve_rt import Runtime, testing

settings.register_profile("first-failure", phases=[Phase.explicit, Phase.reuse, Phase.generate])


class Device:
    """Makes runtimes on one kind of device, and at the end holds them to its contracts."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.host_view = name == "host"
        self._made: list[tuple[Runtime, testing.Watched]] = []

    def watch(self, *, pump: bool = False) -> testing.Watched:
        return testing.watch(pump=pump, host_view=self.host_view)

    def runtime(self, **options: Any) -> Runtime:
        return self.watched_runtime(**options)[0]

    def watched_runtime(self, **options: Any) -> tuple[Runtime, testing.Watched]:
        watched = self.watch(pump=options.get("pump", False))
        options.setdefault("arena", "16MiB")
        options.setdefault("staging", "4MiB")
        options.setdefault("chunk", "2MiB")
        options.setdefault("tensors", "numpy")
        runtime = Runtime(driver=watched.driver, **options)
        self._made.append((runtime, watched))
        return runtime, watched

    def finish(self) -> None:
        for runtime, _ in self._made:
            runtime.close()
        watched = [watched for _, watched in self._made]
        self._made.clear()
        del runtime
        gc.collect()
        for one in watched:
            one.check()


@pytest.fixture(params=["host", "host-staged"])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    made = Device(request.param)
    yield made
    if made._made:
        made.finish()
