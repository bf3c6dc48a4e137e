"""How many tokens a second does each library train, and in how much memory? The same adapter, rows and maths.

A step is: make the batch, forward, backward, clip, AdamW. Before anything is timed, every contender takes one step from
the same values of the same parameters, and its loss and gradient are held against float64, row by row without padding.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench.common import Row, Timing, interleaved, write_result
from bench.trainers import elsewhere, ours, peers
from bench.trainers.contender import Contender
from bench.trainers.work import (
    SHAPES,
    WORKLOADS,
    Observed,
    Work,
    first_factors,
    load_base,
    make_rows,
    token_stream,
)
from gossamer.models import has_bfloat16_units

QUESTION = "How many tokens a second does each library train, and in how much memory?"
BASE, RANK, ROUNDS = "smollm2-135m", 8, 5
TOLERANCES = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (2e-2, 2e-1)}
"""How far a loss and a gradient may be from float64, relative. torch's float32 cross-entropy on a CPU is 2e-5 off."""


@dataclass(frozen=True)
class Entry:
    """One contender: what its row is called, how it is made, and where it can run."""

    label: str
    make: Callable[[Work], Contender]
    needs: str = ""
    """A package, "bfloat16" or "cuda"; several with commas."""
    full: bool = False
    """Trains every weight."""


@dataclass(frozen=True)
class Facts:
    """What is known of a contender before it is timed."""

    dtypes: str
    off: float
    """Its gradient from float64's, relative."""
    peak: int
    """Bytes above the weights at the fullest moment of a step."""
    held: int
    """Bytes of gradients and of the optimiser's state, of those."""


def _trl(name: str) -> Callable[[Work], Contender]:
    def make(work: Work) -> Contender:
        from bench.trainers import trl  # seconds to import

        return getattr(trl, name)(work)

    return make


CONTENDERS: Mapping[str, Entry] = {
    "peft": Entry("PEFT, plain loop", peers.peft_loop),
    "peft-low": Entry("PEFT, adapters in bfloat16", peers.peft_low_precision, "bfloat16"),
    "peft-autocast": Entry("PEFT, autocast", peers.peft_autocast, "bfloat16"),
    "peft-liger": Entry("PEFT and Liger", peers.peft_liger, "cuda,liger_kernel"),
    "trl": Entry("TRL, defaults", _trl("at_defaults"), "trl"),
    "trl-kept": Entry("TRL, no checkpointing", _trl("without_checkpointing"), "trl"),
    "trl-packed": Entry("TRL, no checkpointing, packing", _trl("packed"), "trl"),
    "unsloth": Entry("Unsloth", partial(elsewhere.Elsewhere, make=elsewhere.unsloth), "cuda,unsloth"),
    **{key: Entry(label, ours.lora(variant)) for key, (label, variant) in ours.VARIANTS.items()},
    "full": Entry("all weights, transformers", peers.full_loop, full=True),
    "ours-full": Entry("all weights, Gossamer", ours.full(ours.SHARED), full=True),
}


CHOSEN: Mapping[str, Sequence[str]] = {
    "instructions": [*CONTENDERS],
    "full rows": [
        *("peft", "peft-low", "peft-autocast", "peft-liger", "trl", "trl-packed", "unsloth"),
        *("ours-nothing", "ours-blocks", "ours-packed"),  # nothing is masked and nothing shared there
    ],
}
"""Workload -> who takes part in it unless the command line says."""


def missing(entry: Entry, dtype: torch.dtype) -> str:
    """Why a contender cannot run here, or nothing."""
    for need in filter(None, entry.needs.split(",")):
        if need == "bfloat16":
            there = dtype == torch.bfloat16
        elif need == "cuda":
            there = torch.cuda.is_available()
        else:
            there = importlib.util.find_spec(need) is not None
        if not there:
            return f"needs {need}"
    return ""


def measure(work: Work, entries: Mapping[str, Entry], rounds: int, name: str) -> list[Row]:
    """Make all, hold each against float64, measure its memory, then time them in turn."""
    truths: dict[bool, Observed] = {}
    for full in {entry.full for entry in entries.values()}:
        _say(f"{name}: float64, {'all weights' if full else 'adapter'}")
        truths[full] = peers.truth_of_full(work) if full else peers.truth_of_lora(work)
        gc.collect()
    contenders, facts = {}, {}
    for key, entry in entries.items():
        _say(f"{name}: {entry.label}")
        contender = entry.make(work)
        off, peak = check(entry, contender, work, truths[entry.full])
        facts[key] = Facts(_dtypes(work, contender), off, peak, contender.held())
        contenders[key] = contender
    truths.clear()
    _say(f"{name}: {rounds} rounds")
    times = interleaved({key: one.step for key, one in contenders.items()}, rounds=rounds, warmup=0)
    for contender in contenders.values():
        contender.close()
    plain = next(iter(entries))
    return [_row(name, entries[key], work, times[key], times[plain], facts[key], facts[plain]) for key in entries]


def check(entry: Entry, contender: Contender, work: Work, truth: Observed) -> tuple[float, int]:
    """Same parameters, values, loss and gradient. How far the gradient is from float64's; the peak of memory."""
    if not entry.full:
        values = contender.values()
        assert values.keys() == work.factors.keys(), f"{entry.label}: {set(values) ^ set(work.factors)}"
        for name, value in values.items():
            assert torch.equal(value, work.factors[name].to(value.dtype)), f"{entry.label}: {name} has another value"
    seen = contender.observe()
    assert seen.gradients.keys() == truth.gradients.keys(), (
        f"{entry.label}: {sorted(set(seen.gradients) ^ set(truth.gradients))[:3]} trained here and not there"
    )
    square, wrong = 0.0, 0.0
    for name, right in truth.gradients.items():
        got = seen.gradients[name].to(right)
        assert got.shape == right.shape, f"{entry.label}: {name}"
        assert 0 < got.norm().item() < float("inf"), f"{entry.label}: the gradient of {name} is zero or not finite"
        square, wrong = square + right.norm().item() ** 2, wrong + (got - right).norm().item() ** 2
    off, astray = (wrong / square) ** 0.5, abs(seen.loss - truth.loss) / truth.loss
    for_loss, for_gradient = TOLERANCES[work.dtype]
    assert astray < for_loss, f"{entry.label}: loss {seen.loss:.7f}, in float64 {truth.loss:.7f}"
    assert off < for_gradient, f"{entry.label}: its gradient is {off:.1e} from float64's"
    return off, seen.peak


def _dtypes(work: Work, contender: Contender) -> str:
    """Of the base, and of what is trained where that is another."""
    kinds = [work.dtype, *{value.dtype for value in contender.values().values()} - {work.dtype}]
    assert len(kinds) < 3, kinds
    return ", trained: ".join(str(kind).removeprefix("torch.") for kind in kinds)


def _row(name: str, entry: Entry, work: Work, time: Timing, plain: Timing, fact: Facts, plain_fact: Facts) -> Row:
    speeds = [round(work.tokens / seconds, 1) for seconds in (time.median, time.max, time.min)]
    return {
        "rows": name,
        "trainer": entry.label,
        "dtype": fact.dtypes,
        **dict(zip(("tokens/s, median", "min", "max"), speeds, strict=True)),
        "times PEFT's": f"{plain.median / time.median:.2f}",
        "MB above the weights": round(fact.peak / 1e6, 1),
        "of PEFT's": f"{fact.peak / plain_fact.peak:.3f}",
        "gradients and moments, MB": round(fact.held / 1e6, 1),
        "gradient off float64": f"{fact.off:.1e}",
    }


def build(base: Any, tokenizer: Any, name: str, scale: int, real: bool) -> Work:
    """One workload on the base."""
    lengths = [(prompt * scale, answer * scale) for prompt, answer in WORKLOADS[name]]
    stream, system = token_stream(tokenizer, base.config.vocab_size, sum(map(sum, lengths)), real)
    return Work(base, tokenizer, make_rows(lengths, stream, system), RANK, first_factors(base, RANK))


def options(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--base", default=BASE, help="a model of the catalog, or tiny")
    parser.add_argument("--shape", choices=SHAPES, help="random weights in a Llama's shape instead of a base")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the base; by default what is fast here")
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=[*WORKLOADS], metavar="NAME")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, metavar="KEY", help=", ".join(CONTENDERS))
    parser.add_argument("--adapters-only", action="store_true", help="leave out those that train all weights")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--scale", type=int, default=1, help="how many times longer all rows are")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> list[Row]:
    """Measure what the command line asks for, print the rows, and write them where `--json FILE` says."""
    given = options(words)
    fast = torch.cuda.is_available() or has_bfloat16_units()
    dtype = getattr(torch, given.dtype or ("bfloat16" if fast else "float32"))
    warnings.simplefilter("ignore", FutureWarning)  # of libraries among themselves
    base, tokenizer = load_base(given.base, given.shape, dtype)
    real = not given.shape and given.base != "tiny"
    rows: list[Row] = []
    works: dict[str, Work] = {}
    reasons: dict[str, str] = {}
    notes = ""
    for name in given.workload:
        asked = ["peft", *(key for key in given.contenders or CHOSEN[name] if key != "peft")]  # ratios are of PEFT's
        asked = [key for key in asked if not (given.adapters_only and CONTENDERS[key].full)]
        reasons |= {key: missing(CONTENDERS[key], dtype) for key in asked}
        works[name] = build(base, tokenizer, name, given.scale, real)
        rows += measure(works[name], {key: CONTENDERS[key] for key in asked if not reasons[key]}, given.rounds, name)
        notes = _notes(given, works, {CONTENDERS[key].label: why for key, why in reasons.items() if why})
        if given.json:  # what there is already, should the rest be stopped
            write_result(given.json, "training", QUESTION, rows, notes)
    for row in rows:
        print("  ".join(f"{column}: {value}" for column, value in row.items()))
    print(notes)
    return rows


def _notes(given: argparse.Namespace, works: Mapping[str, Work], left_out: Mapping[str, str]) -> str:
    what = f"random weights in the shape of {given.shape}" if given.shape else given.base
    parts = [f"{what}, r={RANK} on every linear module of the decoder, a step on one batch, {given.rounds} rounds."]
    for name, work in works.items():
        area = len(work.examples) * max(map(len, work.examples))
        parts.append(
            f"{name}: {len(work.examples)} rows, {work.tokens:,} real tokens ({area:,} when padded), "
            f"{work.supervised:,} learned."
        )
    parts.append(
        "Tokens are real ones: padding does not count, and a shared prefix counts for every row. TRL's autocast to "
        "bfloat16, on by default, is on only where the base is in bfloat16. Memory above the weights: activations, "
        "gradients and the optimiser's state, at the fullest moment of a step."
    )
    versions = {name: version(name) for name in ("trl", "liger_kernel", "unsloth") if importlib.util.find_spec(name)}
    parts += [f"{name} {number}." for name, number in versions.items()]
    parts += [f"Left out: {label} ({why})." for label, why in left_out.items()]
    return " ".join(parts)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
