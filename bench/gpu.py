"""Is everything that is made for a GPU right there, and how fast is it? One script, one table.

    python -m bench.gpu --json bench/results/gpu.json     the tests marked gpu, kernels, compiling, serving, training
    python -m bench.gpu --shapes 1b --parts training --rounds 5

Without a CUDA device a toy goes the same way on the CPU: that shows that the script runs. Its figures mean nothing, and
no file is written.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench import compile as compiling
from bench import training
from bench.common import ROOT, Row, Timing, interleaved, write_result
from bench.serve import TARGETS, compared
from bench.trainers.work import SHAPES, load_base
from gossamer.kernels import elementwise

QUESTION = "Is everything that is made for a GPU right there, and how fast is it?"
CUDA = torch.cuda.is_available()
SIZE = (8192, 4096, 14336) if CUDA else (16, 32, 48)
"""Tokens, hidden, intermediate: an 8B model's, or a toy's."""
DTYPE = torch.bfloat16 if CUDA else torch.float32
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
REPEATS = 50 if CUDA else 1
"""Calls of a kernel in a turn."""
SCALE = {"1b": 8, "3b": 6, "8b": 4}
"""How many times longer than on a CPU the rows are, so that the device is busy."""


def tests() -> list[Row]:
    """The tests that are marked gpu; without one they are counted."""
    words = ["-m", "gpu", "-q", "-p", "no:cacheprovider", *([] if CUDA else ["--collect-only"]), "tests"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return [_row("tests", done.stdout.strip().splitlines()[-1])]


Call = tuple[Callable[..., Any], tuple[Any, ...]]


def kernels() -> list[Row]:
    """Each function behind the door: against float64, then eager and with the kernels in turn."""
    rows = []
    for name, (call, given) in _calls().items():
        exact = _flat(call(*(one.double() if isinstance(one, Tensor) else one for one in given)))
        contenders = {kind: _with(kind, call, given) for kind in ("eager", "triton" if CUDA else "auto")}
        off = {kind: _off(_flat(run()), exact) for kind, run in contenders.items()}
        times = interleaved(contenders, rounds=31, warmup=3)
        rows += [_timed("kernels", f"{name}, {kind}", times[kind], times["eager"], off[kind]) for kind in contenders]
    return rows


def _calls() -> dict[str, Call]:
    """What is timed, on random rows."""
    tokens, hidden, inner = SIZE
    draw = torch.Generator(device="cuda" if CUDA else "cpu").manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=draw, device=draw.device).to(DTYPE)

    x, slope, weight = random(tokens, hidden), random(tokens, hidden), random(hidden)
    gate, up, outer = (random(tokens, inner) for _ in range(3))
    q, cos, sin = (random(1, tokens, heads, hidden // 4) for heads in (4, 1, 1))
    inverse = elementwise.rms_inverse(x.double(), 1e-5).float()
    return {
        "norm": (elementwise.rms_forward, (x, inverse, weight, False)),
        "norm, backward": (elementwise.rms_backward, (slope, x, inverse, weight, False)),
        "gated activation": (elementwise.gated, ("silu", gate, up)),
        "gated activation, backward": (_slopes, ("silu", outer, gate, up)),
        "rotary positions": (elementwise.turned, (q, cos, sin, -1)),
    }


def layers() -> list[Row]:
    """What torch.compile brings."""
    found = compiling.measure(None if CUDA else 16)
    return [
        _row("layers", str(one["layers"]), one["median ms"], f"{one['min ms']}..{one['max ms']}", one["times eager"])
        for one in found
    ]


def serving(shape: str, rounds: int) -> list[Row]:
    """Another adapter in every row, beside the base alone, PEFT's mixed batches, and steps that are not recorded."""
    rows = []
    model, tokenizer = load_base("tiny", shape if CUDA else None, DTYPE)
    rows_left = range(len(tokenizer), model.config.vocab_size)  # an engine looks at the logits of tokens alone
    tokenizer.add_tokens([f"<{number}>" for number in rows_left])
    held = [*model.parameters(), *model.buffers()]
    for targets, modules in TARGETS.items():
        bare = copy.deepcopy(model, {id(one): one for one in held})  # the same weights
        cases = ((1, 1), (8, 8), (32, 32)) if CUDA else ((3, 2),)
        for one in compared(model, tokenizer, bare, modules, cases, (4 * rounds, rounds)):
            what = f"{shape}, {targets}, {one['requests']}:{one['adapters']}, {one['what']}: {one['contender']}"
            spread = f"{one['min ms']}..{one['max ms']} ms, {one['of the base']} of the base's"
            rows.append(_row("serving", what, one["median ms"], spread, one["times PEFT's"]))
        del bare
    return rows


def steps(shape: str, rounds: int) -> list[Row]:
    """A training step of every contender that is installed, on random weights of this shape."""
    rows = []
    base = ["--shape", shape, "--scale", str(SCALE[shape])] if CUDA else ["--base", "tiny"]
    contenders = [] if CUDA else ["--contenders", "peft", "ours-blocks", "ours-shared"]
    words = [*base, "--dtype", str(DTYPE).removeprefix("torch."), "--rounds", str(rounds), *contenders]
    if shape == "8b":  # whose weights, gradients and moments in float32 are 128 GB
        words.append("--adapters-only")
    for one in training.main(words):
        speed = f"{one['min']}..{one['max']} tokens/s"
        what = f"{shape}, {one['rows']}: {one['trainer']}"
        figures = one["tokens/s, median"], speed, one["times PEFT's"], one["gradient off float64"]
        rows.append(_row("training", what, *figures) | {"MB above the weights": one["MB above the weights"]})
    return rows


def _slopes(activation: str, slope: Tensor, gate: Tensor, up: Tensor) -> Any:
    """Of a copy, as the slope is used up."""
    return elementwise.gated_slopes(activation, slope.clone(), gate, up)


def _with(kind: str, call: Callable[..., Any], given: Sequence[Any]) -> Callable[[], Any]:
    """One turn: calls one after the other, so that the device and not their launching is timed."""

    def run() -> Any:
        out = None
        with patch.dict(os.environ, GOSSAMER_KERNELS=kind):
            for _ in range(REPEATS):
                out = call(*given)
        if CUDA:
            torch.cuda.synchronize()
        return out

    return run


def _flat(out: Any) -> Tensor:
    return torch.cat([one.double().flatten() for one in (out if isinstance(out, tuple) else (out,))])


def _off(got: Tensor, exact: Tensor) -> str:
    """Relative distance; raises for one that is not rounding."""
    off = ((got - exact).norm() / exact.norm()).item()
    assert off < TOLERANCE[DTYPE], off
    return f"{off:.1e}"


def _timed(part: str, what: str, time: Timing, plain: Timing, off: str) -> Row:
    one = 1e3 / REPEATS
    spread = f"{one * time.min:.3f}..{one * time.max:.3f} ms"
    return _row(part, what, round(one * time.median, 3), spread, round(plain.median / time.median, 2), off)


def _row(part: str, what: str, median: Any = "", spread: str = "", times: Any = "", off: Any = "") -> dict[str, Any]:
    return {
        "part": part,
        "what": what,
        "median": median,
        "spread": spread,
        "times plain or PEFT": times,
        "off float64": off,
    }


def main(words: list[str] | None = None) -> list[Row]:
    """Do what the command line asks for, print the rows, and write them where `--json FILE` says."""
    parser = argparse.ArgumentParser(description=QUESTION)
    parts: dict[str, Callable[[], list[Row]]] = {"tests": tests, "kernels": kernels, "layers": layers}
    every = [*parts, "serving", "training"]
    parser.add_argument("--parts", nargs="+", choices=every, default=every)
    shapes = ["1b", "8b"] if CUDA else ["1b"]
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=shapes, help="random weights of a Llama's")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    given = parser.parse_args(words)
    calls = [(name, parts[name]) for name in given.parts if name in parts]
    for name, call in {"serving": serving, "training": steps}.items():
        calls += [(name, partial(call, shape, given.rounds)) for shape in given.shapes if name in given.parts]
    rows: list[Row] = []
    for name, call in calls:
        print(name, file=sys.stderr, flush=True)
        rows += call()
        if given.json and CUDA:  # what there is already, should the rest be stopped
            write_result(given.json, "gpu", QUESTION, rows)
    for row in rows:
        print("  ".join(str(value) for value in row.values() if value != ""))
    if not CUDA:
        print("no CUDA device: this was a toy on the CPU, and its figures mean nothing")
    return rows


if __name__ == "__main__":
    main()
