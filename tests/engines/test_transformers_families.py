"""Risk: a family of transformers models has a feature that binding, gates or generate() miss.

The tests use each named family at a small random size, and the real SmolLM2. They check tokens of
batches while the tail streams in, experts as separate layers, two stacks, and refusals.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_transformers import (  # noqa: E402
    MIXTURES,
    PROMPT,
    assert_rounded_alike,
    plain,
    plain_logits,
    save,
)
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer  # noqa: E402

from warmserve_rt import Runtime, StaleView  # noqa: E402
from warmserve_rt.demo.tenants import make_tenants  # noqa: E402
from warmserve_rt.engines.transformers import load  # noqa: E402
from warmserve_rt.engines.transformers.moe import Expert  # noqa: E402

# Three prompts of different lengths; the two shorter ones are padded on the left.
BATCH = {
    "input_ids": torch.tensor(
        [[0, 0, 0, 7, 3, 55], [20, 9, 41, 6, 30, 12], [0, 77, 14, 8, 61, 33]]
    ),
    "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1]]),
}
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread: on a busy machine, two that wait for each other take far longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    """Yield a runtime that moves one chunk at a time, and only while something waits.

    The residency of layers is therefore deterministic.
    """
    with Runtime(device="host", arena="96MiB", staging="16MiB", pump=True) as runtime:
        yield runtime


def residency(runtime: Runtime) -> dict[str, str]:
    names = [layer.name for layer in runtime.model("chat").layers]
    found = [layer.residency for layer in runtime.snapshot().models["chat"].layers]
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize(
    ("family", "apart"),
    [
        ("llama", False),
        ("qwen2", False),
        ("qwen3", False),
        ("gpt2", False),
        ("mixtral", False),
        ("mixtral", True),
    ],
)
def test_batches_are_generated_while_the_tail_streams_in(
    runtime: Runtime, tmp_path: Path, family: str, apart: bool
) -> None:
    path = save(tmp_path / "model", family, save_original_format=apart)
    wanted = plain(path).generate(**BATCH, **GREEDY).tolist()
    module = load(runtime, path, name="chat", layers="experts" if apart else None)
    layers = len(module.warmserve_model.layers)
    for kept in (0, layers // 2, layers):  # missing: everything, the tail, nothing
        runtime.evict("chat", keep=kept)
        with runtime.lease("chat", streaming=True):
            assert [*residency(runtime).values()].count("resident") == kept
            assert module.generate(**BATCH, **GREEDY).tolist() == wanted


def test_gpt2_s_transposed_matrices_and_tied_head_are_views(
    runtime: Runtime, tmp_path: Path
) -> None:
    """GPT-2 stores its matrices transposed, and its head is its embedding."""
    module = load(runtime, save(tmp_path / "model", "gpt2"), name="chat")
    tensors = runtime.tensors("chat")
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        part = module.get_submodule(f"transformer.h.1.{name}")
        assert type(part).__name__ == "Conv1D"
        assert part.weight.data_ptr() == tensors[f"transformer.h.1.{name}.weight"].data_ptr()
    assert "lm_head.weight" not in tensors
    assert module.lm_head.weight is module.transformer.wte.weight


@pytest.mark.parametrize("family", ["llama", "llama-yarn", "qwen3", "gpt2", "mixtral"])
def test_buffers_equal_those_of_transformers(runtime: Runtime, tmp_path: Path, family: str) -> None:
    path = save(tmp_path / "model", family)
    ours = dict(load(runtime, path).named_buffers())
    theirs = dict(plain(path).named_buffers())
    assert ours.keys() == theirs.keys()
    assert family == "gpt2" or any("inv_freq" in name for name in ours)
    for name, buffer in theirs.items():
        assert torch.equal(ours[name], buffer)


# Experts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layers", [None, "experts"])
@pytest.mark.parametrize("family", ["mixtral", *MIXTURES])
def test_separate_experts_compute_like_transformers_up_to_rounding(
    runtime: Runtime, tmp_path: Path, family: str, layers: Any, dtype: str
) -> None:
    path = save(tmp_path / "model", family, save_original_format=True)
    for _ in range(3):  # the third is a copy, not a new build
        module = load(runtime, path, name="chat", layers=layers, dtype=dtype)
        with runtime.lease("chat"), torch.no_grad():
            logits = module(PROMPT).logits
        runtime.unregister("chat")
    for how in ("eager", "grouped_mm"):
        wanted = plain_logits(path, dtype=module.dtype, experts_implementation=how)
        assert_rounded_alike(logits, wanted)


def test_experts_are_views_and_layers_of_their_own(runtime: Runtime, tmp_path: Path) -> None:
    path = save(tmp_path / "model", "mixtral", save_original_format=True)
    module = load(runtime, path, name="chat", layers="experts")
    names = [layer.name for layer in module.warmserve_model.layers]
    block = [f"model.layers.1{apart}" for apart in ("", *(f".experts.{n}" for n in range(4)))]
    assert names[6:11] == block
    assert (names[0], names[-1], len(names)) == ("embedding", "head", 2 + 3 * 5)
    tensors = runtime.tensors("chat")
    expert = module.model.layers[1].mlp.experts[2]
    for part, file_s in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        name = f"model.layers.1.block_sparse_moe.experts.2.{file_s}.weight"
        assert getattr(expert, part).data_ptr() == tensors[name].data_ptr()
        assert module.warmserve_model.layout.tensors[name].layer == names.index(block[3])


def test_a_pass_needs_only_the_experts_that_the_router_chose(
    runtime: Runtime, tmp_path: Path
) -> None:
    path = save(tmp_path / "model", "mixtral", save_original_format=True)
    module = load(runtime, path, name="chat", layers="experts")
    one = PROMPT[:, :1]
    ran: list[str] = []
    for name, part in module.named_modules():
        if isinstance(part, Expert):
            part.register_forward_hook(lambda *_, name=name: ran.append(name.replace(".mlp", "")))
    with runtime.lease("chat"), torch.no_grad():
        wanted = module(one).logits
    chosen = list(ran)
    assert len(chosen) == 3 * 2  # two of four in each block
    names = [layer.name for layer in module.warmserve_model.layers]
    needed = [name for name in names if "experts" not in name or name in chosen]

    runtime.evict("chat")
    with runtime.lease("chat", layers=needed), torch.no_grad():
        assert torch.equal(module(one).logits, wanted)
    assert {name for name, how in residency(runtime).items() if how == "resident"} == {*needed}

    missing = names.index(chosen[3])
    needed.remove(chosen[3])
    with (
        runtime.lease("chat", layers=needed),
        torch.no_grad(),
        pytest.raises(StaleView, match=f"layer {missing} of 'chat' is not leased"),
    ):
        module(one)


def test_an_expert_that_lacks_a_tensor_is_named(runtime: Runtime, tmp_path: Path) -> None:
    path = save(tmp_path / "model", "mixtral", save_original_format=True)
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.2.block_sparse_moe.experts.3.w3.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"needs 'model.layers.2.mlp.experts.3.up'"):
        load(runtime, path)


def test_a_surplus_expert_is_named(runtime: Runtime, tmp_path: Path) -> None:
    path = save(tmp_path / "model", "mixtral", save_original_format=True)
    with pytest.raises(ValueError, match=r"experts.3.w\d.weight' has no place in Mixtral"):
        load(runtime, path, num_local_experts=3)


def test_experts_in_one_tensor_cannot_be_layers(runtime: Runtime, tmp_path: Path) -> None:
    path = save(tmp_path / "model", "mixtral")
    with pytest.raises(ValueError, match="no tensor belongs to one expert alone"):
        load(runtime, path, layers="experts")


# Two stacks


@pytest.fixture
def t5(tmp_path: Path) -> Path:
    settings = {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_heads": 4}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    torch.manual_seed(0)
    config = AutoConfig.for_model("t5", num_layers=3, **settings, **tokens)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path / "t5")
    return tmp_path / "t5"


def test_an_encoder_decoder_model_streams_its_encoder_first(runtime: Runtime, t5: Path) -> None:
    wanted = plain(t5, AutoModelForSeq2SeqLM).generate(**BATCH, **GREEDY).tolist()
    module = load(runtime, t5, name="chat", auto_class=AutoModelForSeq2SeqLM)
    stacks = [f"{stack}.block.{n}" for stack in ("encoder", "decoder") for n in range(3)]
    assert [*residency(runtime)] == ["embedding", *stacks, "head"]
    seen: list[str] = []
    module.encoder.register_forward_hook(lambda *_: seen.extend(residency(runtime).values()))
    with runtime.lease("chat", streaming=True):
        assert module.generate(**BATCH, **GREEDY).tolist() == wanted
    assert seen[:4] == ["resident"] * 4
    assert seen.count("resident") < len(seen)  # the encoder did not wait for the decoder


def test_an_encoder_decoder_model_is_refused_as_a_decoder_alone(runtime: Runtime, t5: Path) -> None:
    with pytest.raises(ValueError, match=r"t5 has an encoder and a decoder.*Seq2SeqLM"):
        load(runtime, t5)
    assert not runtime.snapshot().models


def test_an_encoder_called_by_itself_must_be_leased(runtime: Runtime, t5: Path) -> None:
    """generate() calls the encoder directly, not through the forward pass of the whole module."""
    module = load(runtime, t5, name="chat", auto_class=AutoModelForSeq2SeqLM)
    with pytest.raises(StaleView, match="'chat' is not leased"):
        module.generate(PROMPT, max_new_tokens=2)
    with pytest.raises(StaleView, match="'chat' is not leased"):
        module.get_encoder()(PROMPT)


def test_an_encoder_within_a_larger_layer_is_waited_for(t5: Path) -> None:
    """The whole module waits for the one layer, but here the encoder is called by itself."""
    names = [*load_file(t5 / "model.safetensors")]
    with Runtime(arena="96MiB", staging="16MiB", pump=True, poison=True) as runtime:
        module = load(runtime, t5, layers=[names], auto_class=AutoModelForSeq2SeqLM)
        encoder = plain(t5, AutoModelForSeq2SeqLM).get_encoder()
        with runtime.lease(module.warmserve_model, streaming=True), torch.no_grad():
            states = module.get_encoder()(PROMPT).last_hidden_state
            theirs = encoder(PROMPT).last_hidden_state
    assert torch.equal(states, theirs)


# Refusals


def test_a_base_model_called_by_itself_must_be_leased(runtime: Runtime, tmp_path: Path) -> None:
    path = save(tmp_path / "model", "llama")
    module = load(runtime, path, name="chat")
    with pytest.raises(StaleView, match="'chat' is not leased"):
        module.model(PROMPT)
    with runtime.lease("chat", streaming=True), torch.no_grad():
        states = module.model(PROMPT).last_hidden_state
        assert torch.equal(module.lm_head(states), plain_logits(path))


def test_a_model_that_would_write_to_its_weights_is_refused(
    runtime: Runtime, tmp_path: Path
) -> None:
    path = save(tmp_path / "model", "rwkv")
    with pytest.raises(ValueError, match="rescales its weights in place"):
        load(runtime, path, rescale_every=6)
    assert runtime.models == ()


@pytest.mark.parametrize("method", ["fp8", "bitsandbytes", "gptq", "awq", "mxfp4"])
@pytest.mark.parametrize("part", [None, "text_config"])
def test_quantized_models_are_refused_by_their_method(
    runtime: Runtime, tmp_path: Path, method: str, part: str | None
) -> None:
    kind = "llama" if part is None else "llava"  # llava combines several models
    config = AutoConfig.for_model(kind).to_dict()
    (config if part is None else config[part])["quantization_config"] = {"quant_method": method}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"is quantized \({method}\)"):
        load(runtime, tmp_path)
    assert not runtime.snapshot().models


# The real SmolLM2


def test_smollm2_generates_like_transformers(tmp_path: Path) -> None:
    try:
        path = make_tenants(lambda *_: None, count=1)["A-base"]
    except RuntimeError as error:
        pytest.skip(f"no SmolLM2: {error}")
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    prompts = ["The capital of France is", "Once upon a time there was a small"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    assert batch["attention_mask"].min() == 0
    greedy = {"max_new_tokens": 8, "do_sample": False}
    with Runtime(device="host", arena="640MiB", staging="16MiB") as runtime:
        module = load(runtime, path, name="chat")
        assert module.lm_head.weight is module.model.embed_tokens.weight
        assert [*residency(runtime)] == [
            "embedding",
            *(f"model.layers.{block}" for block in range(30)),
            "head",
        ]
        runtime.prewarm("chat", layers=10).wait()
        with runtime.lease("chat", streaming=True):
            ours = module.generate(**batch, **greedy)
        runtime.evict("chat")
        with pytest.raises(StaleView, match="'chat' is not leased"):
            module.generate(**batch, **greedy)
    theirs = plain(path).generate(**batch, **greedy)
    assert ours.tolist() == theirs.tolist()
    assert "Paris" in tokenizer.decode(ours[0])
