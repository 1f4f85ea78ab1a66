"""Risk: a bad checkpoint is accepted, leaks a descriptor, or its error does not name the file or
the cause.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors

from warmserve_rt import checkpoint
from warmserve_rt._errors import CorruptCheckpoint, WarmServeError
from warmserve_rt.checkpoint import FileIdentity, open_checkpoint

INDEX = "model.safetensors.index.json"


def tensor(begin: int = 0, end: int = 4, **fields: object) -> dict[str, object]:
    """Return a header's entry, of bytes unless the fields say otherwise."""
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end], **fields}


def write(path: Path, header: object, nbytes: int = 4) -> Path:
    """Write a file with a header (an object, or its bytes) and `nbytes` bytes of data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(nbytes))
    return path


def refused(source: Any, *words: str, error: type[Exception] = CorruptCheckpoint) -> None:
    with pytest.raises(error) as caught:
        open_checkpoint(source)
    for word in words:
        assert word in str(caught.value)


def opened(source: Any, **options: bool) -> list[str]:
    found = open_checkpoint(source, **options)
    found.close()
    return list(found.tensors)


@pytest.fixture(autouse=True)
def _nothing_is_lost(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Check after each test that a good checkpoint opens and that no descriptor leaked."""
    good = write(tmp_path_factory.mktemp("good") / "model.safetensors", {"t": tensor()})
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert opened(good) == ["t"]
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    return tmp_path / "bad.safetensors"


# One line per refusal: the defect, the header, words of the message, bytes of data (default 4).
T = json.dumps(tensor())
BAD_HEADERS: dict[str, tuple[Any, list[str]] | tuple[Any, list[str], int]] = {
    "truncated in the data": ({"t": tensor()}, ["truncated"], 3),
    "out of range": ({"t": tensor(0, 2**40)}, ["truncated"]),
    "out of range after a hole": ({"t": tensor(2**40, 2**40 + 4)}, ["'t'", "hole"]),
    "overlap": ({"u": tensor(3, 7), "t": tensor()}, ["'u'", "overlaps"], 7),
    "overlap of all": ({"u": tensor(), "t": tensor()}, ["overlaps"]),
    "overlap of an empty tensor": ({"t": tensor(), "e": tensor(2, 2)}, ["'e'", "overlaps"]),
    "hole at the start": ({"t": tensor(1, 5)}, ["'t'", "hole"], 5),
    "hole between": ({"t": tensor(), "u": tensor(5, 9)}, ["'u'", "hole"], 9),
    "hole at the end": ({"t": tensor()}, ["belong to no tensor"], 5),
    "hole without tensors": ({}, ["belong to no tensor"], 1),
    "no header": (b"", ["not a JSON object"]),
    "an array": (b"[]", ["not a JSON object"]),
    "a string": (b'"t"', ["not a JSON object"]),
    "a space before it": (b' {"t": %s}' % T.encode(), ["does not begin with '{'"]),
    "half of JSON": (b'{"t":', ["not JSON"]),
    "bytes after JSON": (b"{}\0", ["not JSON"]),
    "nested too deeply": (b'{"t":' + b"[" * 200_000, ["not JSON"]),
    "digits without end": (b'{"t":' + b"9" * 9999 + b"}", ["digits"]),
    "not UTF-8": (b'{"\xff": 1}', ["not UTF-8"]),
    "half a surrogate pair": (b'{"\\ud800": %s}' % T.encode(), ["not UTF-8"]),
    "UTF-16": ("{}".encode("utf-16-le"), ["not JSON"]),
    "duplicate tensor": (f'{{"t": {T}, "u": {T}, "t": {T}}}'.encode(), ["duplicate", "'t'"]),
    "duplicate field": (b'{"t": {"dtype": "U8", "dtype": "U8"}}', ["duplicate", "'dtype'"]),
    "half a pair in metadata": (b'{"__metadata__": {"k": "\\ud800"}}', ["not UTF-8", "surrogates"]),
    "half a pair in a field": (b'{"t": {"x": "\\udc00"}}', ["not UTF-8", "surrogates"]),
    "minus zero": (b'{"t": {"shape": [-0, 4], "dtype": "U8", "data_offsets": [0, 0]}}', ["-0"]),
    "exponent": (b'{"t": {"shape": [1e0], "dtype": "U8", "data_offsets": [0, 1]}}', ["1e0"]),
    "NaN in a field": (b'{"t": {"x": NaN}}', ["not JSON"]),
    "number out of range": (b'{"t": {"x": 1e999}}', ["out of range"]),
    "byte order mark": (b'\xef\xbb\xbf{"t": %s}' % T.encode(), ["does not begin with '{'"]),
    "control character": (b'{"t\n": %s}' % T.encode(), ["control character"]),
    "metadata twice": (b'{"__metadata__": null, "__metadata__": {}}', ["duplicate"]),
    "metadata's name twice": (b'{"__metadata__": {"k": "", "k": ""}}', ["duplicate", "'k'"]),
    "128 levels": (b'{"t": {"x": %s%s}}' % (b"[" * 126, b"]" * 126), ["nested deeper"]),
    "name too long": (b'{"%s": {}}' % (b"n" * 4194305), ["4194305", "at most 4194304"]),
    "an array for a tensor": (b'{"t": ["U8", [4], [0, 4]]}', ["'t'", "needs dtype, shape"]),
    "number in metadata": ({"__metadata__": {"k": 1}}, ["__metadata__", "strings"]),
    "tensor not an object": ({"t": []}, ["'t'", "needs dtype, shape"]),
    "field missing": ({"t": {"dtype": "U8", "shape": [4]}}, ["'t'", "needs dtype, shape"]),
    "unknown dtype": ({"t": tensor(dtype="F128")}, ["'t'", "unknown dtype", "'F128'"]),
    "dtype in lower case": ({"t": tensor(dtype="u8")}, ["unknown dtype"]),
    "dtype not a string": ({"t": tensor(dtype=["U8"])}, ["unknown dtype"]),
    "shape not a list": ({"t": tensor(shape=4)}, ["shape of 't'"]),
    "negative dimension": ({"t": tensor(shape=[-2, -2])}, ["shape of 't'", "[-2, -2]"]),
    "boolean dimension": ({"t": tensor(shape=[True, 4])}, ["shape of 't'", "integers"]),
    "fractional dimension": ({"t": tensor(shape=[4.0])}, ["shape of 't'", "integers"]),
    "dimension overflows": ({"t": tensor(shape=[2**63])}, ["shape of 't'", "2**63"]),
    "shape overflows": ({"t": tensor(shape=[2**32] * 2)}, ["shape of 't'", "overflows"]),
    "bytes overflow": ({"t": tensor(shape=[2**60], dtype="F32")}, ["shape of 't'", "overflows"]),
    "empty but overflows": ({"t": tensor(shape=[0, 2**32, 2**32])}, ["shape of 't'", "overflows"]),
    "too many dimensions": ({"t": tensor(shape=[1] * 65)}, ["shape of 't'", "overflows"]),
    "offsets not a list": ({"t": tensor(data_offsets=4)}, ["data_offsets of 't'"]),
    "negative offset": ({"t": tensor(data_offsets=[-4, 0])}, ["data_offsets of 't'"]),
    "fractional offset": ({"t": tensor(data_offsets=[0, 4.0])}, ["data_offsets of 't'"]),
    "one offset": ({"t": tensor(data_offsets=[4])}, ["data_offsets of 't'"]),
    "three offsets": ({"t": tensor(data_offsets=[0, 4, 8])}, ["data_offsets of 't'"]),
    "offsets backwards": ({"t": tensor(data_offsets=[4, 0])}, ["data_offsets of 't'"]),
    "offsets not the shape's": ({"t": tensor(data_offsets=[0, 5])}, ["data_offsets of 't'"], 5),
    "half a byte of F4": ({"t": tensor(0, 1, dtype="F4", shape=[3])}, ["12 bits"], 1),
    "half a byte of F6": ({"t": tensor(0, 2, dtype="F6_E2M3", shape=[2])}, ["12 bits"], 2),
}


@pytest.mark.parametrize("case", BAD_HEADERS.values(), ids=BAD_HEADERS.keys())
def test_an_invalid_header_is_refused(bad: Path, case: tuple[Any, ...]) -> None:
    header, words, *nbytes = case
    refused(write(bad, header, *nbytes), str(bad), *words)


@pytest.mark.parametrize("size", [0, 7])
def test_truncated_in_the_length_of_the_header(bad: Path, size: int) -> None:
    bad.write_bytes(bytes(size))
    refused(bad, str(bad), "truncated")


@pytest.mark.parametrize("missing", [1, 30])
def test_header_longer_than_the_file(bad: Path, missing: int) -> None:
    os.truncate(bad, write(bad, {"t": tensor()}, 0).stat().st_size - missing)
    refused(bad, str(bad), "truncated", "header")


@pytest.mark.parametrize("length", [100_000_001, 2**64 - 1])
def test_header_over_the_limit_is_not_read(bad: Path, length: int) -> None:
    bad.write_bytes(struct.pack("<Q", length))
    os.truncate(bad, 200_000_000)
    tracemalloc.start()
    refused(bad, str(bad), str(length), "over the limit")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_messages_are_short_for_any_file(bad: Path) -> None:
    with pytest.raises(CorruptCheckpoint) as caught:
        open_checkpoint(write(bad, {"t" * 1_000_000: None}))
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("change", ["touched", "shortened", "appended to"])
def test_file_changed_while_its_header_is_read(
    bad: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    size = write(bad, {"t": tensor()}).stat().st_size
    read = checkpoint.read_header

    def change_and_read(*arguments: Any) -> object:
        os.utime(bad, ns=(1, 1))
        os.truncate(bad, {"touched": size, "shortened": size - 1, "appended to": size + 1}[change])
        return read(*arguments)

    monkeypatch.setattr(checkpoint, "read_header", change_and_read)
    refused(bad, str(bad), "changed while")


def test_missing_path(tmp_path: Path) -> None:
    refused(tmp_path / "none.safetensors", "none.safetensors", error=FileNotFoundError)


def test_empty_list_of_files() -> None:
    refused([], "at least one file", error=ValueError)


def test_directory_without_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "._model.safetensors", {"t": tensor()})
    refused(tmp_path, str(tmp_path), "no *.safetensors", error=FileNotFoundError)


def test_directory_in_place_of_a_file(bad: Path) -> None:
    bad.mkdir()
    refused(bad.parent, str(bad), "not a regular file")
    refused([bad], str(bad), "not a regular file")


@pytest.mark.parametrize("name", ["bad.safetensors", INDEX])
def test_fifo_in_place_of_a_file_does_not_block(bad: Path, name: str) -> None:
    os.mkfifo(bad.with_name(name))
    refused(bad.parent, name, "not a regular file")


def test_socket_in_place_of_a_file(bad: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bad.parent)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(bad.name)
    refused(bad, str(bad), "a socket")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a directory with two files; a third file lies beside the directory."""
    (tmp_path / "model").mkdir()
    write(tmp_path / "outside.safetensors", {"t": tensor()})
    write(tmp_path / "model" / "1.safetensors", {"t": tensor()})
    write(tmp_path / "model" / "2.safetensors", {"u": tensor(), "v": tensor(4, 8)}, 8)
    return tmp_path / "model"


def write_index(model: Path, weight_map: object) -> None:
    text = weight_map if isinstance(weight_map, str) else json.dumps(weight_map)
    (model / INDEX).write_text(f'{{"metadata": {{"total_size": 1}}, "weight_map": {text}}}')


def test_tensor_in_two_files(model: Path) -> None:
    refused([model / "1.safetensors"] * 2, "1.safetensors: 't' is also in", "1.safetensors")
    write(model / "2.safetensors", {"t": tensor()})
    refused(model, "2.safetensors: 't' is also in", "1.safetensors")


GOOD = {"t": "1.safetensors", "u": "2.safetensors", "v": "2.safetensors"}
BAD_INDEXES: dict[str, tuple[object, list[str]]] = {
    "half of JSON": ('{"t": ', [INDEX, "not JSON"]),
    "tensor twice": ('{"t": "1.safetensors", "t": "1.safetensors"}', [INDEX, "duplicate", "'t'"]),
    "no weight map": ("null", [INDEX, "weight_map", "object"]),
    "empty weight map": ({}, [INDEX, "weight_map", "empty"]),
    "shard not a name": ({**GOOD, "t": 1}, [INDEX, "weight_map", "strings"]),
    "missing shard": ({**GOOD, "t": "3.safetensors"}, [INDEX, "'3.safetensors'", "No such file"]),
    "shard below a file": ({**GOOD, "t": "1.safetensors/x"}, [INDEX, "Not a directory"]),
    "shard's name too long": ({**GOOD, "t": "x" * 300}, [INDEX, "too long"]),
    "shard's name with NUL": ({**GOOD, "t": "1\0"}, [INDEX, "null"]),
    "shard's name not UTF-8": ({**GOOD, "t": "\ud800"}, [INDEX, "surrogates"]),
    "shard is the directory": ({**GOOD, "t": "."}, ["not a regular file"]),
    "tensor that is missing from its shard": (
        {**GOOD, "w": "1.safetensors"},
        ["1.safetensors", "'w'"],
    ),
    "tensor omitted": ({k: GOOD[k] for k in "tu"}, ["2.safetensors", "index", "'v'"]),
    "tensor in another shard": ({**GOOD, "v": "1.safetensors"}, ["2.safetensors", "index", "'v'"]),
    "path up": ({**GOOD, "t": "../outside.safetensors"}, [INDEX, "'../outside", "outside the"]),
    "path up and down": ({**GOOD, "t": "../model/1.safetensors"}, [INDEX, "outside the"]),
    "absolute path": ({**GOOD, "t": "/etc/passwd"}, [INDEX, "/etc/passwd", "outside the"]),
}


@pytest.mark.parametrize("case", BAD_INDEXES.values(), ids=BAD_INDEXES.keys())
def test_an_invalid_index_is_refused(model: Path, case: tuple[object, list[str]]) -> None:
    write_index(model, case[0])
    refused(model, str(model), *case[1])
    write_index(model, GOOD)
    assert opened(model) == ["t", "u", "v"]


def test_index_is_an_array(model: Path) -> None:
    (model / INDEX).write_text(json.dumps([GOOD]))
    refused(model, INDEX, "not a JSON object")


def test_two_indexes(model: Path) -> None:
    for name in ("a.safetensors.index.json", "b.safetensors.index.json"):
        (model / name).write_text("{}")
    refused(model, str(model), "a.safetensors.index.json, b.safetensors.index.json")
    write_index(model, GOOD)
    assert opened(model) == ["t", "u", "v"]


@pytest.mark.parametrize("name", ["1.safetensors", INDEX])
@pytest.mark.parametrize("with_index", [False, True])
def test_symlink_out_of_the_directory(model: Path, name: str, with_index: bool) -> None:
    write_index(model, GOOD)
    (model / name).rename(model.parent / "blob")
    (model / name).symlink_to("../blob")
    if not with_index and name != INDEX:
        (model / INDEX).unlink()
    refused(model, str(model), repr(name), "symbolic link")
    assert opened(model, allow_symlinks=True) == ["t", "u", "v"]
    assert name == INDEX or opened(model / name) == ["t"]


def test_symlink_loop(bad: Path) -> None:
    bad.symlink_to(bad.name)
    refused(bad.parent, repr(bad.name), "symbolic links")


def test_every_valid_form_is_accepted(model: Path) -> None:
    first, second = model / "1.safetensors", model / "2.safetensors"
    header = {"__metadata__": {"k": "v"}, "t": tensor(), "empty": tensor(0, 0)}
    write(first, json.dumps(header).encode() + b"   ")
    assert opened(first) == opened(str(first)) == ["empty", "t"]
    assert opened([second, first]) == ["u", "v", "empty", "t"]
    assert opened(model) == ["empty", "t", "u", "v"]
    write_index(model, {"u": second.name, "v": second.name})
    (model / INDEX).rename(model / "x.safetensors.index.json")
    assert opened(model) == ["u", "v"]
    found = open_checkpoint(first)
    with found.files[0] as file:
        assert (file.metadata, os.get_blocking(file.fd)) == ({"k": "v"}, True)
        assert file.identity == FileIdentity.of(file.fd)
    found.close()
    with pytest.raises(WarmServeError, match="closed"):
        _ = file.fd


@pytest.mark.parametrize(
    "header",
    [
        b'{"__metadata__": null, "t": %s}' % T.encode(),
        json.dumps({"t": tensor(strides=[1], note={"a": [None, 1.5e3, "x"]})}).encode(),
        b'{"t": {"x": 1, "x": 2, %s}' % T.encode()[1:],
        b'{"t": {"x": %s%s, %s}' % (b"[" * 125, b"]" * 125, T.encode()[1:]),
        b'{"\\ud83d\\ude00": %s}\n\r\t ' % T.encode(),
    ],
    ids=["null metadata", "unknown fields", "one of them twice", "127 levels", "a whole pair"],
)
def test_header_that_the_format_s_library_reads_is_accepted(bad: Path, header: bytes) -> None:
    write(bad, header)
    names = [name for name, _ in safetensors.deserialize(bad.read_bytes())]
    assert opened(bad) == names


def test_index_over_the_limit_is_refused_and_not_cut(model: Path) -> None:
    write_index(model, GOOD)
    with (model / INDEX).open("ab") as file:
        file.write(b" " * (100_000_001 - file.tell()))
    refused(model, INDEX, "over the limit")
