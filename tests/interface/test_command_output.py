"""Risk: a name from a file is taken for markup or moves the cursor, a narrow or ASCII terminal cuts
figures or causes a traceback, or a wrong argument is not reported."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

pytest.importorskip("typer")

MIB = 1 << 20


def write(path: Path, tensors: dict[str, tuple[str, int]]) -> Path:
    """Write a checkpoint of tensors whose dtypes take one byte, all zero; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header, at = {}, 0
    for name, (dtype, nbytes) in tensors.items():
        header[name] = {"dtype": dtype, "shape": [nbytes], "data_offsets": [at, at + nbytes]}
        at += nbytes
    raw = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + at)
    return path


def command(
    *arguments: str | Path, block: Iterable[str] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command in a separate process, without the modules in ``block``."""
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in block)
    clean = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "FORCE_COLOR")}
    return subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys\n{blocked}from warmserve_rt.cli import main\nmain()",
            *arguments,
        ],
        env=clean | environment,
        cwd="/",  # outside the source tree, which would shadow the package
        capture_output=True,
        text=True,
        errors="surrogateescape",
    )


def shown(*arguments: str | Path, **environment: str) -> str:
    done = command(*arguments, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("folder", ["[/models]", "[v2]", "[red]"])
def test_names_and_paths_are_not_read_as_markup(tmp_path: Path, folder: str) -> None:
    names = ["enc[/x].0", "[red].1", "[bold]m[/].2", ":smile:.3"]
    tensors = {f"{name}.w": ("U8", 1) for name in names}
    path = write(tmp_path / folder / "[i]m.safetensors", tensors)
    out = shown("inspect", path)
    for text in (*names, str(path)):
        assert text in out
    assert str(path) in shown("size", path)


def test_control_characters_in_a_name_are_shown_as_escapes(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", {"\x1b[31mred\nline\r.0.w": ("U8", 1)})
    out = shown("inspect", path)
    assert r"\x1b[31mred\nline\r.0" in out
    assert "\x1b" not in out


def test_characters_that_stdout_cannot_encode_are_shown_as_escapes(tmp_path: Path) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    path = write(tmp_path / "层" / "m.safetensors", {"层.0.w": ("U8", 1)})
    out = shown("inspect", path, **plain)
    assert out.isascii()
    assert r"\u5c42.0" in out
    missing = command("inspect", tmp_path / "层" / "none", **plain)
    assert missing.returncode == 1
    assert "Traceback" not in missing.stderr


def test_a_path_that_is_not_utf8_is_shown(tmp_path: Path) -> None:
    path = write(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")) / "m.safetensors", {})
    done = command("size", path)
    assert done.returncode in (0, 1)
    assert "Traceback" not in done.stderr
    assert r"\udcff" in done.stdout + done.stderr


@pytest.mark.parametrize("columns", ["200", "80", "40", "20", "5"])
def test_a_narrow_terminal_shows_whole_figures(tmp_path: Path, columns: str) -> None:
    nbytes = 1234 * MIB + 5
    path = write(tmp_path / "m.safetensors", {f"layers.{i}.w": ("U8", nbytes) for i in (0, 1)})
    out = shown("inspect", path, COLUMNS=columns)
    assert "…" not in out
    for figure in ("1234.0", "618", "2468.0", "1236", "granules", "dtypes", "tensors"):
        assert figure in out, figure
    total = 2 * 618 * 2 * MIB
    assert str(total) in shown("size", path, COLUMNS=columns)


def test_a_pipe_shows_each_row_on_one_line(tmp_path: Path) -> None:
    name = "a" * 150
    path = write(tmp_path / "m.safetensors", {f"{name}.0.w": ("I8", 3 * MIB)})
    (line,) = (line for line in shown("inspect", path).splitlines() if name in line)
    assert line.split() == [f"{name}.0", "1", "I8", "3.0", "2"]


def test_inspect_shows_dtypes_and_files(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", {"layers.0.w": ("U8", MIB), "layers.0.b": ("I8", 1)})
    write(tmp_path / "b.safetensors", {"layers.1.w": ("I8", 5 * MIB)})
    rows = [line.split() for line in shown("inspect", tmp_path).splitlines()]
    assert ["layers.0", "2", "U8,", "I8", "1.0", "1"] in rows
    assert ["layers.1", "1", "I8", "5.0", "3"] in rows
    assert ["a.safetensors", "1.0"] in rows
    assert ["b.safetensors", "5.0"] in rows


def test_size_shows_the_arena_that_models_need(tmp_path: Path) -> None:
    a = write(tmp_path / "a.safetensors", {f"layers.{i}.w": ("U8", MIB) for i in range(3)})
    b = write(tmp_path / "b.safetensors", {"layers.0.w": ("U8", 9 * MIB)})
    rows = [line.split() for line in shown("size", a, b, "--granule", "4MiB").splitlines()]
    found = {row[0]: row[1:] for row in rows if len(row) == 5}
    assert found[str(a)] == [str(3 * MIB), "3", str(12 * MIB), "0.012"]
    assert found[str(b)] == [str(9 * MIB), "3", str(12 * MIB), "0.012"]
    assert found["all"] == [str(12 * MIB), "6", str(24 * MIB), "0.023"]


def test_the_shown_size_is_the_arena_that_a_runtime_needs(tmp_path: Path) -> None:
    from warmserve_rt import Runtime

    path = write(tmp_path / "m", {f"layers.{i}.w": ("U8", i * MIB + 1) for i in range(5)})
    path = path.rename(tmp_path / "m.safetensors")
    rows = [line.split() for line in shown("size", path).splitlines()]
    (arena,) = (int(row[3]) for row in rows if row[:1] == [str(path)])
    with Runtime(arena=arena, tensors="numpy") as runtime:
        runtime.register("m", path)
        runtime.prewarm("m").wait(20)
        assert runtime.snapshot().granules_free == 0


@pytest.mark.parametrize(
    ("arguments", "accepted"),
    [
        (["size", ".", "--granule", "0"], "2MiB"),
        (["inspect", ".", "--granule", "3"], "multiple of 2MiB"),
        (["inspect", ".", "--granule", "big"], "256MiB"),
        (["size", ".", "--dtype", "int3"], "bfloat16"),
        (["demo", "--requests", "1"], "2"),
        (["live", "--seconds", "1000"], "540"),
        (["live", "--requests", "few"], "integer"),
        (["demo", "--engine", "none"], "'vllm'"),
        (["simulate", "--workload", "azure", "--out", "x", "--policies", "none"], "scheduler"),
    ],
)
def test_wrong_arguments_exit_with_2_and_say_what_is_accepted(
    arguments: list[str], accepted: str
) -> None:
    done = command(*arguments, COLUMNS="200")
    assert done.returncode == 2, done.stdout
    assert accepted in done.stderr
    assert "Traceback" not in done.stderr


def test_inspect_needs_only_typer_and_commands_name_missing_extras(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "m.safetensors", {"layers.0.w": ("U8", 1)})
    extras = ("numba", "torch", "transformers", "safetensors")
    assert command("inspect", path, block=extras).returncode == 0
    done = command("simulate", "--workload", "azure", "--out", "x", block=extras)
    assert (done.returncode, "warmserve_rt[sim]" in done.stderr) == (1, True)
    done = command("demo", block=extras)
    assert (done.returncode, "warmserve_rt[demo]" in done.stderr) == (1, True)
    done = command("inspect", path, block=("typer",))
    assert (done.returncode, "pip install typer" in done.stderr) == (1, True)


def test_the_version_is_shown() -> None:
    from importlib.metadata import version

    assert shown("--version") == f"warmserve-rt {version('warmserve_rt')}\n"
