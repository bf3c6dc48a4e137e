"""What does the base's storage cost in quality? E2E with SmolLM2-135M: evaluation loss after the same few steps.

Reads ../shared/data/e2e/{train,test}.csv, or the folder that E2E names: columns mr and ref. Finished runs are kept,
each with its settings, in bench/results/quality.jsonl or where --resume says, so a stopped measurement goes on where it
was and runs of other settings are never mixed in.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import gossamer as gs
from bench.common import RESULTS, ROOT, Row, write_result
from gossamer.files.atomic import write_text
from gossamer.models import has_bfloat16_units
from gossamer.quant import FORMATS, packed_bytes

QUESTION = "What does storing the base in few bits cost in quality?"
BASE, STEPS, BATCH, TRAIN_ROWS, EVAL_ROWS, LR = "smollm2-135m", 60, 4, 400, 60, 1e-3
SEEDS = {"dense": (0, 1, 2), "nf4": (0, 1, 2), "nf4-single": (0,), "fp4": (0,), "int8": (0,)}
"""Storage -> its seeds: QLoRA's own format and the dense base with three, the others once."""
DTYPE = "bfloat16" if torch.cuda.is_available() or has_bfloat16_units() else "float32"
KEPT = RESULTS / "quality.jsonl"

Losses = dict[tuple[int, str], tuple[float, float]]
"""(seed, storage) -> evaluation loss before and after training."""


def measure(settings: dict[str, Any], seeds: Mapping[str, Sequence[int]], kept: Path) -> list[Row]:
    """Each storage and seed once: the same rows in the same order, the same first factors."""
    with tempfile.TemporaryDirectory() as folder:
        files = _rows(Path(folder), settings["eval_rows"])
        gs.fetch(BASE)
        done = _known(kept, settings)
        waiting = [(seed, storage) for storage in seeds for seed in seeds[storage] if (seed, storage) not in done]
        print(f"{len(waiting)} runs to do, {settings}", file=sys.stderr)
        start = time.monotonic()
        for number, (seed, storage) in enumerate(waiting, start=1):
            done[seed, storage] = _run(storage, seed, settings, files, Path(folder) / f"{storage}-{seed}")
            _keep(kept, {"seed": seed, "storage": storage} | settings, done[seed, storage])
            left = (time.monotonic() - start) / number * (len(waiting) - number) / 60
            before, after = done[seed, storage]
            print(f"{storage}, seed {seed}: {before:.4f} -> {after:.4f}, about {left:.0f} min left", file=sys.stderr)
    return [_row(storage, done, seeds[storage]) for storage in seeds]


def _row(storage: str, done: Losses, seeds: Sequence[int]) -> Row:
    after = [done[seed, storage][1] for seed in seeds]
    ratios = [done[seed, storage][1] / done[seed, "dense"][1] for seed in seeds]
    return {
        "linear weights": storage,
        "bits": _bits(storage),
        "seeds": len(after),
        "loss before": f"{done[seeds[0], storage][0]:.4f}",
        "loss after, mean": f"{statistics.mean(after):.4f}",
        "min..max": f"{min(after):.4f}..{max(after):.4f}",
        "of dense, mean": f"{statistics.mean(ratios):.4f}",
        "of dense, min..max": f"{min(ratios):.4f}..{max(ratios):.4f}",
    }


def _bits(storage: str) -> float:
    """Bits a weight, scales included, of the model's largest matrices."""
    if storage == "dense":
        return 8 * getattr(torch, DTYPE).itemsize
    return round(8 * packed_bytes(FORMATS[storage], 576, 1536) / (576 * 1536), 3)


def _run(storage: str, seed: int, settings: dict[str, Any], files: dict[str, str], output: Path) -> tuple[float, float]:
    """Evaluation loss before and after, nats a supervised token."""
    model, tokenizer = gs.load_base(BASE, dtype=settings["dtype"], quant=None if storage == "dense" else storage)
    gs.attach(model, gs.LoRA(r=8), seed=seed)
    config = gs.TrainConfig(
        data=files, max_steps=settings["steps"], batch_size=BATCH, lr=LR, seed=seed, output=str(output)
    )
    report: Any = gs.train(model, tokenizer, config).report
    return report["eval_before"]["loss"], report["eval_after"]["loss"]


def _rows(folder: Path, eval_rows: int) -> dict[str, str]:
    """Prompt and completion of a sample of rows, the same for every run."""
    source = Path(os.environ.get("E2E", ROOT.parent / "shared" / "data" / "e2e"))
    if not (source / "train.csv").is_file():
        print(f"not measured: no E2E data at {source}; set E2E to a folder with train.csv and test.csv (mr, ref)")
        sys.exit(0)  # `make bench` goes on with the others
    files = {}
    for name, split, count in (("train", "train", TRAIN_ROWS), ("eval", "test", eval_rows)):
        with (source / f"{split}.csv").open(encoding="utf-8", newline="") as stream:
            rows = random.Random(0).sample([*csv.DictReader(stream)], count)
        pairs = [{"prompt": f"{row['mr']}\n", "completion": row["ref"]} for row in rows]
        files[name] = str(folder / f"{name}.jsonl")
        Path(files[name]).write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return files


def _known(kept: Path, settings: dict[str, Any]) -> Losses:
    """What was measured before, with these settings."""
    lines = kept.read_text(encoding="utf-8").splitlines() if kept.is_file() else []
    found = [one for one in map(json.loads, lines) if settings.items() <= one.items()]
    return {(one["seed"], one["storage"]): (one["before"], one["after"]) for one in found}


def _keep(kept: Path, run: dict[str, Any], losses: tuple[float, float]) -> None:
    """Add a run. The file is replaced whole, so that being killed never leaves half a line."""
    earlier = kept.read_text(encoding="utf-8") if kept.is_file() else ""
    write_text(kept, earlier + json.dumps(run | {"before": losses[0], "after": losses[1]}) + "\n")


def main() -> None:
    """Measure what the command line asks for, print the rows, and write them where `--json FILE` says."""
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps of a run")
    parser.add_argument("--eval-rows", type=int, default=EVAL_ROWS, help="held-out rows of a run")
    parser.add_argument("--seeds", type=int, nargs="+", help="of every storage")
    parser.add_argument("--resume", type=Path, default=KEPT, metavar="FILE", help="where finished runs are kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    given = parser.parse_args()
    fixed = {"batch": BATCH, "train_rows": TRAIN_ROWS, "lr": LR, "dtype": DTYPE}
    seeds = dict.fromkeys(SEEDS, given.seeds) if given.seeds else SEEDS
    rows = measure({"steps": given.steps, "eval_rows": given.eval_rows} | fixed, seeds, given.resume)
    for row in rows:
        print("  ".join(f"{column}: {value}" for column, value in row.items()))
    if given.json:
        notes = f"SmolLM2-135M, r=8 on every linear module, {DTYPE}, {given.steps} steps of {BATCH} rows of E2E, "
        notes += f"{given.eval_rows} held-out rows; nats a supervised token."
        write_result(given.json, "quality", QUESTION, rows, notes)


if __name__ == "__main__":
    main()
