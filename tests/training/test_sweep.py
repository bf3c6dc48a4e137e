"""A sweep's settings and a fleet's data sets: read strictly, trained on one base, reported on one page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import gossamer as gs
from gossamer.cli import main
from gossamer.errors import CheckpointError, DataError, SpecError, StateError
from gossamer.models import tiny, tiny_tokenizer, write_model_folder
from gossamer.training.many import sweep
from gossamer.training.spread.world import World
from tests.training.toy_run import Watcher, curve, fingerprint, write_rows
from tests.training.worlds import in_world

CONFIG = """\
base: {folder}/base
method: {{name: lora, r: 2, dropout: 0.1}}
task: classify
data: {{train: {folder}/rows.jsonl, eval: {folder}/rows.jsonl}}
train: {{epochs: 4, batch_size: 6, lr: 1e-2}}
output: {folder}/out
"""
GRID = "method.r: [2, 4]\ntrain.lr: [1e-5, 3e-2]\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A toy base, rows, a config and a grid of four settings, two of which learn nothing."""
    write_model_folder(tiny("llama"), tiny_tokenizer(), tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", 12)
    (tmp_path / "run.yaml").write_text(CONFIG.format(folder=tmp_path))
    (tmp_path / "grid.yaml").write_text(GRID)
    return tmp_path


def grid(folder: Path, text: str, *overrides: str) -> sweep.SweepPlan:
    (folder / "grid.yaml").write_text(text)
    return sweep.read_sweep(folder / "run.yaml", folder / "grid.yaml", overrides)


def test_the_grid(folder: Path) -> None:
    plan = grid(folder, GRID + "method.target_modules: [[q_proj, v_proj], all-linear]\n", "--train.epochs", "2")
    assert [one.name for one in plan.settings][:3] == [
        "r2-lr1e-5-target_modules_q_proj_v_proj", "r2-lr1e-5-target_modules_all-linear",
        "r2-lr0_03-target_modules_q_proj_v_proj",
    ]  # fmt: skip
    assert len({one.name for one in plan.settings}) == len({one.config.output for one in plan.settings}) == 8
    last = plan.settings[-1]
    assert last.own == {"method.r": 4, "train.lr": 0.03, "method.target_modules": "all-linear"}
    assert last.config.method == gs.LoRA(r=4, dropout=0.1, target_modules="all-linear")
    assert (last.config.train.lr, last.config.train.epochs) == (0.03, 2)
    assert last.config.output == str(folder / "out" / last.name)


def test_methods_can_be_swept_and_equal_names_are_told_apart(folder: Path) -> None:
    plan = grid(folder, "method.name: [lora, dora]\ntrain.lr: [auto, 0.1, 0.10]\n")
    assert [one.name for one in plan.settings][:3] == ["name_lora-lr_auto", "name_lora-lr0_1", "name_lora-lr0_1-2"]
    assert isinstance(plan.settings[-1].config.method, gs.DoRA)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train.lrr: [1, 2]", ["grid.yaml:1:1: train.lrr: unknown key; did you mean 'lr'"]),
        ("method.r: [2]\nmethod.rr: [1]", ["grid.yaml:2:", "did you mean 'r'"]),
        ("method.r: [2, two]", ["grid.yaml:1:1: method.r: ", "got 'two'"]),
        ("trian.lr: [1]", ["grid.yaml:1:1", "did you mean 'train'?"]),
        ("base: [a, b]", ["grid.yaml:1:1: base", "method.* and train.*"]),
        ("method.r: 4", ["grid.yaml:1:1: method.r: must be a list"]),
        ("method.r: []", ["must be a list"]),
        ("{}", ["no settings"]),
        ("train.seed: [" + "1, " * 1001 + "]", ["1001 settings; expected 1 to 1,000"]),
        ("method.r: [2]\ntrain.lr: [0, -1]\ntrian.x: [1]\nbase: 3", ["4:1: base", "3:1: trian.x"]),
        ("train.lr: [0, -1]", ["1:1: train.lr", "got 0", "got -1"]),
    ],
)
def test_grids_that_cannot_be_meant(folder: Path, text: str, words: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        grid(folder, text)
    for word in words:
        assert word in str(caught.value)
    assert len(set(caught.value.faults)) == len(caught.value.faults)


def test_faults_of_the_config_and_of_flags_are_told_too(folder: Path) -> None:
    with pytest.raises(SpecError) as caught:
        grid(folder, "method.rr: [1]", "--train.epoks", "3")
    assert "--train.epoks: train.epoks: unknown key; did you mean 'epochs'" in str(caught.value)
    assert "grid.yaml:1:1: method.rr" in str(caught.value)


def test_a_sweep_by_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", str(folder / "run.yaml"), "--sweep", str(folder / "grid.yaml")]
    assert main([*words, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "r4-lr1e-5" in told
    assert "7,424" in told
    assert not (folder / "out").exists()

    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((folder / "out" / "sweep.json").read_text())
    runs = {run["name"]: run for run in result["runs"]}
    assert [*runs] == ["r2-lr1e-5", "r2-lr0_03", "r4-lr1e-5", "r4-lr0_03"]
    assert result["metric"] == "accuracy"
    assert result["best"] in ("r2-lr0_03", "r4-lr0_03")
    assert result["best"] == sweep.best(result["runs"])
    assert runs["r4-lr0_03"]["settings"] == {"method.r": 4, "train.lr": 0.03}
    assert runs["r4-lr0_03"]["trainable_params"] == 2 * runs["r2-lr0_03"]["trainable_params"]
    assert runs["r2-lr0_03"]["train_loss"] < runs["r2-lr1e-5"]["train_loss"]
    page = (folder / "out" / "sweep.html").read_text()
    for part in (result["best"], "Held-out accuracy by train.lr", "log10 train.lr", "By method.r", "<svg"):
        assert part in page
    assert "http-equiv" not in page
    assert "<script" not in page

    config = gs.RunConfig.read(folder / "out" / "r2-lr0_03" / "config.yaml")
    alone = folder / "alone.yaml"
    alone.write_text(config.replace(output=str(folder / "alone")).to_yaml())
    assert main(["train", str(alone)]) == 0
    assert fingerprint(folder / "alone") == fingerprint(folder / "out" / "r2-lr0_03")
    assert curve(folder / "alone") == curve(folder / "out" / "r2-lr0_03")
    capsys.readouterr()

    assert main(words) == 2, "the folder is in use"
    assert "not empty" in capsys.readouterr().err
    assert main([*words, "--resume"]) == 0
    told = capsys.readouterr().out
    assert f"best by accuracy: {result['best']}" in told
    assert "sweep.html" in told


def test_a_sweep_that_grew_trains_only_what_is_new(folder: Path) -> None:
    first = sweep.run_plan(grid(folder, "method.r: [2]\n"), progress=Watcher())
    watcher = Watcher()
    second = sweep.run_plan(grid(folder, "method.r: [2, 3]\n"), resume=True, progress=watcher)
    assert second["runs"][0] == first["runs"][0]
    assert "r3: before training" in watcher.text
    assert "r2: before training" not in watcher.text


def test_best_is_by_what_was_measured() -> None:
    def row(name: str, **after: float) -> dict[str, Any]:
        return {"name": name, "eval_after": after or None}

    assert sweep.best([row("a", loss=2.0), row("b", loss=1.0), row("c", loss=1.0)]) == "b"
    assert sweep.best([row("a", loss=2.0, accuracy=0.9), row("b", loss=1.0, accuracy=0.8)]) == "a"
    assert sweep.best([row("a", loss=2.0, accuracy=0.9), row("b", loss=1.0, accuracy=0.9), {"name": "c"}]) == "b"
    assert sweep.best([row("a")]) is None


def test_without_held_out_rows_none_is_best_and_a_failure_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "grid.yaml").write_text("method.target_modules: [[q_proj], [q_prj]]\n")
    rows = folder / "rows.jsonl"
    words = ["train", str(folder / "run.yaml"), "--sweep", str(folder / "grid.yaml"), f"--data={rows}"]
    assert main([*words, "--dry-run"]) == 2
    assert "did you mean" not in capsys.readouterr().out
    assert main(words) == 2
    told = capsys.readouterr()
    assert "target_modules_q_prj failed: target-unmatched" in told.err
    assert "best" not in told.out
    result = json.loads((folder / "out" / "sweep.json").read_text())
    assert result["best"] is None
    assert "error" in result["runs"][1]
    assert (folder / "out" / "target_modules_q_proj" / "adapter").exists()
    assert "target-unmatched" in (folder / "out" / "sweep.html").read_text()


def fleet(folder: Path) -> Path:
    """Three data sets, of which one has held-out rows of its own and one is broken."""
    place = folder / "customers"
    (place / "beta").mkdir(parents=True)
    write_rows(place / "alpha.jsonl", 6)
    write_rows(place / "beta" / "train.jsonl", 9)
    write_rows(place / "beta" / "eval.jsonl", 3)
    (place / "gamma & co.jsonl").write_text('{"prompt": \n')
    (place / "README.md").write_text("our customers")
    (place / ".hidden").mkdir()
    return place


def test_a_fleet_by_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = fleet(folder)
    words = ["train", str(folder / "run.yaml"), "--fleet", str(place), "--train.epochs=1"]
    assert main(words) == 2, "one of them failed"
    told = capsys.readouterr()
    assert "gamma_co failed: data-invalid" in told.err
    assert "passing over" in told.err
    assert "README.md" in told.err
    result = json.loads((folder / "out" / "fleet.json").read_text())
    assert [(run["name"], "error" in run) for run in result["runs"]] == [
        ("alpha", False), ("beta", False), ("gamma_co", True),
    ]  # fmt: skip
    assert [run["eval_after"]["rows"] for run in result["runs"][:2]] == [12, 3], (
        "the config's rows where there are none"
    )
    assert (result["metric"], result["best"]) == (None, None)
    assert gs.Adapter.load(folder / "out" / "beta" / "adapter").digest == result["runs"][1]["adapter_digest"]
    assert (folder / "out" / "fleet.html").exists()
    assert main([*words, "--sweep", "x.yaml"]) == 2


def test_a_fleet_needs_no_data_in_the_config(folder: Path) -> None:
    text = "\n".join(line for line in CONFIG.format(folder=folder).splitlines() if not line.startswith("data"))
    (folder / "run.yaml").write_text(text)
    plan = sweep.read_fleet(folder / "run.yaml", fleet(folder))
    found = {one.name: one.config.data.eval for one in plan.settings}
    assert found == {"alpha": None, "beta": str(folder / "customers" / "beta" / "eval.jsonl"), "gamma_co": None}


def test_fleets_that_cannot_be_meant(folder: Path) -> None:
    (folder / "empty").mkdir()
    for place, words in [("empty", "no data set"), ("nowhere", "a fleet is a folder")]:
        with pytest.raises(DataError, match=words):
            sweep.read_fleet(folder / "run.yaml", folder / place)
    write_rows(folder / "empty" / "a b.jsonl")
    write_rows(folder / "empty" / "a_b.jsonl")
    with pytest.raises(DataError, match="two data sets of one name"):
        sweep.read_fleet(folder / "run.yaml", folder / "empty")
    with pytest.raises(CheckpointError, match="no run to resume"):
        sweep.run_plan(grid(folder, GRID), resume=True, progress=Watcher())
    (folder / "out").mkdir()
    (folder / "out" / "diary.txt").write_text("not a sweep")
    with pytest.raises(StateError, match="not empty"):
        sweep.run_plan(grid(folder, GRID), progress=Watcher())


def swept(world: World, folder: Path, output: str) -> dict[str, Any]:
    overrides = ["--output", str(folder / output), "--method.dropout", "0"]  # which every process draws for itself
    plan = sweep.read_sweep(folder / "run.yaml", folder / "grid.yaml", overrides)
    return sweep.run_plan(plan, progress=Watcher())


def test_a_sweep_on_two_processes_is_that_of_one(folder: Path) -> None:
    alone = swept(World(), folder, "alone")
    first, second = in_world(2, swept, folder, "two")
    assert first == second == json.loads((folder / "two" / "sweep.json").read_text())
    assert first["best"] == alone["best"]
    for mine, known in zip(first["runs"], alone["runs"], strict=True):
        assert mine["eval_after"]["loss"] == pytest.approx(known["eval_after"]["loss"], rel=1e-3)
