"""Risk: an ordinary call on a bound module kills the process, or silently leaves the arena."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tiny_transformers import PROMPT, plain_logits, save  # noqa: E402
from torch import nn  # noqa: E402

from warmserve_rt import Runtime, StaleView  # noqa: E402
from warmserve_rt.engines.transformers import load  # noqa: E402


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    with Runtime(device="host", arena="96MiB", staging="16MiB") as runtime:
        yield runtime


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save(tmp_path / "model", "llama-tied")


def addresses(module: Any) -> dict[str, Any]:
    return {
        name: (each.data_ptr(), each.dtype, each.requires_grad)
        for name, each in module.named_parameters()
    }


def merge(module: Any) -> None:
    """Change weights as PEFT's merge_and_unload does."""
    weight = module.lm_head.weight
    weight.data += torch.ones_like(weight.data)


def safe_merge(module: Any) -> None:
    weight = module.lm_head.weight
    weight.data = weight.data.clone() + 1


CHANGES = {
    "half": lambda m: m.half(),
    "to a dtype": lambda m: m.to(torch.bfloat16),
    "to a device": lambda m: m.to("meta"),
    "to_empty": lambda m: m.to_empty(device="cpu"),
    "part.double": lambda m: m.model.layers[1].double(),
    "head.half": lambda m: m.lm_head.half(),
    "share_memory": lambda m: m.share_memory(),
    "requires_grad_": lambda m: m.requires_grad_(True),
    "requires_grad": lambda m: setattr(m.lm_head.weight, "requires_grad", True),
    "merge": merge,
    "safe merge": safe_merge,
    "in place": lambda m: m.lm_head.weight.mul_(2),
    "a row": lambda m: m.lm_head.weight.__setitem__(0, 1.0),
    "a row of data": lambda m: m.lm_head.weight.data[0].zero_(),
    "detached": lambda m: m.state_dict()["model.norm.weight"].zero_(),
    "nn.init": lambda m: nn.init.normal_(m.model.norm.weight),
    "load_state_dict": lambda m: m.load_state_dict({"model.norm.weight": torch.ones(64)}, False),
    "assign": lambda m: m.model.norm.load_state_dict({"weight": torch.ones(64)}, assign=True),
    "resize": lambda m: m.resize_token_embeddings(128),
}


@pytest.mark.parametrize("leased", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_refused_before_it_faults_or_leaves_the_arena(
    runtime: Runtime, path: Path, change: str, leased: bool
) -> None:
    module = load(runtime, path, name="m")
    before = addresses(module)
    with torch.no_grad():
        if leased:
            with runtime.lease("m"), pytest.raises(TypeError, match=r"weights of 'm'.*deepcopy"):
                CHANGES[change](module)
        elif change != "safe merge":  # a safe merge reads the weights first
            with pytest.raises(TypeError, match=r"weights of 'm'.*deepcopy"):
                CHANGES[change](module)
    assert addresses(module) == before
    with runtime.lease("m"), torch.no_grad():
        assert torch.equal(module(PROMPT).logits, plain_logits(path))


def test_a_call_that_changes_nothing_is_allowed_without_a_lease(
    runtime: Runtime, path: Path
) -> None:
    module: Any = load(runtime, path, name="m")
    before = addresses(module)
    module.to("cpu").float().cpu().to(torch.float32).requires_grad_(False).eval()
    module.tie_weights()
    assert module.resize_token_embeddings() is module.model.embed_tokens
    assert module.resize_token_embeddings(96) is module.model.embed_tokens
    module.model.rotary_emb.to(torch.float64)
    assert module.model.rotary_emb.inv_freq.dtype is torch.float64
    assert addresses(module) == before


def test_initialising_a_module_anew_leaves_its_weights(runtime: Runtime, path: Path) -> None:
    module: Any = load(runtime, path, name="m")
    module.init_weights()
    with runtime.lease("m"), torch.no_grad():
        assert torch.equal(module(PROMPT).logits, plain_logits(path))


def saved(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Any] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved,
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_an_ordinary_module(runtime: Runtime, path: Path, how: str) -> None:
    module: Any = load(runtime, path, name="m")
    for part in (module, module.lm_head, module.model.layers[0]):
        with pytest.raises(StaleView, match="'m' is not leased: copy it under"):
            COPIES[how](part)
    with runtime.lease("m", streaming=True):
        made = COPIES[how](module)
        head = COPIES[how](module.lm_head)
    runtime.close()
    assert type(made) is type(module)
    assert not hasattr(made, "warmserve_model")
    assert made.lm_head.weight is made.model.embed_tokens.weight
    assert {type(each) for each in made.parameters()} == {nn.Parameter}
    with torch.no_grad():
        assert torch.equal(made(PROMPT).logits, plain_logits(path))
        assert torch.equal(head.weight, made.lm_head.weight)
        made.half().requires_grad_(True)


def test_a_module_that_streams_is_copied_whole(tmp_path: Path, path: Path) -> None:
    with Runtime(arena="96MiB", staging="16MiB", pump=True, poison=True) as runtime:
        module = load(runtime, path, name="m")
        with runtime.lease("m", streaming=True):
            made: Any = copy.deepcopy(module)
    with torch.no_grad():
        assert torch.equal(made(PROMPT).logits, plain_logits(path))


def test_a_copy_can_be_quantized(runtime: Runtime, path: Path) -> None:
    module: Any = load(runtime, path, name="m")
    with pytest.raises(StaleView):
        torch.ao.quantization.quantize_dynamic(module, {nn.Linear})
    with runtime.lease("m"):
        made = torch.ao.quantization.quantize_dynamic(module, {nn.Linear})
    runtime.close()
    with torch.no_grad():
        torch.testing.assert_close(made(PROMPT).logits, plain_logits(path), atol=1.0, rtol=0.2)


def test_a_module_is_saved_under_a_lease(runtime: Runtime, path: Path, tmp_path: Path) -> None:
    module: Any = load(runtime, path, name="m")
    with pytest.raises(StaleView, match="save it under"):
        module.save_pretrained(tmp_path / "saved")
    with runtime.lease("m"):
        module.save_pretrained(tmp_path / "saved")
    assert torch.equal(plain_logits(tmp_path / "saved"), plain_logits(path))
    with pytest.raises(StaleView):
        torch.save(module.state_dict(), tmp_path / "state.pt")


def test_separate_experts_are_saved_under_the_checkpoint_s_names(
    runtime: Runtime, tmp_path: Path
) -> None:
    path = save(tmp_path / "mixture", "mixtral", save_original_format=True)
    module: Any = load(runtime, path, name="m", layers="experts")
    with runtime.lease("m"):
        module.save_pretrained(tmp_path / "saved")
        with pytest.raises(TypeError, match="save the module"):
            module.model.save_pretrained(tmp_path / "part")
    assert torch.equal(plain_logits(tmp_path / "saved"), plain_logits(path))


def test_writable_weights_change_in_place_under_a_lease(runtime: Runtime, path: Path) -> None:
    module: Any = load(runtime, path, name="m", writable=True)
    before = addresses(module)
    with torch.no_grad():
        for change in (merge, lambda m: m.model.norm.weight.mul_(2)):
            with pytest.raises(StaleView):
                change(module)
        with runtime.lease("m"):
            merge(module)
            assert not torch.equal(module(PROMPT).logits, plain_logits(path))
            module.load_state_dict({"model.norm.weight": torch.zeros(64)}, strict=False)
            assert not module(PROMPT).logits.any()
            with pytest.raises(TypeError, match="out of the arena"):
                module.half()
        runtime.evict("m")
        with runtime.lease("m"):
            assert torch.equal(module(PROMPT).logits, plain_logits(path))
    assert addresses(module) == before


def test_writable_weights_take_gradients(runtime: Runtime, path: Path) -> None:
    module: Any = load(runtime, path, name="m", writable=True).requires_grad_(True)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with runtime.lease("m"):
        first, second = (step(module, optimizer) for _ in range(2))
    assert second < first
    assert not any(each.requires_grad for each in load(runtime, path, name="n").parameters())


def step(module: Any, optimizer: Any) -> float:
    optimizer.zero_grad()
    loss = module(PROMPT, labels=PROMPT).loss
    loss.backward()
    optimizer.step()
    return float(loss)
