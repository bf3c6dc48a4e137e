"""What do eight adapters cost that are trained on one base at once, beside the same eight one after the other?"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import gossamer as gs
from bench.common import Row, report
from gossamer.models import data_file
from gossamer.planning.fake import LiveBytes
from gossamer.progress import Silent
from gossamer.training import Job, Run, train

BASE, DATA, COUNT, STEPS, ROUNDS = "smollm2-135m", "reviews/train.jsonl", 8, 1, 5
RANKS = (4, 8, 8, 12)


def measure() -> list[Row]:
    """The same jobs, at once and in turn; equal adapters first, then seconds of interleaved runs, then live bytes."""
    gs.fetch(BASE)
    gs.fetch("reviews")
    model, tokenizer = gs.load_base(BASE)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        lines = data_file(DATA).read_text(encoding="utf-8").splitlines(keepends=True)
        rows.write_text("".join(lines[:256]), encoding="utf-8")
        runs = Runs(model, tokenizer, rows, Path(folder))
        _check(runs.at_once(COUNT), runs.in_turn(COUNT))
        seconds: dict[str, list[float]] = {"at once": [], "in turn": []}
        for number in range(ROUNDS):
            for name in [*seconds][:: -1 if number % 2 else 1]:
                call = runs.at_once if name == "at once" else runs.in_turn
                start = time.perf_counter()
                call(COUNT)
                seconds[name].append(time.perf_counter() - start)
        bytes_of = {name: runs.peak(name) for name in seconds}
    plain = statistics.median(seconds["in turn"])
    return [
        {
            "eight adapters": name,
            "seconds, median": round(statistics.median(took), 1),
            "min..max": f"{min(took):.1f}..{max(took):.1f}",
            "throughput of in turn's": f"{plain / statistics.median(took):.3f}",
            "peak MB": round(bytes_of[name] / 1e6),
            "of one at a time": f"{bytes_of[name] / bytes_of['in turn']:.3f}",
        }
        for name, took in seconds.items()
    ]


class Runs:
    """The jobs, and the two ways to train them."""

    def __init__(self, model: Any, tokenizer: Any, rows: Path, folder: Path) -> None:
        self.model, self.tokenizer, self.rows, self.folder, self.number = model, tokenizer, rows, folder, 0

    def jobs(self, count: int) -> dict[str, Job]:
        """Adapters of several ranks and learning rates, each in a folder that was not there before."""
        self.number += 1
        found = {}
        for one in range(count):
            output = str(self.folder / f"{self.number}-{one}")
            fields: dict[str, Any] = {"max_steps": STEPS, "batch_size": 32, "checkpoint_every": 1000, "seed": one}
            config = gs.TrainConfig(data=str(self.rows), output=output, lr=1e-4 * (one + 1), **fields)
            found[f"job{one}"] = Job(gs.LoRA(r=RANKS[one % len(RANKS)]), config)
        return found

    def at_once(self, count: int) -> Mapping[str, Run]:
        """All of them by `train_many`."""
        return self.many(self.jobs(count))

    def many(self, jobs: Mapping[str, Job]) -> Mapping[str, Run]:
        """Jobs by `train_many`; the model is then as it was."""
        runs = gs.train_many(self.model, self.tokenizer, jobs, progress=Silent())
        assert not runs.failed, runs.failed
        gs.detach(self.model)
        return runs

    def in_turn(self, count: int) -> Mapping[str, Run]:
        """Each by `train`."""
        done = {}
        for name, job in self.jobs(count).items():
            gs.attach(self.model, job.method, seed=job.config.train.seed)
            done[name] = train(self.model, self.tokenizer, job.config, progress=Silent())
            gs.detach(self.model)
        return done

    def peak(self, how: str) -> int:
        """The most bytes of tensors that are there at once, the base among them; in turn, of whichever has most."""
        jobs = self.jobs(COUNT)
        found = []
        for some in [jobs] if how == "at once" else [{name: job} for name, job in jobs.items()]:
            gc.collect()
            with LiveBytes([*self.model.parameters(), *self.model.buffers()]) as live:
                self.many(some)
            found.append(live.peak)
        return max(found)


def _check(some: Mapping[str, Run], others: Mapping[str, Run]) -> None:
    """Before anything is timed: the same losses, and adapters that differ by rounding."""
    for name, run in some.items():
        assert run.report["tokens"] == others[name].report["tokens"]
        mine, theirs = (one.adapter.named_tensors() for one in (run, others[name]))
        for key, value in mine.items():
            assert torch.linalg.norm(value - theirs[key]) <= 2e-2 * torch.linalg.norm(theirs[key]), (name, key)
            assert value.isfinite().all()


if __name__ == "__main__":
    report("together", "What do eight adapters cost that are trained on one base at once?", measure)
