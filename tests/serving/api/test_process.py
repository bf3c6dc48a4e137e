"""`gossamer serve` as a process: what it prints, how it starts, and how it stops."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from gossamer.models import tiny, tiny_tokenizer
from gossamer.serving.api.app import create_app
from gossamer.serving.api.server import serve
from tests.serving.api.conftest import engine, until

ROOT = Path(__file__).parents[3]


@contextmanager
def process(folder: Path, port: int, *more: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    tiny("llama").save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    command = [sys.executable, "-m", "gossamer", "serve", "--base", str(folder / "base"), "--port", str(port), *more]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    one = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        yield one, f"http://127.0.0.1:{port}"
    finally:
        one.kill()
        one.communicate()


def free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def status(address: str, path: str) -> int:
    try:
        return httpx.get(address + path, timeout=2).status_code
    except httpx.HTTPError:
        return 0


def test_it_starts_serves_and_drains(tmp_path: Path, folder: Path) -> None:
    with process(tmp_path, free_port(), "--adapters", str(folder), "--drain", "20", "--dtype", "fp32") as (
        one,
        address,
    ):
        until(lambda: status(address, "/health") == 200 or one.poll() is not None, 60)
        until(lambda: status(address, "/ready") == 200 or one.poll() is not None, 60)
        seen: dict[str, Any] = {}
        begun = threading.Event()

        def long() -> None:
            body = {"model": "sql", "prompt": "abc", "max_tokens": 450, "ignore_eos": True, "stream": True}
            with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as answer:
                lines = []
                for line in answer.iter_lines():
                    lines.append(line)
                    begun.set()
                seen["lines"] = [line for line in lines if line]

        thread = threading.Thread(target=long)
        thread.start()
        assert begun.wait(30)
        one.send_signal(signal.SIGTERM)
        refused = []
        while thread.is_alive():
            body = {"model": "sql", "prompt": "abc", "max_tokens": 1}
            try:
                refused.append(httpx.post(f"{address}/v1/completions", json=body, timeout=5).status_code)
            except httpx.HTTPError:
                break
        thread.join(30)
        assert seen["lines"][-1] == "data: [DONE]", "who was there is served to the end"
        assert 503 in refused
        assert one.wait(20) == 0
        out, error = one.communicate()
        assert re.search(r"^base +base$", out, re.MULTILINE)
        assert re.search(r"^adapters +2 in ", out, re.MULTILINE)
        assert out.rstrip().endswith("stopped")
        assert "Traceback" not in error


def test_who_is_not_done_in_time_hears_it(tmp_path: Path, folder: Path) -> None:
    with process(tmp_path, free_port(), "--adapters", str(folder), "--drain", "0.5", "--dtype", "fp32") as (
        one,
        address,
    ):
        until(lambda: status(address, "/ready") == 200 or one.poll() is not None, 60)
        body = {"model": "sql", "prompt": ["abc"] * 8, "n": 16, "max_tokens": 500, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            one.send_signal(signal.SIGTERM)
            asked = time.monotonic()
            last = [line for line in lines if line][-1]
        assert '"stopped"' in last, "not as if it were the end"
        assert one.wait(20) == 0
        assert 0.4 < time.monotonic() - asked < 8
        assert one.communicate()[0].rstrip().endswith("stopped")


def test_a_base_that_is_not_there_ends_it(tmp_path: Path) -> None:
    with process(tmp_path, free_port(), "--adapters", str(tmp_path / "nothing")) as (one, _):
        assert one.wait(60) == 2
        assert "no such folder" in one.communicate()[1]


def test_without_keys_it_stays_at_home() -> None:
    from gossamer.cli import main

    assert main(["serve", "--base", "x", "--host", "0.0.0.0"]) == 2
    assert main(["serve", "--base", "x", "--name", "a:b"]) == 2
    assert main(["serve", "--base", "x", "--keys", "/nothing/there.json"]) == 2


def test_it_serves_where_event_loops_take_no_signal_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise NotImplementedError

    handlers: dict[int, Any] = {}
    monkeypatch.setattr(asyncio.SelectorEventLoop, "add_signal_handler", refuse)
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    app = create_app(engine, name="toy")

    def stop() -> None:
        until(lambda: getattr(app.state, "service", None) and app.state.service.worker.ready)
        handlers[signal.SIGTERM]()

    asking = threading.Thread(target=stop)
    asking.start()
    serve(app, port=0, drain=5)
    asking.join()
    assert handlers.keys() == {signal.SIGTERM, signal.SIGINT}
