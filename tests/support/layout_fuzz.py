"""Fuzz layouts with sizes, sums and counts near every power of two.

The native runtime registers layers of one sparse file. A plain model in Python says which layouts
it must refuse, and with which error. Accepted layouts are loaded and compared with the file.

    python tests/support/layout_fuzz.py --layouts 100000 --seed 1
"""

from __future__ import annotations

import argparse
import math
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from warmserve_rt import Busy, CorruptCheckpoint, OutOfDeviceMemory, StaleView, _native, testing
from warmserve_rt.checkpoint.layout import ALIGNMENT

GRANULE = 2 << 20
CHUNK = 1 << 20
ARENA = 4  # granules
MOST = 2**63 - 1
DEVICES = ("host", "staged", "cuda")

# Bytes of addresses: a reservation of at most the first succeeds, of more than the second fails.
SURELY_RESERVED, NEVER_RESERVED = 2**44, 2**47

WIDTHS = {"f16_to_f32": (2, 4), "f32_to_f16": (4, 2), "bf16_to_f32": (2, 4), "f32_to_bf16": (4, 2)}
_POWERS = (20, 21, 22, 31, 32, 33, 40, 46, 47, 48, 52, 53, 62, 63, 64)
_NEAR = (-GRANULE - 1, -GRANULE, -4096, -257, -1, 0, 1, 256, 4095, GRANULE - 1, GRANULE)

Segment = tuple[int, int, int, int, str | None]
Layer = tuple[int, list[Segment]]


class SparseFile:
    """A file of the greatest length, all zeros except pages near the offsets that layouts use."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("layout-fuzz")
        os.truncate(self.fd, MOST)
        pages = random.Random(0)
        self.hot = [0, 4096, GRANULE, 2**31 - 4096, 2**32 - 4096, 2**32, 2**52, 2**62, MOST - 8192]
        for offset in self.hot:
            os.pwrite(self.fd, pages.randbytes(8192), offset)
        info = os.fstat(self.fd)
        identity = (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
        self.native = (self.fd, "layout-fuzz", identity)

    def read(self, offset: int, nbytes: int) -> bytes:
        return os.pread(self.fd, nbytes, offset)


def expected_bytes(file: SparseFile, layer: Layer) -> bytes:
    """Return the bytes that the runtime must hold for a layer."""
    nbytes, segments = layer
    out = bytearray(nbytes)
    for _, offset, at, count, cast in segments:
        source, target = WIDTHS[cast] if cast else (1, 1)
        raw = file.read(offset, count // target * source)
        out[at : at + count] = _cast(raw, cast) if cast else raw
    return bytes(out)


def _cast(raw: bytes, cast: str) -> bytes:
    """Cast with the package's own reference kernel, which other tests compare with torch."""
    source, target = WIDTHS[cast]
    out = bytearray(len(raw) // source * target)
    _native.cast(cast, raw, out)
    return bytes(out)


def refusal(layers: list[Layer]) -> type[Exception] | None:
    """Return the error that registering these layers must raise, or None if it must succeed."""
    for nbytes, segments in layers:
        for file, *numbers, _ in segments:
            if not 0 <= file < 2**32 or not all(0 <= number < 2**64 for number in numbers):
                return TypeError
        if not 0 <= nbytes < 2**64:
            return TypeError
    total = 0
    for nbytes, segments in layers:
        total += -(-nbytes // GRANULE)
        if nbytes > MOST or total * GRANULE > MOST:
            return ValueError
        end = 0
        for file, offset, at, count, cast in segments:
            if file != 0 or at < end or at + count > nbytes:
                return ValueError
            source, target = WIDTHS[cast] if cast else (1, 1)
            if at % target or count % target:
                return ValueError
            if offset + count // target * source > MOST:
                return CorruptCheckpoint
            end = at + count
    return None


def _near(random: random.Random, *, granules: bool = False) -> int:
    """Return a number near a power of two, or near a power of two of granules."""
    unit = GRANULE if granules else 1
    return max(-1, unit * 2 ** random.choice(_POWERS) + random.choice(_NEAR))


def _small(random: random.Random) -> int:
    """Return the size in bytes of a layer that the arena can hold."""
    return random.choice([0, 1, 255, 4096, CHUNK, GRANULE, random.randrange(1, ARENA * GRANULE)])


def random_layout(random: random.Random, file: SparseFile) -> list[Layer]:
    sizes = [_small(random) for _ in range(random.randrange(1, 5))]
    kind = random.random()
    if kind < 0.35:
        sizes.insert(random.randrange(len(sizes) + 1), _near(random))
    elif kind < 0.7:
        # The layers' sum of granules is near a power of two, but each layer is much smaller.
        target = 2 ** random.choice([p for p in _POWERS if 31 <= p <= 52])
        target += random.choice([-1, 0, 1, 2, ARENA])
        left = max(1, target - sum(-(-size // GRANULE) for size in sizes))
        parts = random.choice([1, 2, 5, 64])
        sizes += [left // parts * GRANULE] * (parts - 1)
        sizes.append((left - left // parts * (parts - 1)) * GRANULE)
        if random.random() < 0.5:
            random.shuffle(sizes)
    layers = [(size, list(_segments(random, file, size))) for size in sizes]
    if random.random() < 0.25:
        _spoil(random, layers)
    return layers


def _segments(random: random.Random, file: SparseFile, nbytes: int) -> Iterator[Segment]:
    at = 0
    for _ in range(random.randrange(4)):
        at = -(-at // ALIGNMENT) * ALIGNMENT
        cast = random.choice([None, None, *WIDTHS])
        source, target = WIDTHS[cast] if cast else (1, 1)
        offset = random.choice(file.hot) + random.randrange(0, 4096, 2)
        room = min(nbytes - at, 1 << 16, (MOST - offset) // source * target) // target * target
        if room <= 0:
            return
        count = random.randrange(0, room + 1, target)
        yield 0, offset, at, count, cast
        at += count


def _spoil(random: random.Random, layers: list[Layer]) -> None:
    """Set one number of one segment, or the size of one layer, to an arbitrary value."""
    index = random.randrange(len(layers))
    segments = layers[index][1]
    if not segments or random.random() < 0.3:
        layers[index] = (_near(random, granules=random.random() < 0.5), segments)
        return
    which, field = random.randrange(len(segments)), random.randrange(4)
    spoilt = list(segments[which])
    spoilt[field] = random.choice([_near(random), -1, 2**64, MOST, MOST + 1])
    segments[which] = (spoilt[0], spoilt[1], spoilt[2], spoilt[3], segments[which][4])


class Fuzzer:
    """One runtime with a tenant that stays leased, beside which layouts are tried in turn."""

    def __init__(self, runtime: _native.Runtime, file: SparseFile, *, digests: bool) -> None:
        self.runtime, self.file, self.digests = runtime, file, digests
        self.outcomes: Counter[str] = Counter()
        self.tenant: Layer = (GRANULE, [(0, file.hot[0], 0, 8192, None)])
        native = runtime.register("tenant", [file.native], [self.tenant], writable=False)
        self.model = native
        self.lease = runtime.begin_lease([native], 1)
        self.lease.wait()

    def check_tenant(self) -> None:
        self.compare(self.model, 0, self.tenant)

    def compare(self, model: _native.Model, index: int, layer: Layer) -> None:
        out = np.empty(layer[0], np.uint8)
        self.runtime.read_back(model, index, out)
        assert out.tobytes() == expected_bytes(self.file, layer), f"wrong bytes in layer {index}"

    def one(self, random: random.Random) -> None:
        layers = random_layout(random, self.file)
        expected = refusal(layers)
        try:
            model = self.runtime.register("m", [self.file.native], layers, writable=False)
        except (TypeError, ValueError) as error:
            if type(error) is not expected:
                raise AssertionError(f"{layers}: the error must be {expected}") from error
            self.outcomes[f"{type(error).__name__} at registration"] += 1
            return
        assert expected is None, f"{layers} was accepted instead of refused with {expected}"
        try:
            self.use(random, model, layers)
        finally:
            self.runtime.unregister(model, None, "streams")

    def use(self, random: random.Random, model: _native.Model, layers: list[Layer]) -> None:
        granules = [-(-nbytes // GRANULE) for nbytes, _ in layers]
        addresses = sum(granules) * GRANULE
        chosen = sorted(random.sample(range(len(layers)), random.randrange(1, len(layers) + 1)))
        fits = sum(granules[index] for index in chosen) <= ARENA - 1
        try:
            # A lease would wait for layers that fit the arena, but not beside the tenant.
            if random.random() < 0.3 or sum(granules[index] for index in chosen) == ARENA:
                self.runtime.prewarm(model, chosen, 0, None, math.inf).wait()
                lease = None
            else:
                lease = self.runtime.begin_lease([model], 2, chosen)
                lease.wait()
        except OutOfDeviceMemory:
            assert not fits or addresses > SURELY_RESERVED, f"{layers}, {chosen}: wrongly refused"
            self.outcomes["OutOfDeviceMemory"] += 1
            return
        except Busy:
            # The layers fit the arena, but not beside the tenant.
            assert sum(granules[index] for index in chosen) == ARENA
            self.outcomes["Busy"] += 1
            return
        assert fits, f"{layers}, {chosen}: loaded, but must be refused"
        assert addresses <= NEVER_RESERVED, f"{layers}: more addresses reserved than exist"
        for index in chosen:
            self.compare(model, index, layers[index])
        absent = [index for index in range(len(layers)) if index not in chosen and granules[index]]
        if absent and self.digests:
            try:
                self.runtime.digest(model, absent[0], GRANULE)
                raise AssertionError("digest() of an absent layer was not refused")
            except StaleView:
                pass
        if lease is not None:
            lease.release()
        self.outcomes["loaded"] += 1


@contextmanager
def fuzzer(device: str, file: SparseFile) -> Iterator[Fuzzer]:
    """Yield a fuzzer on a device under the strict driver; at exit check the driver's contracts."""
    if device == "cuda":
        with testing.simulated_cuda() as cuda, _on(testing.watch(cuda=cuda), file, False) as made:
            yield made
    else:
        with _on(testing.watch(host_view=device == "host"), file, True) as made:
            yield made


@contextmanager
def _on(watched: testing.Watched, file: SparseFile, digests: bool) -> Iterator[Fuzzer]:
    runtime = _native.Runtime(
        watched.driver,
        arena=ARENA * GRANULE,
        staging=4 * CHUNK,
        host_cache=0,
        granule=GRANULE,
        chunk=CHUNK,
        headroom=0,
        loaders=1,
        staging_timeout=30.0,
        poison=False,
        fence_device=False,
        background_share=0.05,
        read_bandwidth=0,
        peers=[],
    )
    made = Fuzzer(runtime, file, digests=digests)
    yield made
    made.check_tenant()
    runtime.check_invariants()
    made.lease.release()
    runtime.close()
    watched.check()


def run(device: str, layouts: int, seed: int, file: SparseFile) -> Counter[str]:
    """Try ``layouts`` random layouts on a device. Raises AssertionError with the wrong layout."""
    numbers = random.Random(seed)
    with fuzzer(device, file) as made:
        for number in range(layouts):
            made.one(numbers)
            if number % 64 == 0:
                made.check_tenant()
        return made.outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layouts", type=int, default=1000, help="total over all devices")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--devices", nargs="+", choices=DEVICES, default=DEVICES)
    options = parser.parse_args()
    file = SparseFile()
    for device in options.devices:
        begin = time.process_time()
        found = run(device, options.layouts // len(options.devices), options.seed, file)
        spent = time.process_time() - begin
        print(f"{device}: {dict(sorted(found.items()))}, {spent:.0f} s of CPU time", flush=True)


if __name__ == "__main__":
    main()
