"""Risk: a rare order of leases, deaths and stops gives a lease wrong bytes or loses granules."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from checkpoints import GRANULE, write_model

from processes import KeptBroker, Process, Processes, expected, wait_until

SECONDS = 10.0
CLIENTS = 4
GRANULES = 10  # of the arena; each model takes 5, and there are four
SIZES = (GRANULE // 2, GRANULE, 4096, 2 * GRANULE - 4096)

# Leases at random in two threads and compares the first and the last word of each leased tensor.
LEASES = """
import random

def leases_at_random(seed, until, words):
    found = {'leases': 0, 'refused': 0}
    failures = []
    def one(rng):
        while time.time() < until and not failures:
            name = rng.choice('abcd')
            count = len(words[name])
            layers = None if rng.random() < 0.3 else sorted(
                rng.sample(range(count), rng.randint(1, count)))
            streaming = rng.random() < 0.3
            try:
                with runtime.lease(name, layers=layers, streaming=streaming, timeout=0.5) as lease:
                    views = list(runtime.tensors(name).values())
                    for i in range(count) if layers is None else layers:
                        if streaming: lease.wait(i)
                        read = views[i][:8].tobytes(), views[i][-8:].tobytes()
                        if read != words[name][i]: failures.append((name, i, read))
                    if rng.random() < 0.1: time.sleep(rng.random() * 0.02)
                found['leases'] += 1
                if rng.random() < 0.05:
                    try: runtime.evict(name, wait='nothing')
                    except WarmServeError as error:  # no eviction waits for another broker
                        if 'broker' not in str(error): raise
            except (TimeoutError, Busy, Cancelled, StaleView):
                found['refused'] += 1
            except BaseException as error:
                failures.append(repr(error))
    threads = [threading.Thread(target=one, args=(random.Random(seed + i),)) for i in range(2)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    runtime.check_invariants()
    return found, failures
"""


@pytest.mark.parametrize("broker_dies", [False, True], ids=["broker lives", "broker dies"])
def test_leases_are_right_while_processes_are_killed_and_stopped(
    machine: Processes, tmp_path: Path, broker_dies: bool
) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    files = {name: write_model(tmp_path / name, name, SIZES) for name in "abcd"}
    words = {
        name: [(tensor[:8], tensor[-8:]) for tensor in expected(name, SIZES)] for name in files
    }
    start_broker = machine.kept_broker if broker_dies else machine.broker
    broker = start_broker(2 * GRANULES, patience=0.05)
    until = time.time() + SECONDS

    def start() -> Process:
        made = machine.client(**files)
        made.run(LEASES)
        made.begin(
            "leases_at_random(seed, until, words)",
            seed=rng.randrange(2**32),
            until=until,
            words=words,
        )
        return made

    clients = [start() for _ in range(CLIENTS)]
    kills = stops = deaths = 0
    while time.time() < until:
        time.sleep(rng.random() * 0.2)
        which = rng.randrange(CLIENTS)
        if isinstance(broker, KeptBroker) and rng.random() < 0.4:
            broker.kill_broker()
            deaths += 1
        elif rng.random() < 0.3:
            clients[which].kill()
            clients[which] = start()
            kills += 1
        else:
            clients[which].stop()
            time.sleep(rng.random() * 0.3)
            clients[which].go_on()
            stops += 1
    leases = 0
    for client in clients:
        found, failures = client.result()
        assert not failures
        leases += found["leases"]
    print(f"{leases} leases, {kills} kills, {stops} stops, {deaths} deaths of the broker")
    assert leases > 0
    broker.run("runtime.check_invariants()")
    sizes = [GRANULE] * GRANULES
    last = machine.client(all=write_model(tmp_path / "all", "all", sizes))
    assert last.run("weights('all', timeout=20)") == expected("all", sizes)
    broker.run("runtime.check_invariants()")
    wait_until(lambda: all(model.leases == 0 for model in machine.state().models))
