"""Early stopping: the run ends when it should, with the factors of its best evaluation, resumed or not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

import gossamer as gs
from gossamer.errors import SpecError
from gossamer.models import tiny, tiny_tokenizer
from gossamer.training import train_many
from gossamer.training.many.many import Job
from gossamer.training.stopping import Stopping
from tests.training.toy_run import LABELS, Watcher, fingerprint, metrics_of, toy_config, toy_train, write_rows


def impatient(folder: Path, **fields: Any) -> Any:
    """Held-out rows that contradict the training rows: the longer it learns, the worse they get."""
    folder.mkdir(exist_ok=True)
    rows = write_rows(folder / "rows.jsonl", labels=LABELS[:1])
    others = write_rows(folder / "others.jsonl", 9, LABELS[1:])
    settings = {"data": {"train": rows, "eval": others}, "schedule": "constant", "warmup": 0, "keep_checkpoints": 1}
    settings |= {"eval_every": 2, "patience": 2, "epochs": 9, "lr": 0.05}
    return toy_config(folder, **settings | fields)


def test_it_ends_with_the_factors_of_the_best(tmp_path: Path) -> None:
    watcher = Watcher()
    run = toy_train(impatient(tmp_path / "a"), progress=watcher)
    measured = {one["step"]: one["eval_loss"] for one in metrics_of(run.output) if "eval_loss" in one}
    best = min(measured, key=measured.__getitem__)
    assert [*measured] == [*range(2, best + 5, 2)], "two evaluations that were no better, and then no more"
    assert run.report["steps"] == best + 4 < 36
    assert run.report["best_step"] == best
    assert run.report["eval_after"]["loss"] == measured[best]
    assert f"stopping after step {best + 4}" in watcher.text
    assert f"going back to step {best}" in watcher.text
    alone = toy_train(impatient(tmp_path / "b", patience=None, eval_every=None, max_steps=best))
    assert run.adapter.digest == alone.adapter.digest


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5])
def test_a_resumed_run_ends_the_same(tmp_path: Path, at: int) -> None:
    class Killed(BaseException):
        pass

    def kill(step: int) -> None:
        if step == at:
            raise Killed

    whole = toy_train(impatient(tmp_path / "whole"))
    config = impatient(tmp_path / "cut", checkpoint_every=1)
    with pytest.raises(Killed):
        toy_train(config, progress=Watcher(kill))
    run = toy_train(config, resume=True)
    assert run.adapter.digest == whole.adapter.digest
    assert [one for one in metrics_of(run.output) if "eval_loss" in one] == [
        one for one in metrics_of(whole.output) if "eval_loss" in one
    ]
    files = fingerprint(run.output)
    assert fingerprint(toy_train(config, resume=True).output) == files, "a finished run is finished"


def test_each_of_many_stops_by_itself(tmp_path: Path) -> None:
    configs = {"early": impatient(tmp_path / "early"), "late": impatient(tmp_path / "late", lr=1e-4, epochs=4)}
    method = gs.LoRA(r=2, dropout=0.1)
    runs = train_many(
        tiny("llama"), tiny_tokenizer(), {name: Job(method, one) for name, one in configs.items()}, progress=Watcher()
    )
    assert not runs.failed
    assert runs["early"].report["steps"] < runs["late"].report["steps"]
    assert "best_step" in runs["late"].report


def test_patience_needs_something_to_look_at(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="patience needs eval_every"):
        toy_config(tmp_path, patience=1)


def test_what_counts_as_better() -> None:
    seen = Stopping(2)
    assert [seen.see(step, loss) for step, loss in enumerate((3.0, 3.0, 2.0, math.nan, 2.5), 1)] == [
        True, False, True, False, False,
    ]  # fmt: skip
    assert (seen.over, seen.best_step, Stopping(**seen.state())) == (True, 3, seen)
    assert not Stopping(None).see(1, 1.0)
