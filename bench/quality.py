"""What does the base's storage cost in quality? E2E with SmolLM2-135M: evaluation loss after the same few steps.

Reads ../shared/data/e2e/{train,test}.csv, or the folder that E2E names: columns mr and ref. Finished runs are kept in
bench/results/quality.jsonl, so a stopped measurement goes on where it was.
"""

from __future__ import annotations

import csv
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gossamer as gs
from bench.common import RESULTS, ROOT, Row, report
from gossamer.quant import FORMATS, packed_bytes

BASE, STEPS, BATCH, TRAIN_ROWS, EVAL_ROWS, LR = "smollm2-135m", 60, 4, 400, 60, 1e-3
SEEDS = (0, 1, 2)
STORAGES = ("dense", "nf4", "nf4-single", "fp4", "int8")
KEPT = RESULTS / "quality.jsonl"


def measure() -> list[Row]:
    """Each storage and seed once: the same rows in the same order, the same first factors."""
    gs.fetch(BASE)
    done = _known()
    with tempfile.TemporaryDirectory() as folder:
        files = _rows(Path(folder))
        waiting = [(seed, storage) for storage in STORAGES for seed in SEEDS if (seed, storage) not in done]
        for number, (seed, storage) in enumerate(waiting):
            start = time.monotonic()
            done[seed, storage] = _run(storage, seed, files, Path(folder) / f"{storage}-{seed}")
            _keep(seed, storage, done[seed, storage])
            left = (time.monotonic() - start) * (len(waiting) - number - 1) / 60
            print(f"{storage}, seed {seed}: {done[seed, storage]}, about {left:.0f} min left", file=sys.stderr)
    return [_row(storage, done) for storage in STORAGES]


def _row(storage: str, done: dict[tuple[int, str], tuple[float, float]]) -> Row:
    after = [done[seed, storage][1] for seed in SEEDS]
    ratios = [done[seed, storage][1] / done[seed, "dense"][1] for seed in SEEDS]
    return {
        "linear weights": storage,
        "bits": 32 if storage == "dense" else round(8 * packed_bytes(FORMATS[storage], 576, 1536) / (576 * 1536), 3),
        "loss before": f"{done[SEEDS[0], storage][0]:.4f}",
        "loss after, mean": f"{statistics.mean(after):.4f}",
        "min..max": f"{min(after):.4f}..{max(after):.4f}",
        "of dense, mean": f"{statistics.mean(ratios):.4f}",
        "of dense, min..max": f"{min(ratios):.4f}..{max(ratios):.4f}",
    }


def _run(storage: str, seed: int, files: dict[str, str], output: Path) -> tuple[float, float]:
    """Evaluation loss before and after, nats a supervised token."""
    model, tokenizer = gs.load_base(BASE, dtype="float32", quant=None if storage == "dense" else storage)
    gs.attach(model, gs.LoRA(r=8), seed=seed)
    config = gs.TrainConfig(data=files, max_steps=STEPS, batch_size=BATCH, lr=LR, seed=seed, output=str(output))
    report: Any = gs.train(model, tokenizer, config).report
    return report["eval_before"]["loss"], report["eval_after"]["loss"]


def _rows(folder: Path) -> dict[str, str]:
    """Prompt and completion of a sample of rows, the same for every run."""
    source = Path(os.environ.get("E2E", ROOT.parent / "shared" / "data" / "e2e"))
    if not (source / "train.csv").is_file():
        raise SystemExit(f"no E2E data at {source}: set E2E to a folder with train.csv and test.csv (mr, ref)")
    files = {}
    for name, split, count in (("train", "train", TRAIN_ROWS), ("eval", "test", EVAL_ROWS)):
        with (source / f"{split}.csv").open(encoding="utf-8", newline="") as stream:
            rows = random.Random(0).sample([*csv.DictReader(stream)], count)
        pairs = [{"prompt": f"{row['mr']}\n", "completion": row["ref"]} for row in rows]
        files[name] = str(folder / f"{name}.jsonl")
        Path(files[name]).write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return files


def _known() -> dict[tuple[int, str], tuple[float, float]]:
    lines = KEPT.read_text(encoding="utf-8").splitlines() if KEPT.is_file() else []
    found = [json.loads(line) for line in lines]
    return {(one["seed"], one["storage"]): (one["before"], one["after"]) for one in found}


def _keep(seed: int, storage: str, losses: tuple[float, float]) -> None:
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    with KEPT.open("a", encoding="utf-8") as stream:
        line = {"seed": seed, "storage": storage, "before": losses[0], "after": losses[1]}
        stream.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    notes = f"SmolLM2-135M, r=8 on every linear module, float32, {STEPS} steps of {BATCH} rows of E2E, seeds {SEEDS}, "
    notes += f"{EVAL_ROWS} held-out rows; nats a supervised token."
    report("quality", "What does storing the base in few bits cost in quality?", measure, notes)
