"""What is left of four adapters once they are one? Every way of combining, on four tasks of the real model.

An adapter is trained for each task, and one for all four on the same rows with as many steps as the four had together.
Then the four are combined by every method, at the scale (1, 2 or 4 quarters of each) with the best loss on a few rows
that nobody trained on, and measured on held-out rows:

    score = (loss of the base - loss) / (loss of the base - loss of the task's own adapter)

1 is as good as the adapter that learned this task alone, 0 no better than the base. An answer is right when the greedy
answer is the whole reference, token for token.

    reviews     a sentence of a product review -> one of five grades              (the catalog's `reviews`)
    banking77   a customer's question -> one of 77 intents                        (Casanueva et al. 2020)
    e2e         facts about a restaurant -> a sentence                            (Novikova et al. 2017)
    extraction  a sentence about a restaurant -> the facts, from other rows       (the same data, the other way round)

banking77 and e2e are read from ../shared/data, or from the folder that DATA names. Adapters and figures are kept in
the folder that WORK names (runs/combining), so a stopped measurement goes on where it was.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gossamer as gs
from bench.common import ROOT, Row, report
from bench.serve import dtypes
from gossamer.files.atomic import write_json
from gossamer.models import data_file
from gossamer.models.device import keep_freed_memory

BASE, RANK, STEPS, BATCH, LR = "smollm2-135m", 8, 60, 8, 1e-3
TRAIN_ROWS, CHOICE_ROWS, EVAL_ROWS = 480, 24, 80
CHOSEN_BY = 8
"""Rows of each task that a scale is chosen by; weights are learned from all of CHOICE_ROWS."""
SCALES = (1.0, 2.0, 4.0)
"""Of the mean of the four; the last is their sum."""
METHODS: dict[str, dict[str, Any]] = {
    "exact": {},
    "svd": {"r": RANK},
    "linear": {},
    "ties": {"density": 0.3},
    "dare": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "magnitude_prune": {"density": 0.3},
    "knots": {},
    "knots, scaled": {"method": "knots", "scaled": True},
    "iso_c": {},
    "iso_cts": {},
}
DATA = Path(os.environ.get("DATA", ROOT.parent / "shared" / "data"))
WORK = Path(os.environ.get("WORK", ROOT / "runs" / "combining"))

Pairs = list[dict[str, str]]


class Task(NamedTuple):
    """Rows to learn from, to choose a scale by, and to be judged on."""

    train: Pairs
    choice: Pairs
    held_out: Pairs


def measure() -> list[Row]:
    """On the real model and data."""
    if not (DATA / "e2e").is_dir() or not (DATA / "banking77").is_dir():
        print(f"not measured: no e2e and banking77 in {DATA}; set DATA to a folder with both", file=sys.stderr)
        sys.exit(0)  # `make bench` goes on with the others
    keep_freed_memory()
    for name in (BASE, "reviews"):
        gs.fetch(name)
    model, tokenizer = gs.load_base(BASE, dtype=dtypes()[0])
    return compared(model, tokenizer, tasks(), WORK, STEPS)


def tasks() -> dict[str, Task]:
    """The four."""
    reviews = [_read_jsonl(data_file(f"reviews/{part}.jsonl")) for part in ("train", "eval")]
    banking = [
        [{"prompt": f"Question: {row['text'].strip()}\nIntent:", "completion": f" {row['category']}"} for row in rows]
        for rows in (_read_csv("banking77", "train"), _read_csv("banking77", "test"))
    ]
    told = [_read_csv("e2e", part) for part in ("train", "test")]
    e2e = [[{"prompt": f"{row['mr']}\n", "completion": row["ref"]} for row in rows] for rows in told]
    facts = [[{"prompt": f"{row['ref']}\nFacts:", "completion": f" {row['mr']}"} for row in rows] for rows in told]
    found = {"reviews": reviews, "banking77": banking, "e2e": e2e, "extraction": facts}
    return {name: _drawn(name, *parts) for name, parts in found.items()}


def _drawn(name: str, train: Pairs, held_out: Pairs) -> Task:
    draw = random.Random(name)
    seen = draw.sample(train, TRAIN_ROWS + CHOICE_ROWS)
    return Task(seen[:TRAIN_ROWS], seen[TRAIN_ROWS:], draw.sample(held_out, EVAL_ROWS))


def _read_csv(folder: str, part: str) -> list[dict[str, str]]:
    with (DATA / folder / f"{part}.csv").open(encoding="utf-8", newline="") as stream:
        return [*csv.DictReader(stream)]


def _read_jsonl(path: Path) -> Pairs:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{name: row[name] for name in ("prompt", "completion")} for row in rows]


def compared(model: Any, tokenizer: Any, given: dict[str, Task], work: Path, steps: int) -> list[Row]:
    """Train what is not trained yet, measure what is not measured yet."""
    kept = Kept(work / "figures.json")
    single = {name: trained(model, tokenizer, task.train, steps, work / name) for name, task in given.items()}
    together = [*itertools.chain(*zip(*(task.train for task in given.values()), strict=True))]
    multitask = trained(model, tokenizer, together, steps * len(given), work / "multitask")

    def figures(contender: str, adapter: gs.Adapter | None, names: Sequence[str] = (*given,)) -> dict[str, Any]:
        return {
            name: kept(
                f"{contender}: {name}", lambda name=name: judged(model, tokenizer, adapter, given[name].held_out)
            )
            for name in names
        }

    base = figures("base", None)
    alone = {name: figures("its own adapter", single[name], [name])[name] for name in given}
    rows = [_row("the base", "", base, base, alone), _row("its own adapter", "", alone, base, alone)]
    rows.append(_row("one adapter for all", "", figures("multitask", multitask), base, alone))
    for method, options in METHODS.items():
        given_to: dict[str, Any] = {"method": method} | options
        mean = gs.combine([*single.values()], **given_to)
        scale = kept(f"{method}: scale", lambda mean=mean: chosen(model, tokenizer, mean, given))
        found = figures(method, scale * mean)
        distance = mean.provenance.get("distance")
        rows.append(_row(method, f"{scale:g}/4", found, base, alone, distance))
    weights = kept("learned weights", lambda: learned(model, tokenizer, [*single.values()], given))
    mixed = gs.combine([*single.values()], weights)
    rows.append(_row("exact, learned weights", "learned", figures("learned", mixed), base, alone, 0.0))
    return rows


class Kept:
    """Figures that were measured before, and those that come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def __call__(self, name: str, call: Any) -> Any:
        if name not in self.known:
            self.known[name] = call()
            write_json(self.path, self.known)
            print(name, self.known[name] if "weights" not in name else "", file=sys.stderr, flush=True)
        return self.known[name]


def trained(model: Any, tokenizer: Any, rows: Pairs, steps: int, folder: Path) -> gs.Adapter:
    """An adapter that learned these rows; read where it was trained before."""
    if not (folder / "adapter").is_dir():
        shutil.rmtree(folder, ignore_errors=True)  # of a training that was cut off
        folder.mkdir(parents=True)
        data = folder / "train.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        gs.attach(model, gs.LoRA(r=RANK))
        config = gs.TrainConfig(
            data={"train": str(data)},
            max_steps=steps,
            batch_size=BATCH,
            lr=LR,
            output=str(folder / "run"),
        )
        gs.train(model, tokenizer, config).adapter.save(folder / "adapter")
        gs.detach(model)
    return gs.Adapter.load(folder / "adapter")


def judged(model: Any, tokenizer: Any, adapter: gs.Adapter | None, rows: Pairs) -> dict[str, float]:
    """Loss (nats a token of the reference), and the share of greedy answers that are the reference."""
    if adapter is not None:
        gs.attach(model, adapter)
    try:
        found = [one for batch in batches(tokenizer, rows) for one in _judged(model, batch)]
    finally:
        if adapter is not None:
            gs.detach(model)
    tokens = sum(count for _, count, _ in found)
    return {"loss": sum(loss for loss, _, _ in found) / tokens, "right": sum(right for *_, right in found) / len(found)}


@torch.inference_mode()
def _judged(model: Any, batch: dict[str, Tensor]) -> list[tuple[float, int, bool]]:
    labels = batch["labels"][:, 1:]
    asked = labels != -100
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits[:, :-1][asked]
    losses = torch.nn.functional.cross_entropy(logits.double(), labels[asked], reduction="none")
    hits = logits.argmax(-1) == labels[asked]
    sizes = asked.sum(1).tolist()
    return [
        (float(part.sum()), size, bool(hit.all()))
        for part, hit, size in zip(losses.split(sizes), hits.split(sizes), sizes, strict=True)
    ]


def batches(tokenizer: Any, rows: Pairs, size: int = 10) -> Iterator[dict[str, Tensor]]:
    """Rows of prompt and completion, padded on the right; only the completion and its end are labelled."""
    for start in range(0, len(rows), size):
        pairs = [
            (tokenizer(row["prompt"]).input_ids, tokenizer(row["completion"]).input_ids)
            for row in rows[start : start + size]
        ]
        pairs = [(prompt, [*answer, tokenizer.eos_token_id]) for prompt, answer in pairs]
        longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
        ids, labels = torch.zeros(len(pairs), longest, dtype=torch.long), torch.full((len(pairs), longest), -100)
        for row, (prompt, answer) in enumerate(pairs):
            ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        lengths = torch.tensor([[len(prompt) + len(answer)] for prompt, answer in pairs])
        yield {"input_ids": ids, "attention_mask": (torch.arange(longest) < lengths).long(), "labels": labels}


def chosen(model: Any, tokenizer: Any, mean: gs.Adapter, given: dict[str, Task]) -> float:
    """The scale with the lowest mean loss over the tasks."""
    rows = {name: task.choice[:CHOSEN_BY] for name, task in given.items()}
    losses = {
        scale: sum(judged(model, tokenizer, scale * mean, part)["loss"] for part in rows.values()) for scale in SCALES
    }
    return min(losses, key=lambda scale: losses[scale])


def learned(model: Any, tokenizer: Any, adapters: list[gs.Adapter], given: dict[str, Task]) -> list[dict[str, float]]:
    """Weights of every adapter and module, learned from the rows that scales are chosen by."""
    mixed = [*itertools.chain(*zip(*(task.choice for task in given.values()), strict=True))]
    return gs.learned_weights(model, adapters, [*batches(tokenizer, mixed, size=8)], steps=24, lr=2e-2)


def _row(
    contender: str,
    weights: str,
    found: dict[str, Any],
    base: dict[str, Any],
    alone: dict[str, Any],
    distance: Any = None,
) -> Row:
    scores = {
        name: (base[name]["loss"] - one["loss"]) / (base[name]["loss"] - alone[name]["loss"])
        for name, one in found.items()
    }
    right = {name: f"{found[name]['right']:.0%}" for name in ("reviews", "banking77", "extraction") if name in found}
    return {
        "contender": contender,
        "of each": weights,
        **{name: f"{score:.2f}" for name, score in scores.items()},
        "mean score": f"{sum(scores.values()) / len(scores):.3f}",
        **{f"{name} right": share for name, share in right.items()},
        "distance from the sum": "" if distance is None else f"{distance:.2f}",
    }


if __name__ == "__main__":
    report(
        "combining",
        "What is left of four adapters once they are one?",
        measure,
        f"SmolLM2-135M, {dtypes()[0]}, r={RANK} on every linear module, {STEPS} steps of {BATCH} rows a task; "
        f"{EVAL_ROWS} held-out rows a task.",
    )
