"""What can be found out without the base is found out before gigabytes of it are loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gossamer.cli import main
from gossamer.errors import DataError, GossamerError
from gossamer.progress import Silent
from gossamer.spec import write_yaml
from gossamer.training import RunConfig, runs
from gossamer.training.many import sweep
from gossamer.training.runs.outcome import peak_memory
from tests.training.toy_run import toy_config, toy_train, write_rows


class Loaded(Exception):
    """The base would be loaded now."""


@pytest.fixture
def no_base(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise Loaded

    monkeypatch.setattr(runs, "load_base", load)
    monkeypatch.setattr(sweep, "load_base", load)
    monkeypatch.setattr("gossamer.models.load_base", load)


def faulty(folder: Path, fault: str) -> tuple[dict[str, Any], bool]:
    """A config with one fault, and whether it is to be resumed."""
    rows = write_rows(folder / "rows.jsonl")
    fields: dict[str, Any] = {"base": "b", "data": {"train": str(rows)}, "output": str(folder / "run")}
    if fault == "output in use":
        (folder / "run").mkdir()
        (folder / "run" / "x").write_text("x")
    elif fault == "output is a file":
        (folder / "run").write_text("x")
    elif fault == "no training file":
        fields["data"] = {"train": str(folder / "no.jsonl")}
    elif fault == "no held-out file":
        fields["data"] = {"train": str(rows), "eval": str(folder / "no.jsonl")}
    elif fault == "not a format":
        (folder / "odd.jsonl").write_text('{"a": 1}\n')
        fields["data"] = {"train": str(folder / "odd.jsonl")}
    elif fault == "resumed but never begun":
        return fields, True
    return fields, False


FAULTS = ("output in use", "output is a file", "no training file", "no held-out file", "not a format")


@pytest.mark.parametrize("fault", [*FAULTS, "resumed but never begun"])
def test_a_run(no_base: None, tmp_path: Path, fault: str):
    fields, resume = faulty(tmp_path, fault)
    with pytest.raises(GossamerError):
        runs.run(RunConfig.from_dict(fields), resume=resume, progress=Silent())


def test_a_run_without_fault_goes_on_to_the_base(no_base: None, tmp_path: Path):
    with pytest.raises(Loaded):
        runs.run(RunConfig.from_dict(faulty(tmp_path, "none")[0]), progress=Silent())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fault", ["no training file", "no held-out file", "not a format"])
def test_a_rehearsal(no_base: None, tmp_path: Path, fault: str):
    with pytest.raises(GossamerError):
        runs.rehearse(RunConfig.from_dict(faulty(tmp_path, fault)[0]))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_sweep(no_base: None, tmp_path: Path, fault: str):
    fields, grid = faulty(tmp_path, fault)[0], tmp_path / "grid.yaml"
    (tmp_path / "run.yaml").write_text(write_yaml(fields))
    grid.write_text("method.r: [2, 4]\n")
    plan = sweep.read_sweep(tmp_path / "run.yaml", grid)
    with pytest.raises(GossamerError):
        sweep.run_plan(plan, progress=Silent())
    if "output" not in fault:
        with pytest.raises(GossamerError):
            sweep.rehearse_plan(plan, Silent())
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("good", [0, 1])
def test_a_fleet_goes_on_while_one_data_set_can_be_read(no_base: None, tmp_path: Path, good: int):
    (tmp_path / "run.yaml").write_text(write_yaml(faulty(tmp_path, "none")[0]))
    (tmp_path / "sets").mkdir()
    for name in ("a", "b"):
        (tmp_path / "sets" / f"{name}.jsonl").write_text('{"a": 1}\n')
    if good:
        write_rows(tmp_path / "sets" / "c.jsonl")
    plan = sweep.read_fleet(tmp_path / "run.yaml", tmp_path / "sets")
    with pytest.raises(Loaded if good else DataError):
        sweep.rehearse_plan(plan, Silent())


def test_an_evaluation(no_base: None, tmp_path: Path):
    assert main(["eval", "--base", "b", "--data", str(tmp_path / "no.jsonl")]) == 2


def test_a_system_without_an_account_of_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory(torch.device("cpu"))[0] is None
    report = toy_train(toy_config(tmp_path, max_steps=1, epochs=None)).report
    assert report["peak_memory_bytes"] is None
    assert (tmp_path / "run" / "report.html").exists()


def test_the_picture_of_the_loss_shows_the_held_out_one(tmp_path: Path):
    rows = write_rows(tmp_path / "rows.jsonl")
    toy_train(toy_config(tmp_path, data={"train": rows, "eval": rows}, max_steps=2, epochs=None))
    assert "held out: 2 points" in (tmp_path / "run" / "report.html").read_text()
