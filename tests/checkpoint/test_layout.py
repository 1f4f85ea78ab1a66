"""Risk: in the layers built from tensor names, a byte of the checkpoint is missing or misplaced."""

from __future__ import annotations

import json
import os
import random
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest
import safetensors
from checkpoints import write_safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from warmserve_rt.checkpoint import DTYPES, Checkpoint, open_checkpoint
from warmserve_rt.checkpoint.layout import (
    ALIGNMENT,
    Grouping,
    Layout,
    Segment,
    build_layout,
    group_by_name,
)

Tensors = Mapping[str, tuple[str, Sequence[int]]]  # name -> dtype, shape


def write(path: Path, tensors: Tensors, content: Callable[[int], bytes] = os.urandom) -> Path:
    """Write a file with these tensors, in this order, and return its path."""
    header, data = {}, b""
    for name, (dtype, shape) in tensors.items():
        bits = DTYPES[dtype].bits
        for length in shape:
            bits *= length
        offsets = [len(data), len(data) + bits // 8]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        data += content(bits // 8)
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


# By family: the embedding, the prefix of the blocks, the modules of a block, the head.
FAMILIES = {
    "llama": ("model.embed_tokens", "model.layers", "mlp.up_proj", "model.norm lm_head"),
    "meta's llama": ("tok_embeddings", "layers", "attention.wq ffn_norm", "norm output rope.freqs"),
    "qwen": ("model.embed_tokens", "model.layers", "self_attn.q_norm", "model.norm lm_head"),
    "gpt2": ("wte wpe", "h", "attn.c_attn ln_1", "ln_f"),
    "mixtral": (
        *("model.embed_tokens", "model.layers"),
        "block_sparse_moe.gate block_sparse_moe.experts.0.w1 block_sparse_moe.experts.13.w2",
        "model.norm lm_head",
    ),
    "falcon": (
        *("transformer.word_embeddings", "transformer.h", "mlp.dense_h_to_4h"),
        "transformer.ln_f lm_head",
    ),
    "opt": (
        "model.decoder.embed_tokens model.decoder.embed_positions model.decoder.project_in",
        *("model.decoder.layers", "self_attn.k_proj fc1"),
        "model.decoder.final_layer_norm model.decoder.project_out lm_head",
    ),
    "bloom": ("word_embeddings word_embeddings_layernorm", "h", "self_attention.dense", "ln_f"),
    "gpt-neox": (
        *("gpt_neox.embed_in", "gpt_neox.layers", "attention.rotary_emb attention.dense"),
        "gpt_neox.final_layer_norm embed_out",
    ),
    "phi": ("model.embed_tokens", "model.layers", "mlp.fc1", "model.final_layernorm lm_head"),
    "gemma": ("model.embed_tokens model.rotary_emb", "model.layers", "mlp.up_proj", "model.norm"),
    "bert": (
        "bert.embeddings.word_embeddings bert.embeddings.LayerNorm",
        *("bert.encoder.layer", "attention.self.query output.dense"),
        "bert.pooler.dense cls.predictions cls.predictions.decoder",
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("step", [1, -1], ids=["sorted", "reversed"])
def test_known_families_get_their_layers_in_order(family: str, step: int) -> None:
    """The order in the file does not matter. With twelve blocks, block 10 must follow block 9."""
    embedding, prefix, block, head = FAMILIES[family]
    expected = {
        "embedding": {f"{name}.weight" for name in embedding.split()},
        **{
            f"{prefix}.{n}": {f"{prefix}.{n}.{name}.weight" for name in block.split()}
            for n in range(12)
        },
        "head": {f"{name}.weight" for name in head.split()},
    }
    names = sorted(name for layer in expected.values() for name in layer)[::step]
    layers = group_by_name(dict.fromkeys(names, 4))
    assert [layer for layer, _ in layers] == list(expected)
    assert {layer: set(names) for layer, names in layers} == expected
    assert sum(len(names) for _, names in layers) == len(names)


def test_t5_runs_its_encoder_layers_first() -> None:
    """A model with two stacks: the encoder runs first, and its last norm is not the head."""
    names = ["shared.weight", "lm_head.weight"]
    for stack, parts in (("decoder", 3), ("encoder", 2)):
        names += [f"{stack}.embed_tokens.weight", f"{stack}.final_layer_norm.weight"]
        for n in range(2):
            names += [f"{stack}.block.{n}.layer.{part}.w" for part in range(parts)]
    layers = dict(group_by_name(dict.fromkeys(names, 4)))
    blocks = ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]
    assert list(layers) == ["embedding", *blocks, "head"]
    assert layers["embedding"] == [
        *("shared.weight", "decoder.embed_tokens.weight", "encoder.embed_tokens.weight")
    ]
    assert layers["encoder.block.1"][-1] == "encoder.final_layer_norm.weight"
    assert layers["head"] == ["lm_head.weight", "decoder.final_layer_norm.weight"]


def test_multimodal_gemma_takes_its_layers_from_the_largest_stack() -> None:
    """The stack with the most bytes is the main one, not the stack with the most tensors."""
    vision = "vision_tower.vision_model"
    sizes = {
        "language_model.lm_head.weight": 9,
        "language_model.model.embed_tokens.weight": 9,
        "language_model.model.layers.0.w": 100,
        "language_model.model.norm.weight": 1,
        "multi_modal_projector.mm_input_projection_weight": 1,
        f"{vision}.embeddings.patch_embedding.weight": 1,
        f"{vision}.post_layernorm.weight": 1,
        **{f"{vision}.encoder.layers.{n}.w": 1 for n in range(3)},
    }
    layers = dict(group_by_name(sizes))
    tower = [f"{vision}.encoder.layers.{n}" for n in range(3)]
    assert list(layers) == ["embedding", *tower, "language_model.model.layers.0", "head"]
    assert f"{vision}.post_layernorm.weight" in layers[f"{vision}.encoder.layers.2"]
    assert "multi_modal_projector.mm_input_projection_weight" in layers["embedding"]


def test_names_of_unknown_families_are_grouped_by_number_or_in_the_head() -> None:
    assert group_by_name({}) == []
    assert group_by_name(dict.fromkeys(["", "a.b", "h1.w"], 4)) == [("head", ["", "a.b", "h1.w"])]
    numbered = group_by_name(dict.fromkeys(["1.0.w", "0.1.w", "00"], 4))
    assert numbered == [("0", ["0.1.w", "00"]), ("1", ["1.0.w"])]
    assert group_by_name({"h." + "9" * 5000: 4, "h.x": 4}) == [("head", ["h." + "9" * 5000, "h.x"])]


Tensor = tuple[str, tuple[int, ...], bytes]  # dtype, shape, content


def reference(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file as safetensors itself reads them."""
    tensors = safetensors.deserialize(path.read_bytes())
    return {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in tensors}


def assembled(checkpoint: Checkpoint, layout: Layout) -> dict[str, Tensor]:
    """Copy a checkpoint into the layers of a layout, check each copy, and return the tensors."""
    found = {}
    assert layout.nbytes == sum(layer.nbytes for layer in layout.layers)
    for index, layer in enumerate(layout.layers):
        assert (layer.index, layer.tensors != ()) == (index, True)
        memory, end = bytearray(b"\xaa" * layer.nbytes), 0
        for copy in layer.segments:
            assert copy.layer_offset >= end
            assert copy.nbytes > 0
            end = copy.layer_offset + copy.nbytes
            memory[copy.layer_offset : end] = os.pread(
                checkpoint.files[copy.file].fd, copy.nbytes, copy.file_offset
            )
        assert end == len(memory) == layer.nbytes
        for a, b in pairwise(layer.segments):
            gap = (b.file, b.file_offset, b.layer_offset)
            assert gap != (a.file, a.file_offset + a.nbytes, a.layer_offset + a.nbytes)
        assert sum(c.nbytes for c in layer.segments) == sum(t.nbytes for t in layer.tensors)
        end = 0
        for t in layer.tensors:
            assert t.offset % ALIGNMENT == 0
            assert t.offset + t.nbytes <= layer.nbytes
            assert t.nbytes == 0 or t.offset >= end
            end = max(end, t.offset + t.nbytes)
            assert t.name not in found
            assert layout.tensors[t.name] == t
            assert t.layer == index
            found[t.name] = (t.dtype.name, t.shape, bytes(memory[t.offset : t.offset + t.nbytes]))
    assert found.keys() == layout.tensors.keys() == checkpoint.tensors.keys()
    return found


NAMES = st.text() | st.from_regex(r"(a|b\.c)(\.[0-9]{1,2})?\.(wte|w|emb)", fullmatch=True)
ENTRIES = st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 9), max_size=3)).map(
    lambda entry: (entry[0], [*entry[1], 4] if DTYPES[entry[0]].bits % 8 else entry[1])
)
FILES = st.dictionaries(NAMES.filter(lambda name: name != "__metadata__"), ENTRIES, max_size=20)


@settings(deadline=None)
@given(FILES, st.integers(0, 20), st.none() | st.integers(1, 5), st.integers(0))
def test_random_checkpoint_reassembles(
    tensors: Tensors, cut: int, layers: int | None, seed: int
) -> None:
    content = random.Random(seed).randbytes
    items = [*tensors.items()]
    grouping = (lambda name: zlib.crc32(name.encode()) % layers) if layers else None
    with tempfile.TemporaryDirectory() as folder:
        paths = [
            write(Path(folder, "0.safetensors"), dict(items[:cut]), content),
            write(Path(folder, "1.safetensors"), dict(items[cut:]), content),
        ]
        with closing(open_checkpoint(folder)) as checkpoint:
            found = assembled(checkpoint, build_layout(checkpoint, grouping))
        assert found == reference(paths[0]) | reference(paths[1])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[Checkpoint]:
    tensors = {
        "h.1.w": ("U8", [512]),
        "h.0.scalar": ("F64", []),
        "wte": ("BF16", [256]),
        "h.0.empty": ("F32", [3, 0]),
        "h.0.a": ("U8", [256]),
        "h.0.b": ("F4", [3, 2]),
        "h.0.c": ("C64", [2]),
        "ln": ("F32", [0]),
    }
    with closing(open_checkpoint(write(tmp_path / "m.safetensors", tensors))) as checkpoint:
        yield checkpoint


def assert_layers(layout: Layout, expected: dict[str, list[str]]) -> None:
    found = [(layer.name, [t.name for t in layer.tensors]) for layer in layout.layers]
    assert found == list(expected.items())


BLOCK = ["h.0.c", "h.0.scalar", "h.0.empty", "h.0.a", "h.0.b"]
IN_FILE_ORDER = ["h.0.scalar", "h.0.empty", "h.0.a", "h.0.b", "h.0.c"]


def test_a_layout_aligns_tensors_and_merges_adjacent_copies(checkpoint: Checkpoint) -> None:
    """Scalars and sub-byte tensors take whole bytes, empty tensors none; adjacent copies merge."""
    layout = build_layout(checkpoint)
    start = checkpoint.tensors["h.1.w"].offset
    assert_layers(
        layout, {"embedding": ["wte"], "h.0": IN_FILE_ORDER, "h.1": ["h.1.w"], "head": ["ln"]}
    )
    _, block, _, head = layout.layers
    assert [t.offset for t in block.tensors] == [0, 0, 256, 512, 768]
    assert [t.nbytes for t in block.tensors] == [8, 0, 256, 3, 16]
    assert block.nbytes == 784
    assert block.segments == (
        Segment(0, start + 512, 0, 8),
        Segment(0, start + 1032, 256, 259),
        Segment(0, start + 1291, 768, 16),
    )
    assert (head.nbytes, head.segments) == (0, ())
    assert assembled(checkpoint, layout) == reference(Path(checkpoint.files[0].path))


def test_copies_do_not_merge_across_files(tmp_path: Path) -> None:
    """The second file's tensor begins at the offset at which the first file's ends."""
    first = write(tmp_path / "1.safetensors", {"w": ("U8", [ALIGNMENT])})
    second = write(tmp_path / "2.safetensors", {"w" * (ALIGNMENT + 1): ("U8", [ALIGNMENT])})
    with closing(open_checkpoint([first, second])) as checkpoint:
        a, b = build_layout(checkpoint).layers[0].segments
    assert b == Segment(1, a.file_offset + a.nbytes, a.layer_offset + a.nbytes, ALIGNMENT)


def test_layers_may_be_given_as_a_mapping(checkpoint: Checkpoint) -> None:
    layout = build_layout(checkpoint, {"x": ("wte", "ln"), "none": [], "y": BLOCK, "z": ["h.1.w"]})
    assert_layers(layout, {"x": ["wte", "ln"], "y": IN_FILE_ORDER, "z": ["h.1.w"]})


def test_layers_may_be_given_as_sequences(checkpoint: Checkpoint) -> None:
    layout = build_layout(checkpoint, (BLOCK, ["wte", "h.1.w", "ln"]))
    assert_layers(layout, {"0": IN_FILE_ORDER, "1": ["h.1.w", "wte", "ln"]})


def test_layers_may_be_given_as_a_function(checkpoint: Checkpoint) -> None:
    layout = build_layout(checkpoint, lambda name: 2 if "h.0" in name else 10 - len(name) // 5)
    assert_layers(layout, {"2": IN_FILE_ORDER, "9": ["h.1.w"], "10": ["wte", "ln"]})
    layout = build_layout(checkpoint, lambda name: name[:3])
    assert [layer.name for layer in layout.layers] == ["h.1", "h.0", "wte", "ln"]


def test_experts_are_layers_after_the_rest_of_their_block(tmp_path: Path) -> None:
    """Experts are ordered by number, whatever their order in the file.

    Shared experts stay with their block.
    """
    names = [
        "lm_head.w",
        *(f"layers.{block}.mlp.experts.{n}.w" for block in (1, 0) for n in (10, 2)),
        "layers.0.mlp.shared_experts.0.w",
        "layers.0.mlp.gate",
        "layers.1.norm",
        "embed.w",
    ]
    path = write_safetensors(tmp_path / "f", {name: ("U8", [4], bytes(4)) for name in names})
    with closing(open_checkpoint(path)) as checkpoint:
        layout = build_layout(checkpoint, "experts")
    assert {layer.name: [t.name for t in layer.tensors] for layer in layout.layers} == {
        "embedding": ["embed.w"],
        "layers.0": ["layers.0.mlp.shared_experts.0.w", "layers.0.mlp.gate"],
        "layers.0.experts.2": ["layers.0.mlp.experts.2.w"],
        "layers.0.experts.10": ["layers.0.mlp.experts.10.w"],
        "layers.1": ["layers.1.norm"],
        "layers.1.experts.2": ["layers.1.mlp.experts.2.w"],
        "layers.1.experts.10": ["layers.1.mlp.experts.10.w"],
        "head": ["lm_head.w"],
    }
    assert [layer.name for layer in layout.layers][2] == "layers.0.experts.2"


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([BLOCK, ["wte", "ln"]], "'h.1.w' is in no layer"),
        ({"a": BLOCK, "b": ["wte", "ln", "h.1.w", "h.0.a"]}, "'h.0.a' is in layer 'a' and .* 'b'"),
        ([[*BLOCK, "wte", "wte"]], "'wte' is in layer '0' and again in '0'"),
        ([[*BLOCK, "h.2.w"]], "'h.2.w' of layer '0' is not in the checkpoint"),
        ("experts", "no tensor belongs to one expert alone"),
    ],
    ids=["forgotten", "repeated", "repeated in a layer", "invented", "no experts"],
)
def test_layers_that_do_not_fit_the_checkpoint_are_refused(
    checkpoint: Checkpoint, layers: Grouping, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_layout(checkpoint, layers)


@pytest.mark.parametrize("layers", ["wte", ["wte"], {"a": "wte"}, 3, lambda name: None])
def test_layers_of_a_wrong_type_are_refused(checkpoint: Checkpoint, layers: Grouping) -> None:
    with pytest.raises(TypeError, match="must be"):
        build_layout(checkpoint, layers)
