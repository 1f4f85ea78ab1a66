"""Risk: the demo flatters: it knows the future, compares nothing, or cannot fail."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("rich")

from safetensors.torch import load_file  # noqa: E402
from tiny_tenants import NAMES, cast_for, tiny  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from warmserve_rt._cache_dir import cache_dir  # noqa: E402
from warmserve_rt.cli import app  # noqa: E402
from warmserve_rt.demo import run as demo  # noqa: E402
from warmserve_rt.demo import tenants as tenants_module  # noqa: E402
from warmserve_rt.demo.content import Content, differing, unique_granules  # noqa: E402
from warmserve_rt.demo.lessons import LESSONS, QUESTIONS, Lesson  # noqa: E402
from warmserve_rt.demo.prewarmer import Prewarmer, rank  # noqa: E402
from warmserve_rt.demo.tenants import make_tenants  # noqa: E402
from warmserve_rt.demo.training import tune  # noqa: E402
from warmserve_rt.demo.workload import arrivals  # noqa: E402


@pytest.fixture
def cast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    return cast_for(monkeypatch, tmp_path)


def test_the_demo_passes_and_reports(cast: dict[str, Path], tmp_path: Path) -> None:
    assert demo.run(tmp_path / "out.json", requests=12, seed=3) == 0
    out = json.loads((tmp_path / "out.json").read_text())
    assert out["tokens_match"] is True
    assert out["bytes_match"] is True
    assert (out["models"], out["requests"]) == (5, 12)
    assert out["unique_bytes"] == 21 * demo.GRANULE  # five models of five layers, four shared
    assert out["arena_bytes"] == 10 * demo.GRANULE
    assert out["ttft_ms"].keys() == {"reload", "mmap", "on_demand", "prewarmed"}
    for times in out["ttft_ms"].values():
        assert 0 < times["p50"] <= times["p99"]
        assert times["hits"]["count"] + times["misses"]["count"] == 12


def test_the_demo_fails_when_a_granule_of_two_tenants_is_swapped(
    cast: dict[str, Path], tmp_path: Path
) -> None:
    assert demo.run(tmp_path / "out.json", requests=12, seed=3, mutate=True) == 1
    assert json.loads((tmp_path / "out.json").read_text())["bytes_match"] is False


def test_the_demo_fails_when_tokens_differ(
    cast: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo.reference, "_generate", lambda model, prompt, tokens: [1, 2, 3])
    assert demo.run(tmp_path / "out.json", requests=2) == 1
    assert json.loads((tmp_path / "out.json").read_text())["tokens_match"] is False


def test_reference_answers_are_kept_until_the_checkpoint_changes(
    cast: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = {name: Content(path, demo.GRANULE) for name, path in cast.items()}
    prompts = {"q": [5, 6, 7]}
    plain = demo.reference.PlainTransformers()
    arguments = cast, contents, prompts, 4, lambda *progress: None, plain
    answers = demo.reference.expected(*arguments)
    monkeypatch.setattr(demo.reference, "_generate", lambda *arguments: [9])
    assert demo.reference.expected(*arguments) == answers
    contents["C"].digest = "another"
    assert demo.reference.expected(*arguments) == {**answers, ("C", "q"): [9]}


def test_too_few_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        demo.run(requests=1)


def test_unknown_and_missing_engines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = CliRunner().invoke(app, ["demo", "--engine", "another"])
    assert refused.exit_code == 2
    assert "transformers" in refused.output
    assert "vllm" in refused.output
    monkeypatch.setattr(demo, "prepare", lambda *_, **__: import_module("vllm.not_there"))
    missing = CliRunner().invoke(app, ["demo", "--engine", "vllm"])
    assert missing.exit_code == 1
    assert "pip install 'warmserve_rt[demo,vllm]'" in str(missing.exception)


def test_the_content_check_finds_one_wrong_byte(cast: dict[str, Path]) -> None:
    content = Content(cast["A"], demo.GRANULE)
    tensors = load_file(cast["A"] / "model.safetensors")
    assert all(content.equals(name, tensor.clone()) for name, tensor in tensors.items())
    wrong = tensors["model.norm.weight"].clone()
    wrong.view(torch.uint8)[-1] ^= 1
    assert not content.equals("model.norm.weight", wrong)
    assert not content.equals("model.norm.weight", wrong[1:])


def test_shared_granules_count_once(cast: dict[str, Path]) -> None:
    a, b, c = (Content(cast[name], demo.GRANULE) for name in "ABC")
    assert [len(layer) for layer in a.granules] == [1] * 5
    assert unique_granules([a, b]) == 6
    assert unique_granules([a, b, c]) == 11
    assert differing(a.granules, b.granules) == [(3, 0)]
    assert a.digest != b.digest


def test_weights_are_written_aligned(cast: dict[str, Path]) -> None:
    for path in cast.values():
        assert all(
            tensor.data_ptr() % 64 == 0 for tensor in load_file(path / "model.safetensors").values()
        )


@pytest.mark.parametrize("seed", range(20))
def test_arrivals_are_in_order_seeded_and_spaced_as_asked(seed: int) -> None:
    stream = arrivals(NAMES, QUESTIONS, count=40, seed=seed, gap=2.0)
    assert len(stream) == 40
    assert stream == arrivals(NAMES, QUESTIONS, count=40, seed=seed, gap=2.0)
    assert stream != arrivals(NAMES, QUESTIONS, count=40, seed=seed + 1, gap=2.0)
    times = [request.time for request in stream]
    assert times == sorted(times)
    assert 40 < times[-1] < 160
    assert {request.tenant for request in stream} == set(NAMES)


def test_prewarming_follows_the_queue_then_habit_then_recency() -> None:
    assert rank(["C", "B", "C"], list("ABCABCCBC"), NAMES)[:2] == ["C", "B"]
    assert rank([], list("ABCABDABD"), NAMES) == ["A", "D", "B", "C", "E"]
    assert rank([], list("ADADACA"), NAMES)[:2] == ["D", "C"]
    assert rank([], [], NAMES) == NAMES


def test_prewarming_is_never_shown_the_future(
    cast: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = None
    seen: list[tuple[int, float]] = []

    def spy(self: Any, serving: str, queue: Any, past: Any) -> None:
        nonlocal started
        started = started or demo_clock()
        seen.append((len(past), demo_clock() - started))
        assert len(queue) <= len(past)

    from time import monotonic as demo_clock

    monkeypatch.setattr(Prewarmer, "look_ahead", spy)
    demo.run(None, requests=12, seed=1)
    stream = arrivals([*cast], QUESTIONS, count=12, seed=1, gap=demo.GAP)
    for count, time in seen:
        assert stream[count - 1].time <= time + 0.1
    assert seen[-1][0] == 12


@pytest.mark.parametrize("blocks", [None, 2])
def test_tuning_changes_only_the_chosen_blocks_and_lowers_the_loss(blocks: int | None) -> None:
    model, tokenizer = tiny(0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lesson = Lesson("w1 w2", "How w3? w4 w5\nWhy w6? w7", steps=3, rate=1e-2, blocks=blocks)
    steps: list[int] = []
    tune(model, tokenizer, lesson, steps.append)
    assert steps == [1, 2, 3]
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    blocks_2_up = {n for n in before if n.startswith(("model.layers.1.", "model.layers.2."))}
    assert changed == (set(before) if blocks is None else blocks_2_up)


def test_lessons_contain_none_of_the_demo_s_questions() -> None:
    for lesson in LESSONS.values():
        if lesson:
            pairs = lesson.conversations()
            assert len(pairs) == 16
            assert all(q.endswith("?") and a.startswith(lesson.voice) for q, a in pairs)
            assert not {q for q, _ in pairs} & set(QUESTIONS)


def test_tenants_are_made_once_and_a_killed_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made: list[str] = []

    def make(name: str, lesson: Any, base: Path, into: Path, progress: Any) -> None:
        if len(made) == 2 and name not in made:
            made.append(name)
            raise KeyboardInterrupt
        made.append(name)
        (into / "model.safetensors").write_text(name)

    monkeypatch.setattr(tenants_module, "_make", make)
    with pytest.raises(KeyboardInterrupt):
        make_tenants(lambda *progress: None)
    root = next(cache_dir().iterdir())
    (root / "making-left-over").mkdir()
    tenants = make_tenants(lambda *progress: None)
    assert made == [*list(LESSONS)[:3], *list(LESSONS)[2:]]
    assert make_tenants(lambda *progress: None) == tenants
    assert len(made) == 6
    assert sorted(path.name for path in root.iterdir()) == sorted([*LESSONS, "lock"])


def test_a_base_model_that_cannot_be_fetched_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="cannot fetch the base model"):
        make_tenants(lambda *progress: None)


def test_a_full_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tenants_module, "DISK_NEEDED", 1 << 60)
    with pytest.raises(RuntimeError, match="GB of free disk"):
        make_tenants(lambda *progress: None)
