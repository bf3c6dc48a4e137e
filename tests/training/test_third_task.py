"""A task that somebody else wrote, in sixty lines: all that runs can do, they do with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import gossamer as gs
from gossamer.cli import main
from gossamer.errors import DataError, SpecError, UnsupportedError
from gossamer.models import tiny, tiny_tokenizer, write_model_folder
from gossamer.training import RunConfig
from gossamer.training.many import sweep
from gossamer.training.tasks import TASKS
from tests.training import regression_task
from tests.training.test_resume import Killed, at, kill
from tests.training.toy_run import Watcher, curve, fingerprint, toy_config, toy_train, write_rows

LINES = 60
REGISTERED = TASKS.pop("regression")  # for the tests of this file alone


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(TASKS, "regression", REGISTERED)
    write_model_folder(tiny("llama_classifier", num_labels=1), tiny_tokenizer(), tmp_path / "base")
    write_rows(tmp_path / "stars.jsonl", 14, ["1.5", "3", "4.25"])
    return tmp_path


def config(folder: Path, name: str = "run", **fields: Any) -> Any:
    (folder / name).mkdir(exist_ok=True)
    data = {"train": folder / "stars.jsonl", "eval": folder / "stars.jsonl"}
    return toy_config(folder / name, **{"data": data, "task": "regression", "epochs": 3, "eval_every": 4, **fields})


def model() -> Any:
    made = tiny("llama_classifier", num_labels=1)
    gs.attach(made, gs.LoRA(r=2, dropout=0.1), seed=3)
    return made


def run_yaml(folder: Path, **fields: Any) -> Path:
    data = {"train": str(folder / "stars.jsonl"), "eval": str(folder / "stars.jsonl")}
    train = {"epochs": 2, "batch_size": 4, "lr": 0.01}
    whole = {
        "base": str(folder / "base"),
        "task": "regression",
        "data": data,
        "train": train,
        "output": str(folder / "out"),
    }
    (folder / "run.yaml").write_text(json.dumps(whole | fields))
    return folder / "run.yaml"


def test_it_is_short() -> None:
    assert len(Path(regression_task.__file__).read_text().splitlines()) <= LINES


def test_it_trains_and_its_measure_is_reported(folder: Path) -> None:
    watcher = Watcher()
    run = toy_train(config(folder), model=model(), progress=watcher)
    before, after = run.report["eval_before"], run.report["eval_after"]
    assert before["loss"] > after["loss"]
    assert run.report["task"] == before["task"] == "regression"
    assert "after training: error" in watcher.text
    page = (run.output / "report.html").read_text()
    assert "error" in page
    assert "squared stars" in page
    assert RunConfig.read(run.output / "config.yaml").task == regression_task.Regression()
    assert gs.evaluate(model(), tiny_tokenizer(), folder / "stars.jsonl", task="regression")["rows"] == 14


def test_it_resumes_bit_for_bit(folder: Path) -> None:
    whole = toy_train(config(folder, "whole"), model=model())
    with pytest.raises(Killed):
        toy_train(config(folder, "parts"), model=model(), progress=at(5, kill))
    parts = toy_train(config(folder, "parts"), model=model(), resume=True)
    assert fingerprint(whole.output) == fingerprint(parts.output)
    assert curve(whole.output) == curve(parts.output)


def test_it_sweeps_and_the_best_is_by_its_measure(folder: Path) -> None:
    (folder / "grid.yaml").write_text("method.r: [2]\ntrain.lr: [1e-6, 0.02]\n")
    plan = sweep.read_sweep(run_yaml(folder), folder / "grid.yaml")
    result = sweep.run_plan(plan, progress=Watcher())
    assert result["metric"] == "error"
    assert result["best"] == "r2-lr0_02"
    assert "Held-out error" in (folder / "out" / "sweep.html").read_text()


def test_it_plans_and_rehearses(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(run_yaml(folder)), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trainable"] > 0
    (folder / "grid.yaml").write_text("method.r: [2]\n")
    rows = sweep.rehearse_plan(sweep.read_sweep(run_yaml(folder), folder / "grid.yaml"), Watcher())
    assert [row["steps"] for row in rows] == [8]


def test_what_does_not_fit_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    causal = tiny("llama")
    gs.attach(causal, gs.LoRA(r=2))
    with pytest.raises(UnsupportedError, match="a head of one number"):
        toy_train(config(folder), model=causal)
    chats = folder / "chats.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "2"}]
    chats.write_text(json.dumps({"messages": turns}) + "\n")
    with pytest.raises(DataError, match="rows of this shape"):
        toy_train(config(folder, data=chats, eval_every=None), model=model())
    with pytest.raises(SpecError, match="did you mean 'regression'"):
        config(folder, task="regresion")
    with pytest.raises(SpecError, match="unknown key"):
        config(folder, task={"name": "regression", "stars": 5})


def test_a_batch_that_cannot_be_split_is_refused_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regression_task.Regression, "additive", False)
    whole = toy_train(config(folder, "whole"), model=model())
    assert whole.report["steps"] == 9
    with pytest.raises(UnsupportedError, match="a batch of the task regression cannot be split"):
        toy_train(config(folder, "parts", micro_batch_tokens=20), model=model())
