"""llama.cpp's own server beside ours: one base in GGUF, all adapters read at its start, each request with its own.

It decodes the requests of one adapter as a batch; those of different adapters never share one ("requests with different
LoRA configurations will not be batched together", tools/server/README.md, `lora`), so that they take turns.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.peers.vllm_server import running

ENVIRONMENT = "GOSSAMER_LLAMA_CPP"
"""Names a Python interpreter that has xllamacpp, which is llama.cpp with its server."""
CONTEXT = 256
"""Tokens that a prompt and its answer may have together, in each slot."""
SERVER = """
import os, sys, time
import xllamacpp as llama
base, port, rows, context, kept, *adapters = sys.argv[1:]
params, cores = llama.CommonParams(), os.cpu_count()
params.model.path, params.port, params.n_parallel = base, int(port), int(rows)
params.n_ctx, params.cache_prompt, params.verbosity = int(rows) * int(context), False, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = cores
params.cache_type_k = params.cache_type_v = getattr(llama.ggml_type, kept)
params.lora_adapters = [llama.CommonAdapterLoraInfo(path, 1.0) for path in adapters]
params.lora_init_without_apply = True
server = llama.Server(params)
while True:
    time.sleep(60)
"""


def program() -> str | None:
    """The interpreter, if there is one."""
    return os.environ.get(ENVIRONMENT)


TYPES = {"float32": ("f32", "GGML_TYPE_F32"), "bfloat16": ("bf16", "GGML_TYPE_BF16")}
"""Dtype -> what the matrices, and the keys and values, are stored in."""


def converted(base: Path, adapters: Path, output: Path, dtype: str) -> tuple[Path, list[Path]]:
    """The base and its adapters, in the order of their names, as files of GGUF; what is there already is kept."""
    output.mkdir(exist_ok=True)
    whole = output / f"{dtype}.gguf"
    _convert(base, whole, "--type", TYPES[dtype][0])
    parts = []
    for folder in sorted(adapters.iterdir()):
        parts.append(output / f"{folder.name}.gguf")
        _convert(folder, parts[-1], "--base", str(base))
    return whole, parts


def command(program: str, base: Path, adapters: Sequence[Path], port: int, rows: int, dtype: str) -> list[str]:
    """With as many slots as rows, each with a context of its own, on all cores."""
    words = [program, "-c", SERVER, str(base), str(port), str(rows), str(CONTEXT), TYPES[dtype][1]]
    return [*words, *map(str, adapters)]


def chosen(names: Sequence[str], base: str = "base") -> Mapping[str, Mapping[str, Any]]:
    """What a request says besides its model: adapters go by the order in which they were named at the start.

    The base has to name one and take nothing of it: a request that names none gets all of them at once.
    """
    found = {name: {"lora": [{"id": number, "scale": 1.0}]} for number, name in enumerate(names)}
    return found | {base: {"lora": [{"id": 0, "scale": 0.0}]}}


@contextlib.contextmanager
def llama_server(base: Path, adapters: Path, port: int, rows: int, dtype: str) -> Iterator[str]:
    """Gives its address. Raises `RuntimeError` with the end of its log when it does not start."""
    found = program()
    assert found, f"name an interpreter with xllamacpp in {ENVIRONMENT}"
    whole, parts = converted(base, adapters, adapters.parent / f"{adapters.name}-gguf", dtype)
    address = f"http://127.0.0.1:{port}"
    with running(command(found, whole, parts, port, rows, dtype), f"{address}/health"):
        yield address


def _convert(source: Path, target: Path, *more: str) -> None:
    if not target.exists():
        words = ["convert", str(source), str(target), "--to", "gguf", *more]
        subprocess.run([sys.executable, "-m", "gossamer", *words], check=True, stdout=subprocess.DEVNULL)
