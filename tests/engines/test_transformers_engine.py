"""Risk: a transformers module in the arena computes other results than transformers itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_transformers import (  # noqa: E402
    COMMON,
    FAMILIES,
    LLAMA,
    PROMPT,
    plain,
    plain_logits,
    save,
)
from torch import nn  # noqa: E402
from transformers import AutoConfig  # noqa: E402
from transformers.models.mixtral.modeling_mixtral import MixtralExperts  # noqa: E402

from warmserve_rt import CorruptCheckpoint, Runtime, StaleView  # noqa: E402
from warmserve_rt.engines import transformers as engine  # noqa: E402
from warmserve_rt.engines.torch.gates import gated_parts  # noqa: E402
from warmserve_rt.engines.transformers import bind, load  # noqa: E402
from warmserve_rt.engines.transformers.blueprints import KEPT, Blueprints  # noqa: E402
from warmserve_rt.engines.transformers.skeletons import skeleton  # noqa: E402


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    with Runtime(device="host", arena="96MiB", staging="16MiB") as runtime:
        yield runtime


@torch.no_grad()
def leased_logits(runtime: Runtime, module: Any) -> Any:
    with runtime.lease(module.warmserve_model):
        return module(PROMPT).logits


def rewrite(path: Path, **changes: Any) -> None:
    """Replace or add tensors of a checkpoint; None removes one. `__` stands for a dot."""
    tensors = load_file(path / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(runtime: Runtime, tmp_path: Path, family: str) -> None:
    path = save(tmp_path / "model", family)
    module = load(runtime, path)
    assert not module.training
    assert torch.equal(leased_logits(runtime, module), plain_logits(path))


def test_logits_equal_in_bfloat16_and_over_several_files(runtime: Runtime, tmp_path: Path) -> None:
    path = save(tmp_path / "model", "llama", dtype=torch.bfloat16, max_shard_size="40KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    module = load(runtime, path)
    assert module.dtype is torch.bfloat16
    assert torch.equal(leased_logits(runtime, module), plain_logits(path))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_in_another_dtype(
    runtime: Runtime, tmp_path: Path, family: str, dtype: str
) -> None:
    """The dtype differs from the checkpoint's, which transformers casts by itself."""
    path = save(tmp_path / "model", family)
    module = load(runtime, path, dtype=dtype)
    assert module.dtype is getattr(torch, dtype)
    wanted = plain_logits(path, dtype=module.dtype)
    assert torch.equal(leased_logits(runtime, module), wanted)


def test_a_weight_in_another_dtype_than_most_is_cast(runtime: Runtime, tmp_path: Path) -> None:
    path = save(tmp_path / "model", "llama")
    norm = load_file(path / "model.safetensors")["model.norm.weight"]
    rewrite(path, model__norm__weight=norm.half())
    module = load(runtime, path)
    assert module.model.norm.weight.dtype is torch.float32
    assert torch.equal(leased_logits(runtime, module), plain_logits(path))


def test_greedy_generation_equals_transformers(runtime: Runtime, tmp_path: Path) -> None:
    path = save(tmp_path / "model", "llama-tied")
    module = load(runtime, path)
    with runtime.lease(module.warmserve_model):
        ours = module.generate(PROMPT, max_new_tokens=8, do_sample=False)
    theirs = plain(path).generate(PROMPT, max_new_tokens=8, do_sample=False)
    assert ours.tolist() == theirs.tolist()


def test_weights_are_views_of_the_arena(runtime: Runtime, tmp_path: Path) -> None:
    module = load(runtime, save(tmp_path / "model", "qwen2"), name="q")
    tensors = runtime.tensors("q")
    parameters = dict(module.named_parameters())
    assert parameters.keys() == tensors.keys()
    for name, parameter in parameters.items():
        assert parameter.data_ptr() == tensors[name].data_ptr()
        assert not parameter.requires_grad


def test_tied_weights_are_one_parameter(runtime: Runtime, tmp_path: Path) -> None:
    module = load(runtime, save(tmp_path / "model", "gpt2"))
    assert module.lm_head.weight is module.transformer.wte.weight


def test_tied_weights_may_be_named_after_the_head(runtime: Runtime, tmp_path: Path) -> None:
    path = save(tmp_path / "model", "llama-tied")
    weight = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(path, model__embed_tokens__weight=None, lm_head__weight=weight)
    module = load(runtime, path)
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert torch.equal(leased_logits(runtime, module), plain_logits(path))


def test_weights_to_be_tied_stay_apart_if_the_checkpoint_has_both(
    runtime: Runtime, tmp_path: Path
) -> None:
    path = save(tmp_path / "model", "llama-tied")
    rewrite(path, lm_head__weight=torch.randn(96, 64))
    module = load(runtime, path)
    assert module.lm_head.weight is not module.model.embed_tokens.weight
    assert torch.equal(leased_logits(runtime, module), plain_logits(path))


def test_names_without_the_base_model_s_prefix_are_found(runtime: Runtime, tmp_path: Path) -> None:
    path = save(tmp_path / "model", "gpt2")
    tensors = load_file(path / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    short["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)  # old checkpoints contain their masks
    save_file(short, path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(leased_logits(runtime, load(runtime, path)), plain_logits(path))


def test_module_survives_eviction_and_other_tenants(runtime: Runtime, tmp_path: Path) -> None:
    paths = [save(tmp_path / str(seed), "llama", seed) for seed in range(3)]
    modules = [load(runtime, path) for path in paths]
    wanted = [plain_logits(path) for path in paths]
    assert not torch.equal(wanted[0], wanted[1])
    for turn in (0, 1, 2, 1, 0, 0, 2):
        assert torch.equal(leased_logits(runtime, modules[turn]), wanted[turn])
        runtime.evict(modules[turn].warmserve_model)


def test_forward_outside_a_lease_raises(runtime: Runtime, tmp_path: Path) -> None:
    module = load(runtime, save(tmp_path / "model", "llama"), name="chat")
    with pytest.raises(StaleView, match="'chat' is not leased"):
        module(PROMPT)
    leased_logits(runtime, module)
    with pytest.raises(StaleView, match="'chat' is not leased"):
        module.generate(PROMPT, max_new_tokens=2)


def test_printing_a_module_without_a_lease_is_harmless(runtime: Runtime, tmp_path: Path) -> None:
    module = load(runtime, save(tmp_path / "model", "llama"))
    assert "LlamaForCausalLM" in repr(module)


def check_refusal(runtime: Runtime, path: Path, *words: str) -> None:
    with pytest.raises(ValueError, match=".*".join(words)):
        load(runtime, path, name="refused")
    assert "refused" not in runtime.snapshot().models


def test_experts_that_cannot_be_separated_are_refused(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Families with more than an activation between the products of an expert are refused too."""
    path = save(tmp_path / "model", "mixtral", save_original_format=True)
    monkeypatch.setattr(MixtralExperts, "_apply_gate", lambda self, gate_up: gate_up)
    check_refusal(runtime, path, "block_sparse_moe.experts.0.w1.weight", "save_original_format")
    save(path, "mixtral")
    load(runtime, path, name="refused")  # the name is free again


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__norm__weight": None}, ["needs 'model.norm.weight'"]),
        ({"model__layers__1__extra": torch.ones(3)}, ["'model.layers.1.extra' has no place"]),
        ({"model__norm__weight": torch.ones(65)}, ["norm.weight", "65", "64"]),
        ({"model__norm__weight": torch.ones(64).double()}, ["norm.weight", "F64"]),
        ({"model__norm__weight": torch.ones(64).int()}, ["norm.weight", "int32", "float32"]),
        ({"norm__weight": torch.ones(64)}, ["norm.weight", "norm.weight", "both map to"]),
    ],
    ids=["missing", "extra", "shape", "double", "dtype", "twice"],
)
def test_checkpoints_that_do_not_fit_the_module_are_refused(
    runtime: Runtime, tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    path = save(tmp_path / "model", "llama")
    rewrite(path, **changes)
    check_refusal(runtime, path, *words)


class WithBuffers(transformers.LlamaForCausalLM):
    """A model with a buffer in its checkpoint, an initialised buffer, and optional flaws.

    ``forget`` adds a buffer that is never initialised, ``hide`` a tensor that is no buffer.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("saved", torch.full((3,), 5.0))
        self.register_buffer("ready", torch.full((4,), 6.0), persistent=False)
        if config.forget:
            self.register_buffer("forgotten", torch.ones(2), persistent=False)
        if config.hide:
            self.hidden = torch.ones(2)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            nn.init.constant_(self.ready, 6.0)

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> Any:
        return cls._from_config(config, **kwargs)


@pytest.mark.parametrize("flaw", ["none", "forget", "hide"])
def test_every_buffer_is_bound_filled_or_named(runtime: Runtime, tmp_path: Path, flaw: str) -> None:
    settings = {"forget": flaw == "forget", "hide": flaw == "hide"}
    config = AutoConfig.for_model("llama", **COMMON, **LLAMA, **settings)
    WithBuffers(config).save_pretrained(tmp_path)
    if flaw != "none":
        with pytest.raises(ValueError, match={"forget": "'forgotten'", "hide": "hidden"}[flaw]):
            load(runtime, tmp_path, auto_class=WithBuffers)
        return
    module: Any = load(runtime, tmp_path, name="m", auto_class=WithBuffers)
    assert module.saved.data_ptr() == runtime.tensors("m")["saved"].data_ptr()
    assert module.ready.tolist() == [6.0] * 4
    with runtime.lease("m"):
        assert module.saved.tolist() == [5.0] * 3


def test_a_module_can_be_bound_again(tmp_path: Path) -> None:
    paths = [save(tmp_path / str(seed), "llama-tied", seed) for seed in range(2)]
    module = skeleton(AutoConfig.from_pretrained(paths[0]), torch.float32)
    assert all(parameter.is_meta for parameter in module.parameters())
    for path in paths:
        tensors = load_file(path / "model.safetensors")
        bind(module, {name: tensor.clone() for name, tensor in tensors.items()})
        with torch.no_grad():
            assert torch.equal(module(PROMPT).logits, plain_logits(path))


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "mixtral", "opt"])
def test_the_first_pass_computes_while_layers_arrive(tmp_path: Path, family: str) -> None:
    """The pass waits for each layer before the layer computes, and not before its turn."""
    path = save(tmp_path / "model", family)
    with Runtime(arena="96MiB", staging="16MiB", pump=True) as runtime:
        module = load(runtime, path, name="chat")
        with runtime.lease("chat", streaming=True), torch.no_grad():
            here = []
            for part in module.modules():
                part.register_forward_hook(lambda *_: here.append(resident(runtime)))
            logits = module(PROMPT).logits
        assert torch.equal(logits, plain_logits(path))
        assert here == sorted(here)
        assert 0 < here[0] < here[-1]  # the first parts ran before the last layers arrived
        assert torch.equal(leased_logits(runtime, module), logits)


def resident(runtime: Runtime) -> int:
    layers = runtime.snapshot().models["chat"].layers
    return sum(layer.residency == "resident" for layer in layers)


def test_gates_exist_only_while_a_layer_is_missing(runtime: Runtime, tmp_path: Path) -> None:
    module = load(runtime, save(tmp_path / "model", "llama"), name="chat")

    def hooks() -> int:
        return sum(len(part._forward_pre_hooks) for part in module.modules())

    assert hooks() == 0
    with runtime.lease("chat", layers=3, streaming=True):
        with pytest.raises(StaleView, match="layer 3 of 'chat' is not leased"):
            module(PROMPT)
        assert hooks() == 3  # on the last block, the norm and the head
    leased_logits(runtime, module)
    assert hooks() == 0


def test_a_gate_is_removed_when_its_layer_arrives_and_returns_for_other_leases(
    runtime: Runtime, tmp_path: Path
) -> None:
    module = load(runtime, save(tmp_path / "model", "llama"), name="chat")
    blocks = module.model.layers
    gated = lambda: [bool(block._forward_pre_hooks) for block in blocks]  # noqa: E731
    with runtime.lease("chat", layers=3, streaming=True):
        for _ in range(2):
            with pytest.raises(StaleView, match="layer 3"):
                module(PROMPT)
            assert gated() == [False, False, True]
        with runtime.lease("chat", layers=2), pytest.raises(StaleView, match="layer 3"):
            module(PROMPT)  # two leases hold the first layers
    with runtime.lease("chat", layers=2), pytest.raises(StaleView, match="layer 2"):
        module(PROMPT)  # gates that went under the first lease are back
    assert gated() == [False, True, True]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_module_built_like_another_computes_the_same(
    runtime: Runtime, tmp_path: Path, family: str
) -> None:
    for seed in range(3):  # the third is unpickled
        path = save(tmp_path / f"model-{seed}", family, seed=seed)
        with torch.no_grad():
            module = load(runtime, path)
            assert module.name_or_path == module.config.name_or_path == str(path)
            assert torch.equal(leased_logits(runtime, module), plain_logits(path))


def test_modules_of_one_configuration_share_nothing(runtime: Runtime, tmp_path: Path) -> None:
    modules = [load(runtime, save(tmp_path / f"model-{seed}", "llama")) for seed in range(4)]
    wanted = [leased_logits(runtime, module) for module in modules]
    modules[2].config.num_hidden_layers = 1
    modules[2].model.rotary_emb.inv_freq.zero_()
    assert modules[3].config.num_hidden_layers == 3
    assert not torch.equal(leased_logits(runtime, modules[2]), wanted[2])
    assert torch.equal(leased_logits(runtime, modules[3]), wanted[3])
    later = load(runtime, tmp_path / "model-0", name="later")
    assert torch.equal(leased_logits(runtime, later), wanted[0])


def test_a_module_that_cannot_be_pickled_is_built_each_time(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    original = engine.skeleton

    def unpicklable(*arguments: Any, **options: Any) -> Any:
        module = original(*arguments, **options)
        module.a_closure = lambda: module
        built.append(module)
        return module

    monkeypatch.setattr(engine, "_blueprints", Blueprints())
    monkeypatch.setattr(engine, "skeleton", unpicklable)
    path = save(tmp_path / "model", "llama")
    for number in range(4):
        module = load(runtime, path, name=f"model-{number}")
        assert torch.equal(leased_logits(runtime, module), plain_logits(path))
    assert len(built) == 4
    original_configuration = engine.configuration

    def odd(*arguments: Any, **options: Any) -> Any:
        settings = original_configuration(*arguments, **options)
        settings.a_setting = lambda: None
        return settings

    for number in range(3):
        if number:
            monkeypatch.setattr(engine, "configuration", odd)
        load(runtime, path, name=f"odd-{number}")
    assert len(built) == 7


def test_old_configurations_are_forgotten() -> None:
    blueprints = Blueprints()
    configs = [AutoConfig.for_model("llama", vocab_size=size) for size in range(1, KEPT + 2)]
    made: list[int] = []

    def find(config: Any) -> None:
        def build() -> Any:
            made.append(config.vocab_size)
            return config

        blueprints.find(config, torch.float32, None, (), build)

    for config in configs:
        find(config)
    assert len(blueprints._kept) == KEPT
    find(configs[0])  # forgotten: this counts as its first use again
    find(configs[0])
    assert made == [*range(1, KEPT + 2), 1, 1]


def test_a_load_that_fails_stops_the_pass_at_its_layer(runtime: Runtime, tmp_path: Path) -> None:
    path = save(tmp_path / "model", "llama")
    module = load(runtime, path, name="chat")
    runtime.prewarm("chat", layers=2).wait()
    with open(path / "model.safetensors", "r+b") as file:
        file.truncate(path.joinpath("model.safetensors").stat().st_size - 64)
    with (
        pytest.raises(CorruptCheckpoint, match="changed since"),
        runtime.lease("chat", streaming=True),
    ):
        module(PROMPT)
    assert resident(runtime) == 2


def test_gated_parts_are_as_large_as_possible() -> None:
    """Gated parts are as large as possible, but never a container that is not called."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.Linear(2, 2, bias=False)
            self.experts = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(2))
            self.scale = nn.Parameter(torch.ones(2))

        def forward(self, x: Any) -> Any:
            return x

    block = Block()
    attention, experts = block.attention, block.experts
    by = {"attention": attention.weight, "scale": block.scale}

    def parts(*layers: tuple[Any, int]) -> dict[Any, list[int]]:
        own = {
            part: {
                layer
                for tensor, layer in layers
                if any(tensor is p for p in part._parameters.values())
            }
            for part in block.modules()
        }
        return gated_parts(block, own)

    everything = [(tensor, 0) for tensor in by.values()]
    both = [(expert.weight, 0) for expert in experts]
    assert parts(*everything, *both) == {block: [0]}
    both = [(expert.weight, 1) for expert in experts]
    assert parts(*everything, *both) == {
        block: [0],
        attention: [0],
        experts[0]: [1],
        experts[1]: [1],
    }
    apart = [(expert.weight, index + 1) for index, expert in enumerate(experts)]
    assert parts(*everything, *apart)[experts[1]] == [2]
