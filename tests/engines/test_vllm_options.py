"""Risk: a mistake in vLLM's options is taken for a default, or fails far from its place."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from warmserve_rt.engines import vllm as engine
from warmserve_rt.engines.vllm.options import Options


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (
            {"arenas": "1GiB", 3: 4},
            "has no option 'arenas', 3; accepted: device, arena, broker, gated, cache, "
            "cache_limit$",
        ),
        (["arena"], r"the options must be a mapping by name, got \['arena'\]"),
        ("arena", "the options must be a mapping by name, got 'arena'"),
        ({"device": "gpu"}, "device must be 'host', 'cuda' or 'cuda:N', got 'gpu'"),
        ({"device": "cuda:x"}, "device must be .*, got 'cuda:x'"),
        ({"device": ""}, "device must be"),
        ({"device": 0}, "device must be 'host', 'cuda' or 'cuda:N', got 0"),
        ({"gated": "yes"}, "gated must be true or false, got 'yes'"),
        ({"gated": 1}, "gated must be true or false, got 1"),
        ({"arena": True}, "arena must be a number of bytes or a size such as '4GiB', got True"),
        ({"arena": 1.5}, "arena must be .* got 1.5"),
        ({"arena": 0}, "arena must be .* got 0"),
        ({"arena": -1}, "arena must be .* got -1"),
        ({"arena": "much"}, "arena must be .* got 'much'"),
        ({"arena": "101%"}, "arena must be .* got '101%'"),
        ({"arena": ["1GiB"]}, "arena must be"),
        ({"broker": 1}, "broker must be true or the path of a broker's socket, got 1"),
        ({"broker": ""}, "broker must be true or the path"),
        (
            {"broker": True, "arena": "1GiB"},
            "arena must be left out with broker, which owns the arena, got '1GiB'",
        ),
        (
            {"broker": "/x", "device": "cuda"},
            "device must be 'host' with broker, which shares host memory, got 'cuda'",
        ),
        ({"cache": 3}, "cache must be the path of a folder, got 3"),
        ({"cache": ""}, "cache must be the path of a folder, got ''"),
        ({"cache_limit": True}, "cache_limit must be a number of bytes, .* got True"),
        ({"cache_limit": "101%"}, "cache_limit must be .* got '101%'"),
        ({"cache_limit": "-1"}, "cache_limit must be .* got '-1'"),
    ],
)
def test_an_invalid_option_is_refused_in_one_sentence(given: object, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as refused:
        Options.parse(given)  # type: ignore[arg-type]
    assert "model_loader_extra_config" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_options_are_taken_as_given_and_none_is_the_default() -> None:
    assert (
        Options.parse(None) == Options.parse({}) == Options(None, None, False, False, None, "50%")
    )
    assert Options.parse({"arena": None, "gated": None, "cache_limit": None}) == Options()
    assert Options.parse({"arena": 5, "gated": True}) == Options(arena=5, gated=True)
    assert Options.parse({"arena": "50%"}).arena == "50%"
    assert Options.parse({"cache": Path("/x"), "cache_limit": "1GiB"}).cache_limit == "1GiB"


def test_a_broker_is_named_by_its_path_or_is_this_user_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    sockets = {
        True: Path("/run/user/7/warmserve-rt/broker.sock"),
        "sub/../s": tmp_path / "s",
        "~/s": Path("/home/someone/s"),
        Path("/x/s"): Path("/x/s"),
        False: None,
        None: None,
    }
    for given, socket in sockets.items():
        assert Options.parse({"broker": given, "arena": None, "device": "host"}).socket == socket


def test_the_cli_s_sleep_mode_is_explained_on_a_cpu(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        engine.warn_of_sleep_mode(["vllm", "serve"], on_cpu=True)
        engine.warn_of_sleep_mode(["vllm", "serve", "--enable-sleep-mode"], on_cpu=False)
        assert not caplog.records
        engine.warn_of_sleep_mode(["vllm", "serve", "--enable-sleep-mode"], on_cpu=True)
    assert "remove the option" in caplog.text
    assert "engines sleep and wake without it" in caplog.text
