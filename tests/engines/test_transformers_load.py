"""Risk: load() leaves something behind when it fails, or ignores or misreads an option."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_transformers import PROMPT, plain_logits, save  # noqa: E402

from warmserve_rt import CorruptCheckpoint, Runtime  # noqa: E402
from warmserve_rt.engines import transformers as engine  # noqa: E402
from warmserve_rt.engines.transformers import load  # noqa: E402


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    with Runtime(device="host", arena="96MiB", staging="16MiB") as runtime:
        yield runtime


def rewrite(path: Path, change: Any) -> None:
    file = path / "model.safetensors"
    save_file({k: change(k, v) for k, v in load_file(file).items()}, file, {"format": "pt"})


# Late failures


@pytest.mark.parametrize(
    "content", ["{", "[]", b"\xff\xfe", "directory"], ids=["cut", "list", "bytes", "directory"]
)
def test_a_generation_config_is_read_as_transformers_reads_it(
    runtime: Runtime, tmp_path: Path, content: Any
) -> None:
    """If from_pretrained accepts the file, load does too; if it raises, nothing is registered."""
    path = save(tmp_path / "model", "llama")
    file = path / "generation_config.json"
    file.unlink()
    if content == "directory":
        file.mkdir()
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(path)
    except Exception as error:
        with pytest.raises(type(error)):
            load(runtime, path, name="m")
        assert runtime.models == ()
    else:
        ours = load(runtime, path, name="m")
        assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()


@pytest.mark.parametrize("step", ["guard", "bind_targets", "protect"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_a_load_that_fails_late_leaves_nothing_registered(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: Any
) -> None:
    path = save(tmp_path / "model", "llama")

    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(engine, step, fail)
        with pytest.raises(error):
            load(runtime, path, name="m")
    assert runtime.models == ()
    load(runtime, path, name="m")  # the name is free


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        (None, FileNotFoundError, "has no config.json: load"),
        ("{", CorruptCheckpoint, "config.json is not JSON"),
        ("[1]", CorruptCheckpoint, "must hold a JSON object, got a list"),
        ("{}", CorruptCheckpoint, "has no 'model_type'"),
        ('{"model_type": "martian"}', ValueError, "does not know model type 'martian'"),
        ('{"model_type": 7}', ValueError, "does not know model type 7"),
        ('{"auto_map": {"AutoConfig": "m.C"}}', ValueError, "only with trust_remote_code=True"),
    ],
)
def test_a_directory_without_a_usable_configuration_is_refused_in_a_sentence(
    runtime: Runtime, tmp_path: Path, config: str | None, error: Any, words: str
) -> None:
    path = save(tmp_path / "model", "llama")
    (path / "config.json").unlink()
    if config is not None:
        (path / "config.json").write_text(config)
    with pytest.raises(error, match=words) as caught:
        load(runtime, path)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(NotADirectoryError, match="is a file"):
        load(runtime, path / "model.safetensors")
    for nowhere in (str(tmp_path / "nowhere"), "nobody/nothing", "nowhere"):
        with pytest.raises(FileNotFoundError, match="is neither a directory nor the id") as caught:
            load(runtime, nowhere)
        assert len(str(caught.value).splitlines()) == 1
    assert runtime.models == ()


# Revisions and dtypes


def mixed(path: Path, seed: int = 0) -> Path:
    save(path, "llama", seed=seed, dtype=torch.bfloat16)
    rewrite(path, lambda k, v: v.float() if k == "model.norm.weight" else v)
    return path


@pytest.mark.parametrize("order", [("chat", "chat@2"), ("chat@2", "chat"), ("chat@1", "chat@2")])
@pytest.mark.parametrize("dtype", [None, "float32", torch.float16])
def test_revisions_are_compared_as_cast(
    runtime: Runtime, tmp_path: Path, order: tuple[str, str], dtype: Any
) -> None:
    wanted = []
    for seed, name in enumerate(order):
        path = mixed(tmp_path / str(seed), seed)
        module = load(runtime, path, name=name, dtype=dtype)
        with runtime.lease(module.warmserve_model), torch.no_grad():
            wanted.append(module(PROMPT).logits)
        assert torch.equal(wanted[-1], plain_logits(path, dtype=module.dtype))
    runtime.promote(order[1])
    load(runtime, mixed(tmp_path / "3", 3), name="chat@3", dtype=dtype)
    assert not torch.equal(*wanted)


def raw(dtype: Any, which: str) -> Any:
    return lambda k, v: v.to(dtype) if which in k else v.bfloat16()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
@pytest.mark.parametrize("which", ["proj", "layers.1.mlp", ""])
@pytest.mark.parametrize("asked", [None, "bfloat16"])
def test_weights_in_8_bits_are_refused_by_name(
    runtime: Runtime, tmp_path: Path, dtype: Any, which: str, asked: str | None
) -> None:
    path = save(tmp_path / "model", "llama")
    rewrite(path, raw(dtype, which))
    with pytest.raises(ValueError, match=rf"tensor '.*{which}.*' is {dtype} \(.*but Llama"):
        load(runtime, path, name="m", dtype=asked)
    assert runtime.models == ()


def test_packed_weights_are_refused_by_name(runtime: Runtime, tmp_path: Path) -> None:
    path = save(tmp_path / "model", "llama")

    def packed() -> Any:
        return torch.zeros(64, 48, dtype=torch.uint8)

    rewrite(path, lambda k, v: packed() if k.endswith("down_proj.weight") else v.bfloat16())
    with pytest.raises(ValueError, match=r"down_proj.weight' is torch.uint8 \(64, 48\)"):
        load(runtime, path, name="m")
    assert runtime.models == ()


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization": {"quant_algo": "FP8"}}, "modelopt FP8"),
        ({"quantization": {"quant_algo": "NVFP4"}}, "modelopt NVFP4"),
        ({"producer": {}}, "modelopt"),
    ],
)
def test_a_modelopt_checkpoint_is_refused_by_its_method(
    runtime: Runtime, tmp_path: Path, config: Any, method: str
) -> None:
    path = save(tmp_path / "model", "llama")
    (path / "hf_quant_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"is quantized \({method}\)"):
        load(runtime, path)
    assert runtime.models == ()


def test_a_checkpoint_in_float64_computes_in_float64(runtime: Runtime, tmp_path: Path) -> None:
    path = save(tmp_path / "model", "llama", dtype=torch.float64)
    module = load(runtime, path, name="m")
    assert module.dtype is torch.float64
    with runtime.lease("m"), torch.no_grad():
        assert torch.equal(module(PROMPT).logits, plain_logits(path))


# Options


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, "float32"),
        ({"dtype": None}, "float32"),
        ({"dtype": "auto"}, "float32"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "torch.float16"}, "float16"),
        ({"dtype": torch.bfloat16}, "bfloat16"),
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": torch.float16, "dtype": "float16"}, "float16"),
        ({"torch_dtype": "auto", "dtype": torch.float16}, "float16"),
    ],
)
def test_a_dtype_may_be_a_name_or_a_torch_dtype(
    runtime: Runtime, tmp_path: Path, options: Any, dtype: str
) -> None:
    module = load(runtime, save(tmp_path / "model", "llama"), **options)
    assert module.dtype is getattr(torch, dtype)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"dtype": "bf16"}, ValueError, "dtype must be None, 'auto', or float32"),
        ({"dtype": torch.int8}, ValueError, "got torch.int8"),
        ({"dtype": 16}, TypeError, "dtype must be .* got 16"),
        ({"torch_dtype": "half"}, ValueError, "torch_dtype must be"),
        ({"torch_dtype": "float16", "dtype": "float32"}, ValueError, "must agree"),
        ({"layer": "experts"}, TypeError, "an option 'layer'; did you mean 'layers'"),
        ({"nonsense": 1}, TypeError, "neither load.. nor LlamaConfig has an option 'nonsense'"),
        ({"device_map": "cpu"}, ValueError, "device_map must be None or 'auto', got 'cpu'"),
        ({"quantization_config": {}}, ValueError, "quantization_config must be None"),
        ({"token": "hf_x"}, ValueError, "token must be None or False.*downloads nothing"),
        ({"cache_dir": "/x"}, ValueError, "cache_dir must be None.*pass the directory"),
        ({"use_safetensors": False}, ValueError, "use_safetensors must be None or True"),
        ({"state_dict": {}}, ValueError, "state_dict must be None"),
    ],
)
def test_an_option_without_meaning_for_load_is_refused(
    runtime: Runtime, tmp_path: Path, options: Any, error: Any, words: str
) -> None:
    path = save(tmp_path / "model", "llama")
    with pytest.raises(error, match=words) as caught:
        load(runtime, path, **options)
    assert len(str(caught.value).splitlines()) == 1
    assert runtime.models == ()


@pytest.mark.parametrize(
    "options",
    [
        {"low_cpu_mem_usage": True, "use_safetensors": True, "local_files_only": True},
        {"device_map": "auto", "quantization_config": None, "token": None},
        {"trust_remote_code": True},
        {"trust_remote_code": False, "subfolder": ""},
    ],
)
def test_options_that_load_fulfils_anyway_are_accepted(
    runtime: Runtime, tmp_path: Path, options: Any
) -> None:
    load(runtime, save(tmp_path / "model", "llama"), name="m", **options)


def test_options_of_the_configuration_are_passed_on(runtime: Runtime, tmp_path: Path) -> None:
    path = save(tmp_path / "model" / "inner", "llama")
    module = load(
        runtime,
        tmp_path / "model",
        subfolder="inner",
        name="m",
        attn_implementation="eager",
        rms_norm_eps=0.5,
    )
    assert module.config._attn_implementation == "eager"
    assert module.config.rms_norm_eps == 0.5
    with runtime.lease("m"), torch.no_grad():
        assert not torch.equal(module(PROMPT).logits, plain_logits(path))


@pytest.mark.parametrize("tensors", ["numpy", "torch"])
def test_leases_may_give_tensors_of_other_frameworks(tmp_path: Path, tensors: Any) -> None:
    path = save(tmp_path / "model", "llama")
    with Runtime(arena="96MiB", tensors=tensors) as runtime:
        module = load(runtime, path, name="m")
        with runtime.lease("m", streaming=True), torch.no_grad():
            assert torch.equal(module(PROMPT).logits, plain_logits(path))
        with runtime.lease("m") as lease:
            norm = lease.tensors["model.norm.weight"]
            assert type(norm).__module__ == tensors
