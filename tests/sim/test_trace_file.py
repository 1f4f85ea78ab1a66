"""A bad trace file that is accepted, or refused without a location, costs its user a day."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from warmserve_rt.sim.workload import catalogue
from warmserve_rt.sim.workload.workloads import TraceError, parse, read_trace

MODELS = catalogue.mixed(8)
HEADER = "t_s,model,input_tokens,output_tokens\n"


def written(folder: Path, text: str | bytes, name: str = "trace.csv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_trace_file_is_read_without_changes(tmp_path: Path):
    text = "output_tokens,t_s,note,model,input_tokens\r\n"
    text += f"3,0.5,a,{MODELS[2].name},100\r\n1,0.5,b,0,0\r\n7,12.0,c,7,90\r\n\r\n"
    for path in (
        written(tmp_path, text),
        written(tmp_path, gzip.compress(text.encode()), "trace.csv.gz"),
    ):
        workload = parse(str(path), MODELS, 5, 60, 0)
        assert workload.name == path.name
        assert workload.time.tolist() == [0.5, 0.5, 12.0]
        assert workload.model.tolist() == [2, 0, 7]
        assert workload.prompt.tolist() == [100, 0, 90]
        assert workload.output.tolist() == [3, 1, 7]
        assert workload.duration == 13.0
        assert workload.history.shape == (0, 8)
        assert workload.concurrency_history()[0].shape == (0, 8)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("0,0,abc,1", ":2: column input_tokens: 'abc' is not a whole number"),
        ("0,0,1,1\n0,0,1.5,1", ":3: column input_tokens: '1.5' is not a whole number"),
        ("0,0,,1", ":2: column input_tokens: '' is not a whole number"),
        ("0,0,-3,1", ":2: column input_tokens: '-3' is negative"),
        ("0,0,nan,1", ":2: column input_tokens: 'nan' is not a whole number"),
        ("0,0,1,0", ":2: column output_tokens: '0' is not between 1 and 2147483647"),
        ("0,0,1,2147483648", ":2: column output_tokens: '2147483648' is not between"),
        ("soon,0,1,1", ":2: column t_s: 'soon' is not a number"),
        ("nan,0,1,1", ":2: column t_s: 'nan' is not finite"),
        ("inf,0,1,1", ":2: column t_s: 'inf' is not finite"),
        ("-0.5,0,1,1", ":2: column t_s: '-0.5' is negative"),
        ("2,0,1,1\n3,0,1,1\n2.5,0,1,1", ":4: column t_s: '2.5' is before the line above"),
        ("0,gpt,1,1", ":2: column model: 'gpt' is no model: choose one of llama2-7b-0, "),
        ("0,8,1,1", ":2: column model: '8' is no model: choose one of "),
        ("0,-1,1,1", ":2: column model: '-1' is no model: choose one of "),
        ("0,0,1", ":2: 3 fields, but the header has 4"),
        ("0,0,1,1\n\n1,0,1,1", ":3: 0 fields, but the header has 4"),
        ("", ": no requests after the header"),
    ],
)
def test_an_invalid_file_is_refused_with_file_line_column_and_value(tmp_path, rows, message):
    path = written(tmp_path, HEADER + rows)
    with pytest.raises(TraceError) as refused:
        read_trace(path, MODELS)
    assert str(refused.value).startswith(f"{path}{message}")


def test_files_without_a_trace_are_refused(tmp_path: Path):
    with pytest.raises(
        TraceError, match=r"trace.csv: empty: a trace must start with the header t_s,"
    ):
        read_trace(written(tmp_path, ""), MODELS)
    with pytest.raises(
        TraceError, match=r"trace.csv:1: the header must have a column input_tokens"
    ):
        read_trace(written(tmp_path, "t_s,model,output_tokens\n0,0,1\n"), MODELS)
    with pytest.raises(TraceError, match=r"trace.csv: .*decode"):
        read_trace(written(tmp_path, b"\xff\xfe\x00\x80" * 9), MODELS)
    with pytest.raises(TraceError, match=r"trace.csv.gz: Not a gzipped file"):
        read_trace(written(tmp_path, HEADER, "trace.csv.gz"), MODELS)
    cut = gzip.compress((HEADER + "0,0,1,1\n" * 999).encode())[:-12]
    with pytest.raises(TraceError, match=r"trace.csv.gz: "):
        read_trace(written(tmp_path, cut, "trace.csv.gz"), MODELS)
    with pytest.raises(OSError, match="missing"):
        read_trace(tmp_path / "missing.csv", MODELS)
    with pytest.raises(ValueError, match="at least one model"):
        read_trace(written(tmp_path, HEADER + "0,0,1,1\n"), ())


@settings(max_examples=200, deadline=None)
@given(text=st.binary(max_size=200))
def test_any_file_is_read_or_refused_with_a_message(tmp_path_factory, text: bytes):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    for content in (text, HEADER.encode() + text):
        path.write_bytes(content)
        refusal = ""
        try:
            assert len(read_trace(path, MODELS).time)
        except TraceError as error:
            refusal = str(error)
        assert not refusal or refusal.startswith(str(path))
