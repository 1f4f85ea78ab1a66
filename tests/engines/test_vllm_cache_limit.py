"""Risk: the cache of processed weights fills the disk, loses entries in use, or fails obscurely."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("typer")

from test_vllm_cache import IMPORTED_FROM, KEY, MIB, state_of  # noqa: E402
from typer.testing import CliRunner, Result  # noqa: E402

from warmserve_rt._cache_dir import acquire, cache_dir, locked  # noqa: E402
from warmserve_rt.cli import app  # noqa: E402
from warmserve_rt.engines.vllm import cache as cache_module  # noqa: E402
from warmserve_rt.engines.vllm.cache import Cache, Entry, Key, discard  # noqa: E402
from warmserve_rt.engines.vllm.cache_folder import bytes_of_limit, root_of  # noqa: E402
from warmserve_rt.engines.vllm.entries import (  # noqa: E402
    open_for_use,
    prune,
    remove,
    stored,
)

PER_ENTRY = 2 * MIB + 3 * 4096  # the weights, and a bound on the rest


def key_of(name: str, model: str = "/models/a") -> Key:
    return Key(name, {"model": model, "dtype": "float32", "name": name}, {"vLLM": "0.32.0"})


def write(root: Path, names: str, limit: int | None = None) -> dict[str, Entry]:
    """Write entries of 2 MiB, each last used a minute after the one before it."""
    made = {}
    for age, name in enumerate(names):
        made[name] = Cache(root, limit).write(key_of(name), state_of(age))
        used = time.time() - 60 * (len(names) - age)
        os.utime(made[name].folder / "lock", (used, used))
    return made


def names(root: Path) -> str:
    return "".join(each.folder.name[0] for each in stored(root))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["cache", *map(str, arguments)])


def error_of(result: Result) -> str:
    return str(result.exception)


class TestLimit:
    def test_the_least_recently_used_entries_make_room_for_a_new_one(self, tmp_path: Path) -> None:
        made = write(tmp_path, "abc", 4 * PER_ENTRY)
        os.close(open_for_use(made["a"].weights))  # it is now the most recently used
        Cache(tmp_path, 3 * PER_ENTRY).write(key_of("d"), state_of(4))
        assert names(tmp_path) == "cad"
        assert not made["b"].folder.exists()

    def test_an_entry_in_use_stays(self, tmp_path: Path) -> None:
        made = write(tmp_path, "abc")
        descriptor = open_for_use(made["a"].weights)
        os.utime(made["a"].folder / "lock", (0, 0))
        Cache(tmp_path, 2 * PER_ENTRY).write(key_of("d"), state_of(4))
        assert names(tmp_path) == "ad"
        os.close(descriptor)

    def test_an_entry_that_is_being_written_stays(self, tmp_path: Path) -> None:
        made = write(tmp_path, "ab")
        with locked(made["a"].folder / "lock"):
            done = prune(tmp_path)
        assert [each.folder for each in done.busy] == [made["a"].folder]
        assert [each.folder for each in done.removed] == [made["b"].folder]

    def test_an_entry_larger_than_the_limit_is_written_and_reported(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        write(tmp_path, "ab")
        entry = Cache(tmp_path, MIB).write(key_of("c"), state_of(3))
        assert names(tmp_path) == "c"
        assert Cache(tmp_path, MIB).find(key_of("c")) == entry
        assert 'more than the cache\'s limit of 1048576 (option "cache_limit"' in caplog.text

    def test_a_write_that_finds_its_entry_removes_nothing(self, tmp_path: Path) -> None:
        write(tmp_path, "ab")
        assert Cache(tmp_path, 2 * PER_ENTRY).write(key_of("b"), state_of(1))
        assert names(tmp_path) == "ab"

    def test_a_removed_entry_is_made_again_by_a_writer_that_waited(self, tmp_path: Path) -> None:
        (entry,) = write(tmp_path, "a").values()
        holder = acquire(entry.folder / "lock")
        script = f"""
import sys
from pathlib import Path
sys.path[:0] = {IMPORTED_FROM!r}
from test_vllm_cache_limit import Cache, key_of, state_of
print("waits", flush=True)
print(Cache(Path({str(tmp_path)!r})).write(key_of("a"), state_of(7)).weights.name)
"""
        child = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=tmp_path
        )
        assert child.stdout
        assert child.stdout.readline() == "waits\n"
        time.sleep(0.3)  # the child has opened, or will open, the lock removed now
        for path in sorted(entry.folder.iterdir()):
            path.unlink()
        entry.folder.rmdir()
        os.close(holder)
        name = child.communicate(timeout=60)[0].strip()
        found = Cache(tmp_path).find(key_of("a"))
        assert found
        assert found.weights.name == name

    def test_only_entries_are_removed(self, tmp_path: Path) -> None:
        write(tmp_path, "a")
        for name, inside in {"mine": "notes.txt", "locked": "lock", "elsewhere": "x"}.items():
            (tmp_path / name).mkdir()
            (tmp_path / name / inside).write_text("")
        (tmp_path / "locked" / "thesis.tex").write_text("")
        (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "file").write_text("")
        prune(tmp_path)
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {"mine", "locked", "elsewhere", "link", "file"}
        assert (tmp_path / "locked" / "thesis.tex").exists()

    def test_a_limit_is_a_share_of_the_file_system_or_bytes(self, tmp_path: Path) -> None:
        import shutil

        total = shutil.disk_usage(tmp_path).total
        assert bytes_of_limit("50%", tmp_path / "not" / "there") == total // 2
        assert bytes_of_limit("100 %", tmp_path) == total
        assert bytes_of_limit("1GiB", tmp_path) == bytes_of_limit(1 << 30, tmp_path) == 1 << 30


class TestMessages:
    @pytest.mark.parametrize("path", ["file", "file/below", "x" * 300])
    def test_a_folder_that_cannot_be_made_is_named_with_the_option(
        self, tmp_path: Path, path: str
    ) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match="cannot write the cache of processed weights in") as told:
            Cache(tmp_path / path).write(KEY, state_of(1))
        assert str(tmp_path / path) in str(told.value)
        assert "which need 2097152 bytes" in str(told.value)
        assert 'name another folder with the option "cache" of model_loader_ext' in str(told.value)
        assert str(told.value).count("cannot write") == 1

    def test_a_lock_that_cannot_be_opened_is_named(self, tmp_path: Path) -> None:
        lock = Cache(tmp_path).folder(KEY) / "lock"
        lock.mkdir(parents=True)
        with pytest.raises(OSError, match=r"Is a directory \(.*/lock\); name another") as told:
            Cache(tmp_path).write(KEY, state_of(1))
        assert told.value.errno == errno.EISDIR

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
    @pytest.mark.parametrize("call", ["write_safetensors", "_sync", "locked"])
    def test_each_failing_step_names_cause_folder_and_option(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str
    ) -> None:
        def fail(*arguments: object) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(cache_module, call, fail)
        with pytest.raises(OSError, match=os.strerror(code)) as told:
            Cache(tmp_path).write(KEY, state_of(1))
        assert told.value.errno == code
        assert 'option "cache" of model_loader_extra_config' in str(told.value)
        full = code in (errno.ENOSPC, errno.EDQUOT)
        assert ("warmserve-rt cache prune" in str(told.value)) == full
        assert Cache(tmp_path).find(KEY) is None

    def test_errors_of_reading_and_discarding_name_the_option(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        entry = Cache(tmp_path).write(KEY, state_of(1))
        file = entry.folder / "manifest.json"
        file.unlink()
        file.mkdir()
        with pytest.raises(OSError, match=r'cannot read the cache .* the option "cache"'):
            Cache(tmp_path).find(KEY)
        file.rmdir()
        (entry.folder / "lock").unlink()
        (entry.folder / "lock").mkdir()
        with pytest.raises(OSError, match=r'cannot replace an entry .* the option "cache"'):
            discard(entry, "a reason")

    @pytest.mark.parametrize("home", ["", "relative", None])
    def test_a_user_without_a_home_is_told_what_to_set(
        self, monkeypatch: pytest.MonkeyPatch, home: str | None
    ) -> None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        if home is None:  # as in a container whose user is not in /etc/passwd
            monkeypatch.delenv("HOME")
            monkeypatch.setattr(os.path, "expanduser", lambda path: path)
        else:
            monkeypatch.setenv("HOME", home)
        with pytest.raises(OSError, match="set HOME or XDG_CACHE_HOME"):
            cache_dir()
        with pytest.raises(OSError, match='or name a folder with the option "cache" of model_'):
            root_of(None)
        assert root_of("/x") == Path("/x")
        failed = run("list")
        assert failed.exit_code == 1
        assert "set HOME or XDG_CACHE_HOME" in error_of(failed)

    def test_unusual_model_names_make_valid_folders(self, tmp_path: Path) -> None:
        for name in ("a/b", "..", "x" * 300, "\u20ac" * 300, "[red]", "\udcff", "a@b"):
            key = Key(name, {"model": name}, {})
            entry = Cache(tmp_path).write(key, state_of(1))
            assert entry.folder.parent == tmp_path
            assert Cache(tmp_path).find(key) == entry


class TestCommand:
    def test_list_shows_entries_and_which_are_in_use(self, tmp_path: Path) -> None:
        made = write(tmp_path, "ab")
        descriptor = open_for_use(made["b"].weights)
        shown = run("list", "--cache", tmp_path)
        os.close(descriptor)
        assert shown.exit_code == 0
        rows = [line for line in shown.output.splitlines() if "float32" in line]
        assert ["2.0 MiB" in row for row in rows] == [True, True]
        assert ["now" in row for row in rows] == [False, True]
        assert "2m ago" in rows[0]
        assert "4.0 MiB" in shown.output
        assert run("list", "--cache", tmp_path / "none").output.endswith("has no entries\n")

    def test_list_shows_names_as_plain_text(self, tmp_path: Path) -> None:
        hostile = "[red]m[/] \x1b[2J \u202e :smile: [link=x]"
        Cache(tmp_path).write(key_of("[red]", hostile), state_of(1))
        shown = run("list", "--cache", tmp_path)
        text = "".join(line.split("\u2502")[2].strip() for line in shown.output.splitlines()[4:-3])
        assert shown.exit_code == 0
        assert "[red]m[/]" in text
        assert "\x1b" not in shown.output
        assert "\u202e" not in shown.output
        assert ":smile:" in shown.output

    @pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
    def test_an_ascii_terminal_of_forty_columns_gets_a_table(
        self, tmp_path: Path, encoding: str
    ) -> None:
        Cache(tmp_path).write(key_of("m", "/models/\u00fc\u20ac"), state_of(1))
        done = subprocess.run(
            [sys.executable, "-m", "warmserve_rt.cli", "cache", "list", "--cache", tmp_path],
            capture_output=True,
            check=False,
            cwd="/",
            env={**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "40"},
        )
        assert done.returncode == 0, done.stderr
        assert "MiB" in done.stdout.decode(encoding)

    def test_prune_keeps_the_latest_entries_up_to_a_size(self, tmp_path: Path) -> None:
        write(tmp_path, "abc")
        done = run("prune", "--keep", "5MiB", "--cache", tmp_path)
        assert done.exit_code == 0
        assert done.output.startswith("removed 1 entry: 2.0 MiB")
        assert names(tmp_path) == "bc"
        assert run("prune", "--cache", tmp_path).output.startswith("removed 0 entries")
        assert run("prune", "--keep", 2 * PER_ENTRY, "--cache", tmp_path).exit_code == 0
        assert names(tmp_path) == "bc"

    def test_prune_removes_entries_unused_for_a_time(self, tmp_path: Path) -> None:
        write(tmp_path, "abc")
        assert run("prune", "--older-than", "150s", "--cache", tmp_path).exit_code == 0
        assert names(tmp_path) == "bc"
        assert run("prune", "--older-than", "1w", "--cache", tmp_path).exit_code == 0
        assert names(tmp_path) == "bc"

    def test_prune_all_keeps_and_reports_entries_in_use(self, tmp_path: Path) -> None:
        made = write(tmp_path, "ab")
        descriptor = open_for_use(made["a"].weights)
        done = run("prune", "--all", "--cache", tmp_path)
        assert done.exit_code == 0
        assert "kept, because they are in use, 1 entry: 2.0 MiB" in done.output
        assert names(tmp_path) == "a"
        os.close(descriptor)
        assert run("prune", "--all", "--cache", tmp_path).exit_code == 0
        assert not [*tmp_path.iterdir()]

    def test_prune_removes_files_of_a_killed_writer(self, tmp_path: Path) -> None:
        (entry,) = write(tmp_path, "a").values()
        (entry.folder / "manifest.json").unlink()
        assert "(incomplete)" in run("list", "--cache", tmp_path).output
        assert run("prune", "--all", "--cache", tmp_path).exit_code == 0
        assert not entry.folder.exists()

    @pytest.mark.parametrize(
        "arguments",
        [
            ["prune", "--all", "--keep", "1GiB"],
            ["prune", "--older-than", "1d", "--all"],
            ["prune", "--keep", "much"],
            ["prune", "--keep", "101%"],
            ["prune", "--keep", ""],
            ["prune", "--older-than", "30"],
            ["prune", "--older-than", "-1d"],
            ["prune", "all"],
            ["list", "--all"],
            ["remove"],
        ],
    )
    def test_wrong_arguments_remove_nothing(self, tmp_path: Path, arguments: list[str]) -> None:
        write(tmp_path, "a")
        assert run(*arguments, "--cache", tmp_path).exit_code == 2
        assert names(tmp_path) == "a"

    def test_a_failed_read_or_removal_is_reported(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(tmp_path, "ab")
        (tmp_path / "file").write_text("")
        failed = run("list", "--cache", tmp_path / "file")
        assert failed.exit_code == 1
        assert "cannot read the cache of processed weights" in error_of(failed)
        unlink = Path.unlink

        def refuse(path: Path, **options: bool) -> None:
            if path.parent.name.startswith("a"):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            unlink(path, **options)

        monkeypatch.setattr(Path, "unlink", refuse)
        failed = run("prune", "--all", "--cache", tmp_path)
        assert failed.exit_code == 1
        assert failed.output.startswith("removed 1 entry")
        assert "cannot remove an entry of" in error_of(failed)
        with suppress(OSError):
            remove(stored(tmp_path)[0])
        assert names(tmp_path) == "a"
