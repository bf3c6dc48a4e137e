"""Tokens a second over HTTP with another adapter in every request, beside vLLM and llama.cpp.

The servers run the same base in the same dtype on the same cores, one at a time in turns, and answer the same bursts:
prompts of 64 random tokens, greedy answers of 33. No figure is given unless their answers agree; greedy texts may part
where two tokens are nearly as likely, so nearly all have to begin alike (in bfloat16: most).

The servers are started and stopped for every turn. vLLM is looked for where GOSSAMER_VLLM says (a virtual environment
that has it), llama.cpp where GOSSAMER_LLAMA_CPP does (an interpreter with xllamacpp); without them ours is measured
alone. llama.cpp has one adapter a batch, so requests of different adapters take turns: there is no time in which all of
them decode, and only their tokens a second in all can be told.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import gossamer as gs
from bench.common import Row, report
from bench.peers import llama_cpp
from bench.peers.load import Load, burst
from bench.peers.vllm_server import running, vllm_server
from bench.serve import BASE, MOST, TARGETS, _adapter, dtypes
from gossamer.models.locate import locate
from gossamer.serving.vllm import ENVIRONMENT

PROMPT, ANSWER, TURNS = 64, 33, 2
CASES = ((1, 1), (8, 1), (8, 8), (32, 1), (32, 8), (32, 32))
PORT = 8123
ALIKE = {"float32": 0.9, "bfloat16": 0.6}
"""Answers that have to begin alike: of two tokens that are nearly as likely, 16 bits often take the other."""


def popularity(kind: str, requests: int, many: int) -> list[int]:
    """Which adapter each request asks for: all equally, a few much more than others (Zipf), or one alone."""
    if kind == "identical":
        return [0] * requests
    if kind == "uniform":
        return [row % many for row in range(requests)]
    weights = [1 / (place + 1) for place in range(many)]
    return random.Random(0).choices(range(many), weights, k=requests)


@contextlib.contextmanager
def ours(adapters: Path, rows: int, dtype: str = "float32") -> Iterator[str]:
    """`gossamer serve` in a process of its own."""
    words = ["serve", "--base", BASE, "--name", "base", "--adapters", str(adapters), "--port", str(PORT)]
    words += ["--dtype", dtype, "--rows", str(rows)]
    with running([sys.executable, "-m", "gossamer", *words], f"http://127.0.0.1:{PORT}/ready"):
        yield f"http://127.0.0.1:{PORT}"


def measure() -> list[Row]:
    """All servers in turns, for every case."""
    gs.fetch(BASE)
    return [row for dtype in dtypes() for row in _measured(dtype)]


def _measured(dtype: str) -> list[Row]:
    servers: dict[str, Callable[[Path], Any]] = {"Gossamer": lambda folder: ours(folder, MOST, dtype)}
    if os.environ.get(ENVIRONMENT):
        servers["vLLM"] = lambda folder: vllm_server(locate(BASE), folder, PORT + 1, dtype)
    if llama_cpp.program():
        servers["llama.cpp"] = lambda folder: llama_cpp.llama_server(locate(BASE), folder, PORT + 2, MOST, dtype)
    with tempfile.TemporaryDirectory() as folder:
        targets, modules = "q, v", TARGETS["q, v"]
        adapters = Path(folder) / "adapters"
        names = _adapters(adapters, modules)
        fields = {"llama.cpp": llama_cpp.chosen(names)}
        loads: dict[str, dict[Any, list[Load]]] = {name: {} for name in servers}
        for _ in range(TURNS):
            for name, server in servers.items():
                with server(adapters) as url:
                    _turn(url, names, loads[name], fields.get(name))
        _alike(loads, dtype)
        about = {"dtype": dtype, "adapters on": targets}
        return [
            row
            for case in next(iter(loads.values()))
            for row in _rows(about, case, {name: found[case] for name, found in loads.items()})
        ]


def _adapters(folder: Path, modules: Any) -> list[str]:
    model, _ = gs.load_base(BASE, dtype=torch.float32)
    names = [f"a{number:02}" for number in range(MOST)]
    for number, name in enumerate(names):
        _adapter(model, modules, number).save(folder / name)
    return names


def _turn(url: str, names: Sequence[str], loads: dict[Any, list[Load]], more: Any) -> None:
    draw = random.Random(1)
    prompts = [[draw.randrange(40_000) for _ in range(PROMPT)] for _ in range(MOST)]
    asyncio.run(burst(url, names, prompts, 2, more=more))  # every adapter in memory
    kinds = [(*case, "uniform") for case in CASES] + [(32, 32, "skewed"), (32, 0, "base alone"), (8, 0, "base alone")]
    for requests, many, kind in kinds:
        chosen = popularity(kind, requests, many) if many else []
        models = [names[number] for number in chosen] if many else ["base"] * requests
        fresh = [[draw.randrange(40_000) for _ in range(PROMPT)] for _ in range(requests)]  # nobody's prefix
        found = asyncio.run(burst(url, models, fresh, ANSWER, more=more))
        loads.setdefault((requests, many, kind), []).append(found)


def _alike(loads: Mapping[str, Mapping[Any, list[Load]]], dtype: str) -> None:
    first, *others = loads.values()
    for name, other in zip([*loads][1:], others, strict=True):
        pairs = [
            (mine.text[:12], theirs.text[:12])
            for case, turns in first.items()
            for one, two in zip(turns, other[case], strict=True)
            for mine, theirs in zip(one.streams, two.streams, strict=True)
        ]
        same = sum(mine == theirs for mine, theirs in pairs) / len(pairs)
        print(f"{dtype}: {same:.0%} of the answers begin as {name}'s", file=sys.stderr)
        assert same > ALIKE[dtype], f"{same:.0%} of the answers begin as {name}'s"


def _rows(about: Row, case: tuple[int, int, str], loads: Mapping[str, list[Load]]) -> list[Row]:
    requests, many, kind = case
    found: list[Row] = []
    best = {name: requests / statistics.median(load.between for load in turns) for name, turns in loads.items()}
    for name, turns in loads.items():
        steps = [1e3 * load.between for load in turns]
        apart = any(map(math.isnan, steps))
        found.append(
            {
                **about,
                "requests": requests,
                "adapters": many,
                "popularity": kind,
                "server": name,
                "tokens/s while decoding": "" if apart else round(best[name]),
                "of vLLM's": round(best[name] / best["vLLM"], 2) if "vLLM" in best and not apart else "",
                "ms between tokens": "" if apart else round(statistics.median(steps), 1),
                "min..max": "" if apart else f"{min(steps):.0f}..{max(steps):.0f}",
                "ms to the first": round(1e3 * statistics.median(load.first for load in turns)),
                "tokens/s in all": round(statistics.median(load.throughput for load in turns)),
            }
        )
    return found


if __name__ == "__main__":
    report("serve_http", "How many tokens a second come over HTTP, beside vLLM and llama.cpp?", measure)
