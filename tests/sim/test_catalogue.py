"""Costs that differ from the published ones would make every simulated figure fiction."""

from __future__ import annotations

import pytest

from warmserve_rt.sim.workload import catalogue
from warmserve_rt.sim.workload.catalogue import (
    LLAMA2_70B_MEASURED,
    MEAN_PROMPT,
    MODELS,
    measured_llama2_70b,
)

PAPER = {  # bytes, width, prefill of the mean prompt, decode step, KV bytes of a token
    "llama2-7b": (13_476_831_232, 1, 0.035, 0.015, 512 * 1024),
    "llama2-13b": (26_032_558_080, 2, 0.070, 0.020, 800 * 1024),
    "llama2-70b": (137_961_209_856, 4, 0.100, 0.030, 320 * 1024),
}
TABLE = {  # layers, MB of a layer, MB of embedding and head, GB, KV KiB of a token
    "llama2-7b": (32, 404.8, 524, 13.48, 512),
    "llama2-13b": (40, 634.4, 655, 26.03, 800),
    "llama2-70b": (80, 1711.3, 1049, 137.95, 320),
    "llama3-8b": (32, 436.2, 2101, 16.06, 128),
    "llama3-70b": (80, 1711.3, 4203, 141.11, 320),
    "qwen2.5-7b": (28, 466.1, 2180, 15.23, 56),
    "qwen2.5-72b": (80, 1755.4, 4983, 145.41, 320),
    "qwen3-8b": (36, 385.9, 2489, 16.38, 144),
    "qwen3-32b": (64, 975.2, 3112, 65.52, 256),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_models_have_the_papers_costs(name: str):
    nbytes, width, prefill, decode, kv = PAPER[name]
    model = MODELS[name]
    assert model.width == width
    assert model.nbytes * width == nbytes
    assert model.prefill(MEAN_PROMPT) == pytest.approx(prefill)
    assert model.decode(1) == model.decode(32) == decode
    assert model.kv_token_bytes * width == kv
    assert model.batch == 32


@pytest.mark.parametrize(("name", "ratio"), [("llama2-7b", 16 / 41), ("llama2-13b", 24.7 / 47.5)])
def test_prefill_grows_with_the_prompt_as_measured(name: str, ratio: float):
    model = MODELS[name]
    assert model.prefill(128) / model.prefill(512) == pytest.approx(ratio)


@pytest.mark.parametrize("name", TABLE)
def test_sizes_match_the_published_sizes(name: str):
    layers, layer, ends, total, kv = TABLE[name]
    model = MODELS[name]
    first, *inner, last = model.layer_bytes
    assert len(inner) == layers
    assert inner[0] * model.width == pytest.approx(layer * 1e6, rel=2e-4)
    # The paper's totals include up to 8 MB that no table of shapes accounts for.
    assert (first + last) * model.width == pytest.approx(ends * 1e6, abs=9e6)
    assert abs(first - last) <= 1
    assert model.nbytes * model.width == pytest.approx(total * 1e9, abs=2e7)
    assert model.kv_token_bytes * model.width == kv * 1024


def test_times_of_other_models_lie_between_those_they_derive_from():
    assert set(MODELS) == set(TABLE)
    for name, model in MODELS.items():
        small, large = MODELS["llama2-7b"], MODELS["llama2-70b"]
        if model.width == 1:
            assert 1 <= model.prefill(512) / small.prefill(512) < 1.1, name
            assert 1 <= model.decode(1) / small.decode(1) < 1.1, name
    between = MODELS["qwen3-32b"]  # 15.6 billion parameters a device; the 70B has 17.1
    assert small.prefill(512) < between.prefill(512) < large.prefill(512)
    assert MODELS["llama2-13b"].decode(1) < between.decode(1) < large.decode(1)


def test_every_model_fits_its_devices_with_room_for_kv():
    for model in MODELS.values():
        assert model.nbytes < 0.5 * catalogue.A100.nbytes


def test_a_mix_has_distinct_names_and_the_stated_widths():
    paper = catalogue.paper_models()
    assert [m.name for m in paper] == ["llama2-7b-0", "llama2-7b-1", "llama2-13b-0", "llama2-70b-0"]
    models = catalogue.mixed(64)
    assert len({model.name for model in models}) == 64
    widths = [model.width for model in models]
    assert [widths.count(width) for width in (1, 2, 4)] == [40, 16, 8]
    assert {model.name.rsplit("-", 1)[0] for model in models} == set(MODELS)
    assert catalogue.mixed(5) == models[:5]


def test_unknown_models_and_invalid_numbers_are_refused():
    for n in (0, -1):
        with pytest.raises(ValueError, match=f"a catalogue must have at least one model, got {n}"):
            catalogue.mixed(n)
    with pytest.raises(
        ValueError, match="'gpt' is no model of the catalogue: choose one of llama2-7b"
    ):
        catalogue.model("gpt")
    with pytest.raises(
        ValueError, match="no measurements of llama2-70b on 'v100' x 4: choose one of"
    ):
        measured_llama2_70b("v100")


# Medians, in ms, of the measurements that the lines were fitted to: prompts of 128, 512 and 2,048
# tokens, then decode steps of 1, 8 and 32 requests.
MEDIANS = {
    ("a100-80gb", 2): ((81.08, 196.86, 688.05), (54.86, 61.69, 72.19)),
    ("a100-80gb", 4): ((63.65, 126.96, 403.33), (44.99, 45.80, 52.35)),
    ("a100-80gb", 8): ((65.35, 94.31, 274.22), (44.85, 46.47, 53.02)),
    ("h100-80gb", 2): ((48.33, 83.83, 310.32), (37.00, 40.40, 52.30)),
    ("h100-80gb", 4): ((49.09, 59.62, 200.68), (29.72, 31.44, 36.88)),
    ("h100-80gb", 8): ((58.19, 53.39, 136.80), (29.76, 32.50, 38.62)),
}


@pytest.mark.parametrize("key", MEDIANS)
def test_measured_times_are_within_their_stated_errors(key: tuple[str, int]):
    prompts, steps = MEDIANS[key]
    fit, model = LLAMA2_70B_MEASURED[key], measured_llama2_70b(*key)
    for tokens, ms in zip((128, 512, 2048), prompts, strict=True):
        assert abs(model.prefill(tokens) / (ms / 1000) - 1) <= fit.prefill_error
    for requests, ms in zip((1, 8, 32), steps, strict=True):
        assert abs(model.decode(requests) / (ms / 1000) - 1) <= fit.decode_error
    assert model.nbytes * model.width == pytest.approx(137_961_209_856, rel=1e-6)
