"""Risk: an engine serves weights that are half written, damaged or of another model.

These tests do not need vLLM.
"""

from __future__ import annotations

import gc
import json
import logging
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from conftest import Device  # noqa: E402
from torch import nn  # noqa: E402

from warmserve_rt import Busy, OutOfDeviceMemory, Runtime, WarmServeError  # noqa: E402
from warmserve_rt._errors import CorruptCheckpoint  # noqa: E402
from warmserve_rt.engines import vllm as engine  # noqa: E402
from warmserve_rt.engines.torch.state import (  # noqa: E402
    LayoutDiffers,
    State,
    bind_parameters,
    bind_private,
    export,
    refuse_meta,
)
from warmserve_rt.engines.vllm import arenas  # noqa: E402
from warmserve_rt.engines.vllm.cache import Cache, Key, discard, open_for_use  # noqa: E402
from warmserve_rt.engines.vllm.weights import Arena, Weights  # noqa: E402

KEY = Key("model", {"model": "/models/a", "dtype": "float32"}, {"vLLM": "0.32.0"})
MIB = 1 << 20


def state_of(seed: int, layers: int = 2, mib: int = 1) -> State:
    """Return a state with layers of ``mib`` MiB each, filled with random numbers."""
    made = torch.Generator().manual_seed(seed)
    return State(
        parameters={
            f"model.layers.{i}.weight": torch.randn(mib * MIB // 4 // 256, 256, generator=made)
            for i in range(layers)
        },
        private={"model.table": torch.randn(7, generator=made)},
        aliases={"head.weight": "model.layers.0.weight"},
        attributes={"model.table"},
    )


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)


class TestCache:
    def test_a_written_entry_is_found_again(self, tmp_path: Path) -> None:
        state = state_of(1)
        written = Cache(tmp_path).write(KEY, state)
        found = Cache(tmp_path).find(KEY)
        assert found is not None
        assert found == written
        assert found.state.aliases == state.aliases
        assert found.state.attributes == state.attributes
        assert same(found.state.private, state.private)
        with Runtime(arena="8MiB", tensors="torch") as runtime:
            model = runtime.register("m", found.weights)
            with runtime.lease(model) as lease:
                assert same(dict(lease.tensors), state.parameters)
                for layer in model.layers:
                    assert [*runtime.digest(model, layer.index)] == found.digests[layer.name]

    @pytest.mark.parametrize("changed", ["vLLM", "checkpoint"])
    def test_an_entry_with_other_content_replaces_the_old_one(
        self, tmp_path: Path, changed: str
    ) -> None:
        cache = Cache(tmp_path)
        old = cache.write(KEY, state_of(1))
        other = Key(KEY.name, KEY.place, {**KEY.content, changed: "0.33.0"})
        assert cache.find(other) is None
        new = cache.write(other, state_of(2))
        assert new.folder == old.folder
        assert not old.weights.exists()
        assert cache.find(KEY) is None
        assert cache.find(other) == new

    def test_a_file_in_use_is_left_until_the_next_writer(self, tmp_path: Path) -> None:
        cache = Cache(tmp_path)
        old = cache.write(KEY, state_of(1))
        descriptor = open_for_use(old.weights)
        for version in ("0.33.0", "0.34.0"):
            cache.write(Key(KEY.name, KEY.place, {"vLLM": version}), state_of(2))
            assert old.weights.exists()
        os.close(descriptor)
        cache.write(Key(KEY.name, KEY.place, {"vLLM": "0.35.0"}), state_of(2))
        assert not old.weights.exists()

    def test_dtypes_and_shards_have_entries_of_their_own(self, tmp_path: Path) -> None:
        cache = Cache(tmp_path)
        other = Key(KEY.name, {**KEY.place, "dtype": "bfloat16"}, KEY.content)
        first, second = cache.write(KEY, state_of(1)), cache.write(other, state_of(2))
        assert cache.find(KEY) == first
        assert cache.find(other) == second

    @pytest.mark.parametrize(
        "damage",
        [
            lambda entry: os.truncate(entry.weights, entry.weights.stat().st_size - 1),
            lambda entry: entry.weights.unlink(),
            lambda entry: flip(next(entry.folder.glob("private-*")), -1),
            lambda entry: (entry.folder / "manifest.json").write_text("{"),
            lambda entry: (entry.folder / "manifest.json").write_text("[]"),
            lambda entry: edit(entry.folder / "manifest.json", format=99),
            lambda entry: edit(entry.folder / "manifest.json", orders={"model.layers.0": [1, 0]}),
            lambda entry: edit(entry.folder / "manifest.json", weights="../elsewhere"),
        ],
        ids=["cut", "gone", "private", "no JSON", "a list", "format", "layout", "path"],
    )
    def test_a_damaged_entry_is_not_found(
        self, tmp_path: Path, damage: object, caplog: pytest.LogCaptureFixture
    ) -> None:
        cache = Cache(tmp_path)
        entry = cache.write(KEY, state_of(1))
        damage(entry)  # type: ignore[operator]
        assert cache.find(KEY) is None
        again = cache.write(KEY, state_of(1))
        assert cache.find(KEY) == again

    def test_discarding_an_entry_keeps_a_newer_one(self, tmp_path: Path) -> None:
        cache = Cache(tmp_path)
        old = cache.write(KEY, state_of(1))
        discard(old, "a reason")
        assert cache.find(KEY) is None
        new = cache.write(KEY, state_of(2))
        discard(old, "a reason")
        assert cache.find(KEY) == new

    def test_a_dtype_that_safetensors_lacks_is_refused(self, tmp_path: Path) -> None:
        state = State(parameters={"a": torch.zeros(3, dtype=torch.complex128)})
        with pytest.raises(ValueError, match=r"'a' is torch\.complex128"):
            Cache(tmp_path).write(KEY, state)
        assert [path.name for path in Cache(tmp_path).folder(KEY).iterdir()] == ["lock"]

    def test_a_full_disk_leaves_the_old_entry(self, tmp_path: Path) -> None:
        cache = Cache(tmp_path)
        old = cache.write(KEY, state_of(1))
        other = Key(KEY.name, KEY.place, {"vLLM": "0.33.0"})
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 * MIB, before[1]))
        try:
            with pytest.raises(OSError, match=f"need {8 * MIB} bytes"):
                cache.write(other, state_of(2, mib=4))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        assert cache.find(KEY) == old
        assert len(list(old.folder.iterdir())) == 4  # a manifest, two files and a lock

    def test_a_writer_that_is_killed_leaves_the_old_entry(self, tmp_path: Path) -> None:
        cache = Cache(tmp_path)
        old = cache.write(KEY, state_of(1))
        child = subprocess.Popen(
            [sys.executable, "-c", SLOW_WRITER, str(tmp_path), *IMPORTED_FROM],
            cwd=tmp_path,  # no folder here has the package's name
        )
        try:
            deadline = time.monotonic() + 60
            while len(list(old.folder.glob("weights-*"))) < 2:  # the writer has begun
                assert time.monotonic() < deadline
                assert child.poll() is None
                time.sleep(0.01)
        finally:
            child.kill()
            child.wait()
        assert cache.find(KEY) == old
        assert len(list(old.folder.glob("weights-*"))) == 2
        new = cache.write(Key(KEY.name, KEY.place, {"vLLM": "0.33.0"}), state_of(3))
        assert [*old.folder.glob("weights-*")] == [new.weights]  # the killed writer's file is gone

    def test_two_processes_that_write_at_once_end_with_one_entry(self, tmp_path: Path) -> None:
        context = multiprocessing.get_context("spawn")
        with context.Pool(2) as pool:
            found = pool.starmap(write_it, [(tmp_path, seed) for seed in (1, 2, 1, 2)], 1)
        assert len(set(found)) == 1
        entry = Cache(tmp_path).find(KEY)
        assert entry is not None
        assert [str(entry.weights)] == found[:1]
        assert len(list(entry.folder.iterdir())) == 4


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def write_it(root: Path, seed: int) -> str:
    return str(Cache(root).write(KEY, state_of(seed)).weights)


# Folders in which another process finds this file and its imports.
TESTS = Path(__file__).resolve().parents[1]
IMPORTED_FROM = [str(TESTS / "engines"), str(TESTS), str(TESTS / "support")]

SLOW_WRITER = """
import sys, time
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_vllm_cache import KEY, state_of
from warmserve_rt.engines.vllm import cache
as_bytes = cache._bytes_of
cache._bytes_of = lambda tensor: (as_bytes(tensor), time.sleep(0.5))[0]
other = cache.Key(KEY.name, KEY.place, {"vLLM": "0.33.0"})
cache.Cache(Path(sys.argv[1])).write(other, state_of(2, layers=40))
"""


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.register_buffer("table", torch.arange(5.0), persistent=False)
        self.scale = torch.tensor(2.0)


class Whole(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.first, self.second = Part(), Part()
        if tied:
            self.second.weight = self.first.weight
        self.second.table = self.first.table


class Holder:
    def __init__(self) -> None:
        self.slopes = torch.arange(3.0)


class TestState:
    def test_an_exported_state_binds_to_an_equal_module(self) -> None:
        module = Whole()
        state = export(module)
        assert state.parameters.keys() == {"first.weight"}
        assert state.private.keys() == {"first.table", "first.scale", "second.scale"}
        assert state.aliases == {"second.weight": "first.weight", "second.table": "first.table"}
        with torch.device("meta"):
            other = Whole()
        bind_private(other, state)
        tensors = {name: each.clone() for name, each in state.parameters.items()}
        assert bind_parameters(other, state, tensors, exact=True) == 48
        refuse_meta(other)
        assert other.second.weight is other.first.weight
        assert other.first.weight.data_ptr() == tensors["first.weight"].data_ptr()
        assert torch.equal(other.first.weight, module.first.weight)
        assert torch.equal(other.second.table, module.first.table)
        assert other.second.scale == 2
        other.first.scale += 1  # this tensor is not shared
        assert module.first.scale == 2

    def test_the_order_of_axes_in_memory_is_kept(self) -> None:
        module = nn.Linear(3, 4, bias=False)
        module.weight = nn.Parameter(torch.randn(3, 4).t())
        state = export(module)
        assert state.orders == {"weight": [1, 0]}
        other = nn.Linear(3, 4, bias=False, device="meta")
        bind_parameters(other, state, state.parameters, exact=True)
        assert other.weight.stride() == module.weight.stride() == (1, 4)
        assert torch.equal(other.weight, module.weight)

    def test_a_parameter_with_gaps_is_refused_by_name(self) -> None:
        module = nn.Linear(3, 4, bias=False)
        module.weight = nn.Parameter(torch.randn(4, 6)[:, ::2])
        with pytest.raises(ValueError, match="'weight' must be dense"):
            export(module)

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            ({"first.weight": torch.zeros(4, 4)}, r"'first.weight' is torch.float32 \(4, 4\)"),
            ({"first.weight": torch.zeros(4, 3).half()}, "'first.weight' is torch.float16"),
            ({"first.more": torch.zeros(4)}, "has no parameter 'first.more'"),
            ({"third.weight": torch.zeros(4)}, "has no parameter 'third.weight'"),
        ],
    )
    def test_parameters_of_another_layout_are_refused(
        self, change: dict[str, torch.Tensor], complaint: str
    ) -> None:
        state = export(Whole())
        with torch.device("meta"):
            module = Whole()
        with pytest.raises(LayoutDiffers, match=complaint):
            bind_parameters(module, state, {**state.parameters, **change}, exact=True)

    def test_a_missing_buffer_is_refused(self) -> None:
        state = export(Whole())
        del state.private["first.table"]
        with torch.device("meta"):
            module = Whole()
        with pytest.raises(LayoutDiffers, match=r"'first\.table' is missing from"):
            bind_private(module, state)

    def test_a_tensor_inside_another_object_of_a_module_is_refused(self) -> None:
        module = nn.Linear(3, 4)
        with torch.device("meta"):
            module.kernel = Holder()
        with pytest.raises(ValueError, match=r"Linear has 'kernel\.slopes'"):
            refuse_meta(module)


def step(weights: Weights) -> None:
    with weights.runtime.lease(weights.model):
        pass


@pytest.fixture
def closed_afterwards() -> object:
    yield
    for device in ("host",):
        if found := arenas.find(device):
            found.runtime.close()


@pytest.mark.usefixtures("closed_afterwards")
class TestArenas:
    def entries(self, root: Path, count: int, mib: int = 4) -> list[object]:
        cache = Cache(root)
        keys = [Key(f"m{i}", {"model": i}, {}) for i in range(count)]
        return [cache.write(key, state_of(i, mib=mib)) for i, key in enumerate(keys)]

    def test_the_first_engine_makes_the_arena_as_large_as_its_model(self, tmp_path: Path) -> None:
        (entry,) = self.entries(tmp_path, 1)
        arena = arenas.obtain("host", None, entry)
        assert arena is not None
        assert arena.nbytes == 8 * MIB
        assert arenas.obtain("host", "8MiB") is arena
        assert arenas.find("host") is arena
        with pytest.raises(ValueError, match=r"must be left out or be 8388608, .* got '9MiB'"):
            arenas.obtain("host", "9MiB")

    def test_an_engine_can_use_the_caller_s_runtime(self) -> None:
        with Runtime(arena="8MiB", tensors="torch") as runtime:
            engine.use(runtime)
            assert arenas.obtain("host", None).runtime is runtime  # type: ignore[union-attr]
            with pytest.raises(ValueError, match="already has an arena on 'host'"):
                engine.use(runtime)
        assert arenas.find("host") is None  # its runtime is closed

    def test_engines_with_the_same_weights_share_them(self, tmp_path: Path) -> None:
        (entry,) = self.entries(tmp_path, 1)
        arena = arenas.obtain("host", None, entry)
        first, second = arena.add(entry), arena.add(entry)
        assert first.model is second.model
        first.close()
        first.close()
        assert arena.runtime.models == (second.model,)
        second.close()
        assert arena.runtime.models == ()

    def test_a_model_that_does_not_fit_is_refused_and_forgotten(self, tmp_path: Path) -> None:
        small, large = self.entries(tmp_path / "a", 1, 2) + self.entries(tmp_path / "b", 1, 8)
        arena = arenas.obtain("host", "8MiB")
        arena.add(small)
        with pytest.raises(OutOfDeviceMemory, match=f"needs {16 * MIB} bytes, but of the arena's"):
            arena.add(large)
        assert len(arena.runtime.models) == 1

    def test_weights_that_stay_must_leave_room_for_every_engine(self, tmp_path: Path) -> None:
        one, two = self.entries(tmp_path, 2)
        arena = arenas.obtain("host", "12MiB")
        arena.add(one)
        with pytest.raises(OutOfDeviceMemory, match="the largest of the others needs"):
            arena.add(two, kept=True)
        arena.add(two).close()  # the two may take turns

    def test_loaded_weights_are_compared_with_the_written_entry(self, tmp_path: Path) -> None:
        (entry,) = self.entries(tmp_path, 1)
        arena = arenas.obtain("host", None, entry)
        weights = arena.add(entry)
        weights.verify()
        weights.close()
        with open(entry.weights, "r+b") as file:
            file.seek(-5, os.SEEK_END)
            file.write(b"x")
        weights = arena.add(entry)
        with pytest.raises(
            CorruptCheckpoint, match=r"layer 'model.layers.1' is not as it was written"
        ):
            weights.verify()

    def test_weights_are_read_back_if_granules_have_another_size(self, tmp_path: Path) -> None:
        (entry,) = self.entries(tmp_path, 1)
        with Runtime(arena="16MiB", granule="4MiB", tensors="torch") as runtime:
            engine.use(runtime)
            weights = arenas.find("host").add(entry)
            weights.verify()
            weights.close()

    def test_sleeping_frees_memory_and_waking_loads_all_layers(self, tmp_path: Path) -> None:
        (entry,) = self.entries(tmp_path, 1)
        arena = arenas.obtain("host", None, entry)
        weights = arena.add(entry)
        weights.wake()
        assert arena.runtime.snapshot().models[weights.model.name].resident
        other = arena.add(entry)
        weights.sleep()
        weights.sleep()
        assert arena.runtime.snapshot().granules_free == 0  # the other is awake
        other.sleep()
        assert arena.runtime.snapshot().granules_free == 4
        other.close()
        weights.wake()
        weights.sleep()
        assert arena.runtime.snapshot().granules_free == 4
        weights.close()

    def test_a_second_sleep_evicts_layers_that_arrived_meanwhile(self, tmp_path: Path) -> None:
        (entry,) = self.entries(tmp_path, 1)
        arena = arenas.obtain("host", None, entry)
        weights, other = arena.add(entry), arena.add(entry)

        def resident() -> bool:
            return bool(arena.runtime.snapshot().models[weights.model.name].resident)

        other.sleep()
        for bring_in in (lambda: weights.prewarm().wait(), lambda: step(weights), weights.wake):
            bring_in()
            assert resident()
            weights.sleep()
            assert not resident()
            weights.sleep()
        weights.wake()
        weights.wake()
        other.sleep()
        assert resident()  # `weights` is awake, however often it was woken
        with arena.runtime.lease(weights.model), pytest.raises(Busy):
            weights.sleep()
        other.sleep()
        assert resident()  # its sleep was refused
        weights.sleep()
        assert not resident()

    def test_a_runtime_of_numpy_views_serves_an_engine_too(self, tmp_path: Path) -> None:
        (entry,) = self.entries(tmp_path, 1)
        with Runtime(arena="8MiB", tensors="numpy") as runtime:
            engine.use(runtime)
            weights = arenas.obtain("host", None).add(entry)
            weights.verify()
            assert weights.model.tensors("torch").keys() == state_of(0).parameters.keys()
            weights.close()

    @pytest.mark.parametrize(
        ("wrong", "device", "complaint"),
        [("x", "host", "runtime must be a"), (None, 3, "device must be 'host' or 'cuda:N', got 3")],
    )
    def test_anything_but_a_runtime_and_a_device_is_refused(
        self, wrong: object, device: object, complaint: str
    ) -> None:
        with Runtime(arena="8MiB") as runtime, pytest.raises(TypeError, match=complaint):
            engine.use(wrong or runtime, device)  # type: ignore[arg-type]

    def test_a_closed_runtime_is_refused(self) -> None:
        runtime = Runtime(arena="8MiB")
        runtime.close()
        with pytest.raises(WarmServeError, match="runtime must be open"):
            engine.use(runtime)

    def test_a_driver_call_that_fails_leaves_room_for_the_next(
        self, tmp_path: Path, device: Device
    ) -> None:
        (entry,) = self.entries(tmp_path, 1)

        def an_engine_s_life(arena: Arena) -> None:
            weights = arena.add(entry)
            with closing(weights):
                weights.wake()
                weights.verify()
                weights.sleep()
                weights.wake()

        descriptors = []
        for call in range(1, 500):
            watched = device.watch(pump=True)
            with Runtime(
                arena="8MiB",
                granule="2MiB",
                staging="16MiB",
                staging_timeout=0.25,
                pump=True,
                tensors=device.tensors,
                driver=watched.driver,
            ) as runtime:
                arena = Arena(runtime)
                watched.finest_faults.arm([(call, call)])
                with suppress(WarmServeError):
                    an_engine_s_life(arena)
                failed = watched.finest_faults.injected
                watched.finest_faults.disarm()
                an_engine_s_life(arena)
                assert runtime.models == ()
                runtime.check_invariants()
            gc.collect()
            watched.check()
            descriptors.append(len(os.listdir("/proc/self/fd")))
            if not failed:
                break
        assert 10 < call < 499
        assert descriptors[-1] == descriptors[0]


def test_an_untested_vllm_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        engine.warn_untested("0.32.7")
        engine.warn_untested("0.32.0+cpu")
        assert not caplog.records
        engine.warn_untested("0.33.0")
    assert "vLLM 0.33.0: warmserve_rt was tested with vLLM 0.32.*" in caplog.text
