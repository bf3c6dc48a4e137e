"""vLLM as a server beside ours: started as `gossamer serve --engine vllm` would, tuned as well as it can be here."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from gossamer.serving import vllm

TUNED = ("--max-model-len", "1024", "--max-num-seqs", "32", "--no-enable-prefix-caching")


@contextlib.contextmanager
def running(command: Sequence[str], ready: str, environment: Mapping[str, str] | None = None) -> Iterator[int]:
    """A server in a process of its own, until it answers at `ready`; ended at the end. Gives its process id."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
        )
        try:
            for _ in range(600):
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(ready, timeout=2).close()
                    break
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(log.read().decode(errors="replace")[-3000:])
                time.sleep(0.5)
            yield process.pid
        finally:
            process.terminate()
            process.wait(60)


@contextlib.contextmanager
def vllm_server(base: Path, adapters: Path, port: int, dtype: str) -> Iterator[str]:
    """Gives its address. Raises `RuntimeError` with the end of its log when it does not start."""
    verdicts = [vllm.check(one) for one in sorted(adapters.iterdir())]
    python = vllm.interpreter()
    assert python, f"name an environment that has vLLM in {vllm.ENVIRONMENT}"
    made = vllm.command(base, verdicts, port=port, python=python, cuda=False, options=[*TUNED, "--dtype", dtype])
    with running(made.arguments, f"http://127.0.0.1:{port}/health", made.environment):
        yield f"http://127.0.0.1:{port}"
