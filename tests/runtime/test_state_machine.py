"""Risk: some interleaving of operations loses a granule, tears a model or breaks a rule.

Hypothesis chooses operations and steps; the plain Python model says the result that each must have.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import GRANULE, content, write_model
from conftest import Device, bytes_of
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
)
from reference import Reference
from reference_parts import Lease, Refused, Ticket

import warmserve_rt
from warmserve_rt import Runtime

# Layer sizes in bytes. 0 is a layer of empty tensors. "e" is larger than the arena.
SIZES = {
    "a": [1000, 0, GRANULE + 8],
    "b": [GRANULE, 300, GRANULE // 2],
    "c": [2 * GRANULE + 1, GRANULE + 256],
    "d": [3 * GRANULE, 5],
    "e": [6 * GRANULE, 2 * GRANULE, 5],
}
CAPACITY = 8
SHARE = 0.3
NAMES = st.sampled_from(sorted(SIZES))
PRIORITIES = st.sampled_from([0, 50, 100])
LIMITS = st.sampled_from([math.inf, math.inf, 3.0, 2.5, 0.0, -1.0])  # for evict_below
LAYERS = st.one_of(st.none(), st.sets(st.integers(0, 2), min_size=1))  # None: all layers


def some(name: str, layers: set[int] | None) -> list[int] | None:
    """Return the layers that the model has, or its first if it has none of them."""
    return layers and ([layer for layer in layers if layer < len(SIZES[name])] or [0])


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        (name, revision): write_model(folder / f"{name}{revision}", name, layers, revision)
        for name, layers in SIZES.items()
        for revision in (0, 1)
    }


class Machine(RuleBasedStateMachine):
    files: dict[tuple[str, int], Path]
    device: Device
    tickets = Bundle("tickets")
    leases = Bundle("leases")

    @initialize()
    def start(self) -> None:
        self.watched = self.device.watch(pump=True)
        self.runtime = Runtime(
            arena=CAPACITY * GRANULE,
            granule=GRANULE,
            max_padding=1,
            staging=3 * GRANULE,
            chunk=GRANULE,
            pump=True,
            background_share=SHARE,
            tensors=self.device.tensors,
            driver=self.watched.driver,
        )
        # Staged copies arrive later than in the plain model. For them, only contents, invariants
        # and the end of all work are compared.
        self.exact = self.device.host_view
        self.reference = Reference(CAPACITY, SHARE)
        self.revision = dict.fromkeys(SIZES, 0)
        self.stream = self.runtime.stream()
        self.fenced: list[Any] = []
        self.live: list[Any] = []  # leases
        for name in SIZES:
            self.register(name)

    def register(self, name: str) -> None:
        self.runtime.register(name, self.files[name, self.revision[name]])
        self.reference.register(name, [-(-size // GRANULE) for size in SIZES[name]])

    def both(self, real: Any, model: Any) -> tuple[Any, Any] | None:
        """Run one operation on runtime and model, which must refuse alike; None if refused."""
        try:
            expected, refusal = model(), None
        except Refused as error:
            expected, refusal = None, str(error)
        got, refused = None, None
        try:
            got = real()
        except warmserve_rt.WarmServeError as error:
            refused = type(error).__name__
        if self.exact:
            assert refused == refusal
        return None if refused else (got, expected)

    @rule(target=tickets, name=NAMES, priority=PRIORITIES, layers=LAYERS, below=LIMITS)
    def prewarm(
        self,
        name: str,
        priority: int,
        layers: set[int] | None = None,
        below: float = math.inf,
    ) -> Any:
        chosen = some(name, layers)
        if not self.exact:
            below = math.inf  # the answer depends on which layers are resident by now
        return self.both(
            lambda: self.runtime.prewarm(name, priority=priority, layers=chosen, evict_below=below),
            lambda: self.reference.prewarm(name, priority, chosen, below),
        )

    @rule(target=tickets, evict=NAMES, load=NAMES, priority=PRIORITIES)
    def swap(self, evict: str, load: str, priority: int) -> Any:
        if evict == load:
            return None
        return self.both(
            lambda: self.runtime.swap(evict=evict, load=load, priority=priority),
            lambda: self.reference.swap(evict, load, priority),
        )

    @rule(ticket=consumes(tickets))
    def cancel(self, ticket: tuple[Any, Ticket] | None) -> None:
        if ticket:
            ticket[0].cancel()
            self.reference.cancel(ticket[1])

    @rule(ticket=tickets)
    def outcome(self, ticket: tuple[Any, Ticket] | None) -> None:
        if not ticket:
            return
        real, expected = ticket
        if self.exact:
            assert real.done == expected.done
        if real.done:
            try:
                real.wait(0)
                error = None
            except warmserve_rt.WarmServeError as raised:
                error = type(raised).__name__
            if self.exact:
                assert error == expected.error

    @rule(
        name=NAMES,
        what=st.sampled_from(["set_keep_value", "set_keep_value", "trim", "evict", "new revision"]),
        value=st.sampled_from([-1.0, 0.0, 2.5]),
        layers=LAYERS,
    )
    def keep_house(self, name: str, what: str, value: float, layers: set[int] | None) -> None:
        """Set keep values, trim, evict or register anew.

        These operations share one rule, so that operations that empty the arena are not chosen
        more often than operations that fill it.
        """
        if what == "set_keep_value":
            model = self.reference.models[name]
            for layer in model.some(some(name, layers)):
                layer.keep_value = value
            if layers is None:
                self.runtime.set_keep_value(name, value)
            else:
                self.runtime.set_keep_values(name, [layer.keep_value for layer in model.layers])
        elif what == "trim":
            before = self.runtime.snapshot()
            assert self.runtime.trim() == before.granules_free * GRANULE
        elif what == "evict":
            chosen = some(name, layers)
            self.both(
                lambda: self.runtime.evict(name, layers=chosen),
                lambda: self.reference.evict(name, chosen),
            )
        elif any(name in (m.name for m in lease.models) for lease in self.reference.line):
            pass  # a lease in line keeps the old model alive; the plain model cannot
        elif self.both(
            lambda: self.runtime.unregister(name) or True,
            lambda: self.reference.unregister(name),
        ):
            self.revision[name] ^= 1
            self.register(name)

    @rule(
        target=leases,
        names=st.lists(NAMES, min_size=1, max_size=3, unique=True),
        owner=NAMES,
        layers=LAYERS,
    )
    def begin_lease(self, names: list[str], owner: str, layers: set[int] | None = None) -> Any:
        models = [self.runtime.model(name).native for name in names]
        chosen = some(names[0], layers) if len(names) == 1 else None
        return self.remember(
            self.both(
                lambda: self.runtime.native.begin_lease(models, ord(owner), chosen),
                lambda: self.reference.begin_lease(names, ord(owner), chosen),
            )
        )

    @rule(target=leases, lease=leases, owner=NAMES)
    def share(self, lease: tuple[Any, Lease] | None, owner: str) -> Any:
        if not (lease and lease[1].admitted):
            return None
        return self.remember(
            self.both(
                lambda: lease[0].share(ord(owner)),
                lambda: self.reference.share(lease[1], ord(owner)),
            )
        )

    def remember(self, pair: tuple[Any, Any] | None) -> tuple[Any, Any] | None:
        if pair:
            self.live.append(pair[0])
        return pair

    def granted(self, lease: tuple[Any, Lease] | None) -> Lease | None:
        """Return the plain model's side of a lease that may be used now, else None."""
        try:
            if not lease or not lease[0].ready():
                return None
            lease[0].wait(0)
        except warmserve_rt.WarmServeError:  # the lease was released, or its load failed
            return None
        return lease[1]

    @rule(lease=leases)
    def use(self, lease: tuple[Any, Lease] | None) -> None:
        """Check that leased layers are resident and have the model's bytes."""
        expected = self.granted(lease)
        if not expected:
            return
        if self.exact:
            assert expected.admitted
            assert all(layer.state == "resident" for layer in expected.layers)
        for layer in expected.layers:
            self.compare(layer.model.name, layer.index)

    def compare(self, name: str, layer: int) -> None:
        for tensor in self.runtime.model(name).layers[layer].tensors:
            assert bytes_of(self.runtime, name, tensor.name) == self.expected(name, layer)

    @rule(lease=leases, data=st.data())
    def stream_in(self, lease: tuple[Any, Lease] | None, data: st.DataObject) -> None:
        """Wait for a layer of a lease that is still loading, read it on a stream, compare it."""
        if not (lease and lease[1].admitted and lease[1].layers):
            return
        real, layer = lease[0], data.draw(st.sampled_from(lease[1].layers))
        name, index = layer.model.name, layer.index
        nbytes = SIZES[name][index]
        view = self.runtime.model(name).layer_bytes(index, 0, nbytes)
        real.wait_layer(self.runtime.model(name).native, index, self.stream, 20)
        self.catch_up(lambda: layer.state == "resident")
        assert real.arrived(self.runtime.model(name).native, index)
        out = np.zeros(nbytes, np.uint8)
        self.stream.copy_from(out, view)
        real.record(self.stream)
        self.fenced.append((out, self.expected(name, index)))

    def catch_up(self, until: Callable[[], bool]) -> None:
        """Step the plain model as often as the runtime's wait stepped."""
        while self.exact and not until():
            assert self.reference.step()

    @rule(lease=leases)
    def copy_on_a_stream(self, lease: tuple[Any, Lease] | None) -> None:
        """Enqueue a copy under a lease; it must read the leased bytes whenever it runs."""
        expected = self.granted(lease)
        if not (lease and expected):
            return
        name = expected.models[0].name
        index = expected.layers[0].index
        nbytes = SIZES[name][index]
        out = np.zeros(nbytes, np.uint8)
        view = self.runtime.model(name).layer_bytes(index, 0, nbytes)
        self.stream.copy_from(out, view)
        lease[0].record(self.stream)
        self.fenced.append((out, self.expected(name, index)))

    @rule()
    def step_stream(self) -> None:
        if self.device.steps:
            self.stream.step()

    @rule(lease=consumes(leases))
    def release(self, lease: tuple[Any, Lease] | None) -> None:
        if lease:
            lease[0].release()
            self.reference.end_lease(lease[1])

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            moved = self.runtime.step()
            if self.exact:
                assert moved == self.reference.step()
            if not moved:
                return

    @rule(name=NAMES, priority=PRIORITIES, steps=st.integers(0, 12))
    def prewarm_and_step(self, name: str, priority: int, steps: int) -> None:
        self.prewarm(name, priority)
        self.step(steps)

    @rule(names=st.lists(NAMES, min_size=1, max_size=3), steps=st.integers(8, 40))
    def prewarm_several(self, names: list[str], steps: int) -> None:
        for name in names:
            self.prewarm(name, 0)
        self.step(steps)

    @rule(name=NAMES, owner=NAMES)
    def lease_briefly(self, name: str, owner: str) -> None:
        lease = self.begin_lease([name], owner)
        self.step(40)
        self.use(lease)
        self.release(lease)

    @rule()
    def run_until_idle(self) -> None:
        self.step(500)

    def expected(self, name: str, layer: int) -> bytes:
        return content(name, layer, SIZES[name][layer], self.revision[name])

    @invariant()
    def sound(self) -> None:
        self.runtime.check_invariants()
        assert not self.watched.strict.violations
        snapshot = self.runtime.snapshot()
        assert snapshot.pinned_bytes <= 3 * GRANULE
        if not self.exact:
            return
        assert snapshot.granules_free + snapshot.granules_trimmed == self.reference.free
        for name, model in self.reference.models.items():
            found = [(layer.residency, layer.leases) for layer in snapshot.models[name].layers]
            assert found == [(layer.state, layer.leases) for layer in model.layers], name
            assert snapshot.models[name].leases == model.leases

    def teardown(self) -> None:
        if not hasattr(self, "runtime"):
            return
        for _ in range(500):
            if not self.runtime.step():
                break
        else:
            raise AssertionError("the runtime still has work after 500 steps")
        self.stream.synchronize()
        for out, wanted in self.fenced:
            assert out.tobytes() == wanted
        for lease in self.live:
            lease.release()
        self.live.clear()
        self.runtime.close()
        watched = self.watched
        del self.runtime, self.stream
        gc.collect()
        watched.check()


def test_every_interleaving_keeps_the_rules(
    files: dict[tuple[str, int], Path], device: Device
) -> None:
    class Bound(Machine):
        pass

    Bound.files, Bound.device = files, device
    Bound.TestCase.settings = settings(
        max_examples=int(os.environ.get("EXAMPLES", 500 if os.environ.get("CI_ALL") else 150)),
        stateful_step_count=60,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    Bound.TestCase("runTest").runTest()
