"""A thousand adapters on disk: what they cost those that are in use, and how long one takes that nobody has asked for.

Steps of 32 requests with 32 adapters, while 32 or 1,000 are registered, in turns; and the time from asking for an
adapter that is on disk to its first token, for one after another of a thousand, in bounded memory.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import gossamer as gs
from bench.common import Row, interleaved, report
from bench.serve import BASE, MOST, PROMPT, TARGETS, _adapter, dtypes
from gossamer.serving import Engine, Limits, Sampling, Sequence

MANY, ROUNDS, MEMORY = 1000, 15, 128 * 2**20


def measure() -> list[Row]:
    """Steps, then the thousand."""
    gs.fetch(BASE)
    model, tokenizer = gs.load_base(BASE, dtype=dtypes()[0])
    with tempfile.TemporaryDirectory() as folder:
        names = _folders(model, Path(folder))
        sources = {name: Path(folder) / name for name in names}
        few = _Serving((model, tokenizer), {name: sources[name] for name in names[:MOST]}, names)
        many = _Serving((model, tokenizer), sources, names)
        assert few.drawn == many.drawn, "the same tokens"
        times = interleaved({"32 registered": few.engine.step, "1,000 registered": many.engine.step}, rounds=ROUNDS)
        plain = times["32 registered"].median
        rows: list[Row] = [
            {
                "what": f"a step of 32 adapters, {name}",
                **time_.row(),
                "of 32 registered": round(time_.median / plain, 3),
            }
            for name, time_ in times.items()
        ]
        few.engine.close()
        many.engine.close()
        return rows + _firsts(Engine((model, tokenizer), sources, memory=MEMORY, prefixes=0), names)


def _folders(model: Any, folder: Path) -> list[str]:
    """A thousand folders, of 32 different adapters; files are links."""
    names = [f"a{number:04}" for number in range(MANY)]
    for number, name in enumerate(names):
        if number < MOST:
            _adapter(model, TARGETS["q, v"], number).save(folder / name)
            continue
        (folder / name).mkdir()
        for file in (folder / names[number % MOST]).iterdir():
            os.link(file, folder / name / file.name)
    return names


class _Serving:
    def __init__(self, base: Any, sources: dict[str, Path], names: list[str]) -> None:
        self.engine = Engine(base, sources, limits=Limits(rows=MOST, tokens=PROMPT * MOST), prefixes=0)
        draw = torch.Generator().manual_seed(0)
        prompts = torch.randint(0, 40_000, (MOST, PROMPT), generator=draw).tolist()
        sequences = [
            self.engine.submit(Sequence(tuple(prompt), {name: 1.0}, Sampling(max_tokens=200, ignore_eos=True)))
            for prompt, name in zip(prompts, names, strict=False)
        ]
        while not all(sequence.drawn for sequence in sequences):
            self.engine.step()
        self.drawn = [sequence.drawn[0] for sequence in sequences]


def _firsts(engine: Engine, names: list[str]) -> list[Row]:
    """Milliseconds to the first token of a prompt of 16, while more and more adapters were used before."""
    took, most = [], 0
    for name in names:
        start = time.perf_counter()
        sequence = engine.submit(Sequence(tuple(range(100, 116)), {name: 1.0}, Sampling(max_tokens=1)))
        while not sequence.done:
            engine.step()
        took.append(1e3 * (time.perf_counter() - start))
        assert sequence.reply, sequence.fault
        most = max(most, engine.store.bytes)
    known = engine.submit(Sequence(tuple(range(100, 116)), {names[-1]: 1.0}, Sampling(max_tokens=1)))
    start = time.perf_counter()
    while not known.done:
        engine.step()
    ready = 1e3 * (time.perf_counter() - start)
    quarters = [statistics.median(took[start : start + MANY // 4]) for start in range(0, MANY, MANY // 4)]
    return [
        {
            "what": "an adapter on disk to its first token",
            "median ms": round(statistics.median(took), 1),
            "p99 ms": round(statistics.quantiles(took, n=100)[98], 1),
            "medians of the quarters": ", ".join(f"{one:.0f}" for one in quarters),
            "one in memory, ms": round(ready, 1),
            "memory allowed MB": MEMORY // 2**20,
            "at most MB": round(most / 2**20, 1),
        }
    ]


if __name__ == "__main__":
    report(
        "store",
        "What do a thousand registered adapters cost?",
        measure,
        f"SmolLM2-135M, r=8 at q and v, {dtypes()[0]}.",
    )
