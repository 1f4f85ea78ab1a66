"""Risk: the README's `vllm serve` does not start when vLLM is installed as the README says."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import RemoteDisconnected
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import psutil
import pytest
from vllm_models import PROMPTS, engine, plain_engine, shut_down, tokens, write_llama


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = Request(url, data, {"Content-Type": "application/json"})
    with urlopen(request, timeout=60) as answer:
        text = answer.read()
    return json.loads(text) if text else None


def command(model: Path) -> list[str]:
    """Return the command that README.md shows, for this model and this environment's executable."""
    readme = (Path(__file__).resolve().parents[3] / "README.md").read_text()
    (line,) = re.findall(r"^vllm serve path/to/model .*$", readme, re.MULTILINE)
    words = shlex.split(line.replace("path/to/model", str(model)))
    return [str(Path(sys.executable).with_name(words[0])), *words[1:]]


@contextmanager
def serve(model: Path, cache: Path, log: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Yield the address and the process of a running server; afterwards stop the server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--model-loader-extra-config", json.dumps({"cache": str(cache), "arena": "64MiB"})),
        *("--served-model-name", "chat", "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "128", "--max-num-seqs", "4", "--skip-tokenizer-init"),
        *("--kv-cache-memory-bytes", str(1 << 24)),
    ]
    environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1"}  # for /sleep and /wake_up
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]  # as in a shell
    with open(log, "w") as out:
        server = subprocess.Popen(
            [*command(model), *arguments],
            env=environment,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1500):
            assert server.poll() is None, log.read_text()[-4000:]
            try:
                ask(f"{url}/health")
                break
            except (URLError, ConnectionError):
                time.sleep(0.2)
        else:
            raise AssertionError(log.read_text()[-4000:])
        yield url, server
    finally:
        with suppress(ProcessLookupError):
            server.send_signal(signal.SIGINT)
        try:
            server.wait(30)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)


def answers(url: str) -> list[list[int]]:
    found = []
    for prompt in PROMPTS:
        body = {"model": "chat", "prompt": prompt, "max_tokens": 16, "temperature": 0}
        body |= {"ignore_eos": True, "detokenize": False, "return_token_ids": True}
        found.append(ask(f"{url}/v1/completions", body)["choices"][0]["token_ids"])
    return found


def answer_a_hundred_times(url: str) -> None:
    for _ in range(100):
        answers(url)


def hang_up(url: str, after: int) -> None:
    """Ask for a stream of tokens, and hang up after ``after`` of its lines."""
    body = {"model": "chat", "prompt": PROMPTS[0], "max_tokens": 100, "temperature": 0}
    body |= {"ignore_eos": True, "detokenize": False, "return_token_ids": True, "stream": True}
    request = Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urlopen(request, timeout=60) as stream:
        for _ in range(after):
            assert stream.readline()


def kill_engine(server: subprocess.Popen[bytes]) -> None:
    """Kill the processes that the server has started; one of them uses the weights."""
    children = psutil.Process(server.pid).children(recursive=True)
    assert children
    for each in children:
        with suppress(psutil.NoSuchProcess):
            each.kill()


def test_the_readme_s_server_answers_sleeps_and_survives_clients_but_not_its_engine(
    tmp_path: Path,
) -> None:
    """One server does all of this, because its start takes longer than everything else here."""
    model = write_llama(tmp_path / "model", 1, tied=True)
    plain = plain_engine(model)
    wanted = tokens(plain)
    shut_down(plain)
    with serve(model, tmp_path / "cache", tmp_path / "log") as (url, server):
        assert answers(url) == wanted
        for after in (1, 2, 5, 20):
            hang_up(url, after)
        assert answers(url) == wanted
        for _ in range(2):  # a second call must do no harm
            ask(f"{url}/sleep?level=1", {})
        for _ in range(2):
            ask(f"{url}/wake_up", {})
        assert answers(url) == wanted
        kill_engine(server)
        with pytest.raises((URLError, ConnectionError, RemoteDisconnected)):
            answer_a_hundred_times(url)
    assert "stays in the arena until its engine ends" not in (tmp_path / "log").read_text()

    again = engine(model, tmp_path / "cache")  # uses what the killed engine wrote and locked
    assert tokens(again) == wanted
    assert len([*(tmp_path / "cache").glob("*/weights-*")]) == 1
    shut_down(again)
