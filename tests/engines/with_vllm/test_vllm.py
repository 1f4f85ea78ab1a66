"""Check unpatched vLLM with weights in an arena."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_models import WORKER, engine, plain_engine, shut_down, tokens, worker_of, write_llama

from warmserve_rt import OutOfDeviceMemory, Runtime, StaleView, WarmServeError
from warmserve_rt.engines.vllm import arenas, use
from warmserve_rt.engines.vllm.sleep import ArenaBackend, release_pages
from warmserve_rt.engines.vllm.worker import mapped_shared_bytes

MIB = 1 << 20
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "tied": write_llama(root / "tied", 1, tied=True),
        "other": write_llama(root / "other", 2),
    }


@pytest.fixture(scope="module")
def wanted(models: dict[str, Path]) -> dict[str, list[list[int]]]:
    """Return the tokens that models answer with vLLM's own loader."""
    answers = {}
    for name, path in models.items():
        llm = plain_engine(path)
        answers[name] = tokens(llm)
        shut_down(llm)
    assert answers["tied"] != answers["other"]
    return answers


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make(cache: Path) -> Iterator[Make]:
    """Yield a maker of engines; afterwards close them and the arena, and check for leftovers."""
    made: list[Any] = []

    def one(model: Path, into: Path = cache, **options: Any) -> Any:
        made.append(engine(model, into, **options))
        return made[-1]

    yield one
    while made:
        shut_down(made.pop())
    gc.collect()
    if arena := arenas.find("host"):
        assert arena.runtime.models == ()
        arena.runtime.check_invariants()
        arena.runtime.close()


def runtime() -> Runtime:
    arena = arenas.find("host")
    assert arena is not None
    return arena.runtime


def resident(llm: Any) -> bool:
    (weights,) = worker_of(llm)._weights
    return runtime().snapshot().models[weights.model.name].resident


def test_the_plugin_is_found_by_its_entry_point() -> None:
    from vllm.device_allocator.sleep_mode_backend import SleepModeBackendFactory
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    from vllm.config.load import LoadConfig

    assert type(get_model_loader(LoadConfig(load_format="warmserve"))).__name__ == "ArenaLoader"
    assert SleepModeBackendFactory.get_backend_class("warmserve") is ArenaBackend


@pytest.mark.parametrize("name", ["tied", "other"])
def test_tokens_are_those_of_plain_vllm(
    make: Make,
    models: dict[str, Path],
    wanted: dict[str, list[list[int]]],
    tmp_path: Path,
    name: str,
) -> None:
    first = make(models[name], tmp_path)
    assert tokens(first) == wanted[name]
    shut_down(first)
    runtime().close()
    cached = make(models[name], tmp_path)
    assert tokens(cached) == wanted[name]
    shared = make(models[name], tmp_path)
    loaded = runtime().snapshot().bytes_loaded
    assert tokens(shared) == tokens(cached) == wanted[name]
    assert runtime().snapshot().bytes_loaded == loaded  # the second engine read nothing


def test_every_parameter_is_in_the_arena_and_shared(make: Make, models: dict[str, Path]) -> None:
    first, second = (worker_of(make(models["tied"])) for _ in range(2))
    views = {tensor.data_ptr() for tensor in first._weights[0].model.tensors().values()}
    one = dict(first.get_model().named_parameters(remove_duplicate=False))
    two = dict(second.get_model().named_parameters(remove_duplicate=False))
    assert one["lm_head.weight"] is one["model.embed_tokens.weight"]
    assert {p.data_ptr() for p in one.values()} == {p.data_ptr() for p in two.values()} == views


def test_a_plain_engine_beside_an_arena_answers_correctly(
    make: Make, models: dict[str, Path], wanted: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    """Everything that vLLM shares between models keeps its memory."""
    ours = make(models["tied"], tmp_path)
    plain = plain_engine(models["tied"])
    assert tokens(plain) == wanted["tied"] == tokens(ours)
    shut_down(plain)


def test_two_engines_take_turns_in_an_arena_that_fits_one(
    make: Make, models: dict[str, Path], wanted: dict[str, list[list[int]]]
) -> None:
    pair = {name: make(path, arena="28MiB") for name, path in models.items()}
    snapshot = runtime().snapshot()
    granules = [sum(layer.granules for layer in each.layers) for each in snapshot.models.values()]
    assert max(granules) < snapshot.granules < sum(granules)
    for turn in range(10):
        for name, llm in pair.items():
            answers = [each[:4] for each in wanted[name]]
            assert tokens(llm, count=4) == answers, f"turn {turn}"
            assert resident(llm)
            assert runtime().snapshot().leases == 0
    assert runtime().snapshot().layers_evicted > 0


def test_an_engine_s_models_are_known_by_name_and_can_be_prewarmed(
    make: Make, models: dict[str, Path], wanted: dict[str, list[list[int]]]
) -> None:
    llm = make(models["tied"])
    ((name,),) = llm.collective_rpc("warmserve_models")
    assert [model.name for model in runtime().models] == [name]
    runtime().evict(name)
    llm.collective_rpc("prewarm")
    runtime().prewarm(name).wait()
    loaded = runtime().snapshot().bytes_loaded
    assert resident(llm)
    assert tokens(llm) == wanted["tied"]
    assert runtime().snapshot().bytes_loaded == loaded


def test_sleeping_frees_all_memory_and_waking_answers_again(
    make: Make, models: dict[str, Path], wanted: dict[str, list[list[int]]]
) -> None:
    llm = make(models["tied"])
    assert tokens(llm) == wanted["tied"]
    for level in (1, 2):
        llm.sleep(level)
        assert runtime().snapshot().granules_free == runtime().snapshot().granules
        caches = worker_of(llm).model_runner.kv_caches
        assert caches
        assert not any(each.any() for each in caches)
        llm.wake_up()
        assert resident(llm)
        assert tokens(llm) == wanted["tied"]


def test_a_second_sleep_evicts_weights_that_arrived_meanwhile(
    make: Make, models: dict[str, Path], wanted: dict[str, list[list[int]]]
) -> None:
    llm = make(models["tied"])
    llm.sleep(1)
    for bring_in in ("prewarm", "compute_weight_checksums"):
        llm.collective_rpc(bring_in)
        runtime().prewarm(worker_of(llm)._weights[0].model).wait()
        assert resident(llm)
        llm.collective_rpc("sleep")
        assert not resident(llm)
    llm.wake_up()
    llm.wake_up()
    assert tokens(llm) == wanted["tied"]


def test_waking_the_kv_cache_alone_leaves_the_weights_asleep(
    make: Make, models: dict[str, Path], wanted: dict[str, list[list[int]]]
) -> None:
    llm = make(models["tied"])
    llm.sleep(1)
    llm.wake_up(tags=["kv_cache"])
    assert not resident(llm)
    llm.wake_up(tags=["weights"])
    assert resident(llm)
    assert tokens(llm) == wanted["tied"]


def test_pages_of_a_host_tensor_are_given_back() -> None:
    tensor = torch.ones(3 * MIB // 4)
    release_pages(tensor)
    assert tensor[4096:-4096].sum() == 0
    tensor += 1
    release_pages(torch.ones(3))  # less than a page


def test_a_gated_start_computes_while_the_tail_is_loaded(
    make: Make, models: dict[str, Path], wanted: dict[str, list[list[int]]]
) -> None:
    shut_down(make(models["other"]))  # so that the cache has it
    runtime().close()
    with Runtime(arena="32MiB", read_bandwidth="1MiB", tensors="torch") as slow:
        use(slow)
        llm = make(models["other"], gated=True)
        assert not resident(llm)
        answers = tokens(llm)
        assert resident(llm)
        assert answers == wanted["other"] == tokens(llm)
        shut_down(llm)


def test_a_gated_start_needs_eager_mode(make: Make, models: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="gated=True needs enforce_eager=True"):
        make(models["other"], gated=True, enforce_eager=False, compilation_config={"mode": 0})


@pytest.mark.parametrize("gated", [False, True])
def test_bytes_that_changed_in_the_cache_are_never_served(
    make: Make,
    models: dict[str, Path],
    wanted: dict[str, list[list[int]]],
    tmp_path: Path,
    gated: bool,
) -> None:
    shut_down(make(models["other"], tmp_path))
    runtime().close()
    (weights,) = tmp_path.glob("*/weights-*")
    with open(weights, "r+b") as file:
        file.seek(weights.stat().st_size // 2)
        file.write(b"\x7f" * 64)
    llm = make(models["other"], tmp_path, gated=gated)
    if gated:  # checked after the first step starts, but before its token
        with pytest.raises(Exception, match="is not as it was written"):
            tokens(llm)
        shut_down(llm)
        llm = make(models["other"], tmp_path, gated=gated)
    assert tokens(llm) == wanted["other"]
    assert not weights.exists()


def test_weights_that_changed_are_processed_again(
    make: Make, wanted: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    path = write_llama(tmp_path / "m", 3)
    first = make(path, tmp_path / "cache")
    answers = tokens(first)
    write_llama(tmp_path / "m", 2)
    second = make(path, tmp_path / "cache", arena=None)
    assert tokens(second) == wanted["other"] != answers
    assert tokens(first) == answers  # it still has its own weights
    assert len([*(tmp_path / "cache").glob("*/weights-*")]) == 2  # one is in use, one is served


def test_another_dtype_has_an_entry_of_its_own(
    make: Make, models: dict[str, Path], tmp_path: Path
) -> None:
    make(models["other"], tmp_path)
    llm = make(models["other"], tmp_path, dtype="bfloat16")
    plain = plain_engine(models["other"], dtype="bfloat16")
    assert len(tokens(llm)) == len(tokens(plain))
    kinds = {p.dtype for p in worker_of(llm).get_model().parameters()}
    assert kinds == {torch.bfloat16}
    assert len([*tmp_path.iterdir()]) == 2
    shut_down(plain)


def test_a_quantised_model_is_refused_by_the_name_of_its_part(make: Make, tmp_path: Path) -> None:
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    inputs = {**weights, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    path = write_llama(
        tmp_path / "m",
        1,
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
        },
    )
    with pytest.raises(ValueError, match=r"CompressedTensors\w+, of 'model\.layers\.0\."):
        make(path, tmp_path / "cache")
    assert not [*(tmp_path / "cache").glob("*/weights-*")]


def test_weights_stay_loaded_without_a_leasing_worker(
    make: Make,
    models: dict[str, Path],
    wanted: dict[str, list[list[int]]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    logging.getLogger("warmserve_rt").propagate = True
    with caplog.at_level(logging.WARNING):
        llm = make(models["tied"], worker="auto", arena="28MiB")
    assert f"pass worker_cls={WORKER!r}" in caplog.text
    assert tokens(llm) == wanted["tied"]
    assert runtime().snapshot().leases == 1
    with pytest.raises(OutOfDeviceMemory, match="make the arena larger"):
        make(models["other"])
    assert tokens(llm) == wanted["tied"]
    worker_of(llm).get_model().warmserve_weights.close()


def test_a_model_larger_than_the_arena_is_refused_at_its_start(
    make: Make, models: dict[str, Path]
) -> None:
    with pytest.raises(OutOfDeviceMemory, match="make the arena larger"):
        make(models["other"], arena="4MiB")


def test_a_failed_start_leaves_the_next_one_what_it_needs(
    make: Make, models: dict[str, Path], wanted: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    make(models["tied"], tmp_path)
    with pytest.raises(ValueError, match="arena must be left out or"):
        make(models["tied"], tmp_path, arena="1MiB")
    assert tokens(make(models["tied"], tmp_path)) == wanted["tied"]


def test_a_forward_pass_without_a_lease_is_refused(make: Make, models: dict[str, Path]) -> None:
    llm = make(models["other"])
    (weights,) = worker_of(llm)._weights
    runtime().evict(weights.model)
    model = worker_of(llm).get_model()
    with pytest.raises(StaleView, match="is not leased"):
        model(torch.tensor([1]), torch.tensor([0]))


def test_reading_weights_outside_of_a_step_takes_a_lease(
    make: Make, models: dict[str, Path]
) -> None:
    llm = make(models["other"])
    (weights,) = worker_of(llm)._weights
    worker = worker_of(llm)
    for use_it in (
        lambda: llm.apply_model(lambda model: float(model.lm_head.weight.sum())),
        lambda: worker.compute_weight_checksums(),
        lambda: worker.execute_dummy_batch(),
    ):
        runtime().evict(weights.model)
        use_it()
        assert resident(llm)
        assert runtime().snapshot().leases == 0


def test_writing_to_weights_is_refused(make: Make, models: dict[str, Path]) -> None:
    worker = worker_of(make(models["other"]))
    for what in ("reset_weights", "reload_weights", "start_weight_update"):
        with pytest.raises(NotImplementedError, match=f"{what}: weights in an arena are read-only"):
            getattr(worker, what)()


def test_a_step_that_fails_lets_go_of_its_lease(
    make: Make, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make(models["other"])
    runner = worker_of(llm).model_runner
    for half in ("execute_model", "sample_tokens"):
        with monkeypatch.context() as patched:
            patched.setattr(runner, half, fail)
            with pytest.raises(ArithmeticError):
                tokens(llm)
        assert runtime().snapshot().leases == 0
        shut_down(llm)
        llm = make(models["other"])
        runner = worker_of(llm).model_runner


def fail(*args: Any, **kwargs: Any) -> Any:
    raise ArithmeticError("a step failed")


def test_vllm_accounts_for_the_arena(make: Make, models: dict[str, Path]) -> None:
    llm = make(models["other"], arena="512MiB", gpu_memory_utilization=0.5)
    worker = worker_of(llm)
    worker.cache_config.kv_cache_memory_bytes = None
    free = worker.determine_available_memory()
    assert worker.determine_available_memory() == pytest.approx(free, rel=0.01)
    import psutil

    private = psutil.Process().memory_info().rss - mapped_shared_bytes()
    assert free + private + 512 * MIB == pytest.approx(worker.requested_cpu_memory, rel=0.01)


class Rest:
    """A stand-in for vLLM's own backend, which records its calls."""

    def __init__(self) -> None:
        self.calls: list[object] = []

    def suspend(self, level: int) -> None:
        self.calls.append(level)

    def resume(self, tags: list[str] | None) -> None:
        self.calls.append(tags)

    def discard(self, tags: tuple[str, ...]) -> None:
        self.calls.append(tags)


def test_the_sleep_mode_backend_evicts_and_loads_the_weights(
    make: Make, models: dict[str, Path]
) -> None:
    llm = make(models["other"])
    rest = Rest()
    backend = ArenaBackend(rest)
    with pytest.raises(WarmServeError, match="whose worker takes leases"):
        backend.suspend()
    backend.weights = worker_of(llm)._weights
    backend.suspend(2)
    assert not resident(llm)
    assert backend.state() == "SUSPENDED"
    backend.weights[0].prewarm().wait()
    backend.suspend()  # a second call evicts again
    assert not resident(llm)
    backend.resume(["kv_cache"])
    assert not resident(llm)
    backend.resume()
    assert resident(llm)
    assert backend.state() == "RUNNING"
    backend.discard(("kv_cache",))
    assert rest.calls == [2, 1, ["kv_cache"], None, ("kv_cache",)]


def test_a_worker_gives_its_weights_to_its_sleep_mode_backend(
    make: Make, models: dict[str, Path]
) -> None:
    worker = worker_of(make(models["other"]))
    worker.vllm_config.model_config.sleep_mode_backend = "warmserve"
    assert worker.sleep_mode_backend.weights is worker._weights
