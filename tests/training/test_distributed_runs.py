"""`train` itself on two processes: the adapter of one, one folder, one report; stopped, resumed, and sharded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import gossamer as gs
from gossamer.adapter import Adapter
from gossamer.errors import Interrupted, UnsupportedError
from gossamer.models import tiny, tiny_tokenizer
from gossamer.training import Job, train, train_many
from gossamer.training.spread.sharding import shard
from gossamer.training.spread.world import World
from tests.training.test_distributed import distance
from tests.training.toy_run import LABELS, Watcher, toy_config, write_rows
from tests.training.worlds import in_world

FIELDS: dict[str, Any] = {"lr": 1e-3, "max_steps": 5, "epochs": None, "checkpoint_every": 2}


def config_in(folder: Path, name: str) -> Any:
    rows = folder / "rows.jsonl"
    data = {"train": str(rows if rows.exists() else write_rows(rows)), "eval": str(folder / "others.jsonl")}
    return toy_config(folder, data=data, output=folder / name, task="classify", **FIELDS)


def run(world: World, folder: Path, name: str, sharded: bool = False, stop_after: int = 0, resume: bool = False) -> Any:
    model: Any = tiny("llama")
    gs.attach(model, gs.LoRA(r=2), seed=3)
    if sharded:
        shard(model, world)

    def look(step: int) -> None:
        if step == stop_after:
            raise_signal()

    watcher = Watcher(look if world.leads else None)
    try:
        done = train(model, tiny_tokenizer(), config_in(folder, name), resume=resume, progress=watcher, world=world)
    except Interrupted as stopped:
        return str(stopped)
    return done.adapter.named_tensors(), done.report["processes"], watcher.text


def raise_signal() -> None:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("runs")
    write_rows(place / "rows.jsonl")
    write_rows(place / "others.jsonl", 6, LABELS)
    return place


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, torch.Tensor]:
    return run(World(), folder, "alone")[0]


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_train_the_adapter_of_one(folder: Path, alone: dict[str, torch.Tensor], sharded: bool) -> None:
    name = f"two-{sharded}"
    (first, processes, said), (second, _, silent) = in_world(2, run, folder, name, sharded)
    assert distance(alone, first) < 1e-4
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert processes == 2
    assert "packing: on" in said
    assert not silent
    report = json.loads((folder / name / "report.json").read_text())
    known = json.loads((folder / "alone" / "report.json").read_text())
    assert report["tokens"] == known["tokens"]
    assert report["eval_before"]["loss"] == pytest.approx(known["eval_before"]["loss"], rel=1e-4)
    saved = Adapter.load(folder / name / "adapter").named_tensors()
    assert all(torch.equal(saved[key], first[key]) for key in first)


def test_stopped_and_resumed_on_two_processes_is_uninterrupted_bit_for_bit(folder: Path) -> None:
    whole = in_world(2, run, folder, "whole")
    stopped = in_world(2, run, folder, "halves", False, 3)
    assert all("stopped by SIGINT after step 3 of 5" in one for one in stopped)
    resumed = in_world(2, run, folder, "halves", False, 0, True)
    for (before, *_), (after, *_) in zip(whole, resumed, strict=True):
        assert all(torch.equal(before[key], after[key]) for key in before)


def merged_in_parts(world: World) -> str:
    model: Any = tiny("llama")
    gs.attach(model, gs.LoRA(r=2))
    shard(model, world)
    try:
        gs.merge(model)
    except UnsupportedError as error:
        return str(error)
    return ""


def test_weights_in_parts_are_not_merged() -> None:
    assert all("spread over several processes" in said for said in in_world(2, merged_in_parts))


def several(world: World, folder: Path, place: str) -> Any:
    """Three jobs, of which one has no rows."""
    model: Any = tiny("llama")
    made = {}
    for name, rank in {"wide": 4, "none": 2, "small": 2}.items():
        config = config_in(folder, f"{place}/{name}")
        absent = {"data": {"train": str(folder / "absent.jsonl")}, "task": "sft"}
        made[name] = Job(gs.LoRA(r=rank), config.replace(**absent) if name == "none" else config)
    watcher = Watcher()
    runs = train_many(model, tiny_tokenizer(), made, progress=watcher, world=world)
    found = {name: (run.adapter.named_tensors(), run.report["processes"]) for name, run in runs.items()}
    return found, {name: error.code for name, error in runs.failed.items()}, watcher.text


def test_two_processes_train_many_as_one_does(folder: Path) -> None:
    known, *_ = several(World(), folder, "many-alone")
    (first, failed, said), (second, failed_there, silent) = in_world(2, several, folder, "many-two")
    assert [*first] == [*second] == ["wide", "small"]
    assert failed == failed_there == {"none": "data-invalid"}
    assert "wide: after training" in said
    assert not silent
    for name, (tensors, processes) in first.items():
        assert processes == 2
        assert distance(known[name][0], tensors) < 1e-4
        assert all(torch.equal(tensors[key], second[name][0][key]) for key in tensors)
        saved = Adapter.load(folder / "many-two" / name / "adapter").named_tensors()
        assert all(torch.equal(saved[key], tensors[key]) for key in saved)


def sharded_many(world: World, folder: Path) -> Any:
    config = config_in(folder, "many-sharded").replace(shard="all")
    return train_many(tiny("llama"), tiny_tokenizer(), {"one": Job(gs.LoRA(r=2), config)}, world=world)  # pyright: ignore[reportArgumentType]


def test_many_on_a_base_to_be_sharded_are_refused(folder: Path) -> None:
    for failure in in_world(2, sharded_many, folder):
        assert (failure.kind, "cannot be sharded" in failure.text) == ("UnsupportedError", True)
    assert not (folder / "many-sharded").exists()
