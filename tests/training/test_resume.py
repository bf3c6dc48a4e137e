"""A run that was stopped, however rudely, and resumed ends bit for bit as one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from gossamer.errors import CheckpointError, Interrupted, StateError
from gossamer.training.config import FIXED_ON_RESUME, FREE_ON_RESUME, SPLITS_ON_RESUME, LoopConfig
from gossamer.training.runs.outcome import RunFolder, open_run
from tests.training.toy_run import Watcher, curve, fingerprint, metrics_of, toy_config, toy_model, toy_train, write_rows


class Killed(BaseException):
    """The process is gone; nothing may handle this."""


def at(step: int, action) -> Watcher:
    return Watcher(lambda now: action() if now == step else None)


def kill() -> None:
    raise Killed


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    return toy_train(toy_config(folder)).output


@pytest.mark.parametrize("step", [1, 3, 4, 5, 8])
def test_killed_and_resumed(tmp_path: Path, uninterrupted: Path, step: int) -> None:
    config = toy_config(tmp_path)
    with pytest.raises(Killed):
        toy_train(config, progress=at(step, kill))
    assert not (tmp_path / "run" / "adapter").exists()
    run = toy_train(config, resume=True)
    assert fingerprint(run.output) == fingerprint(uninterrupted)
    assert curve(run.output) == curve(uninterrupted)


def test_killed_again_and_again(tmp_path: Path, uninterrupted: Path) -> None:
    config = toy_config(tmp_path, checkpoint_every=1)
    for step in range(1, 9):
        with pytest.raises(Killed):
            toy_train(config, resume=step > 1, progress=at(step + 1 if step < 8 else 8, kill))
    run = toy_train(config, resume=True)
    assert fingerprint(run.output) == fingerprint(uninterrupted)
    assert curve(run.output) == curve(uninterrupted)


SCRIPT = """
import os, signal, sys
from pathlib import Path
from tests.training.toy_run import Watcher, toy_config, toy_train

def die():
    os.kill(os.getpid(), signal.SIGKILL)

folder, point, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
if point == "step":
    watcher = Watcher(lambda step: die() if step == count else None)
else:  # the n-th call of a function that the saver needs
    watcher, calls, real = Watcher(), [], getattr(os, point)
    def counted(*arguments, **named):
        calls.append(point)
        return die() if len(calls) == count else real(*arguments, **named)
    setattr(os, point, counted)
toy_train(toy_config(folder), progress=watcher)
"""


@pytest.mark.parametrize(("point", "count"), [("step", 5), ("fsync", 15)])
def test_kill_minus_9(tmp_path: Path, uninterrupted: Path, point: str, count: int) -> None:
    config = toy_config(tmp_path)
    place = {"PYTHONPATH": os.pathsep.join(["src", "."]), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), point, str(count)]
    died = subprocess.run(
        command, env=os.environ | place, cwd=Path(__file__).parents[2], capture_output=True, check=False
    )
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    watcher = Watcher()
    run = toy_train(config, resume=True, progress=watcher)
    assert "resuming after step" in watcher.text
    assert fingerprint(run.output) == fingerprint(uninterrupted)
    assert curve(run.output) == curve(uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_at_the_next_step_with_a_checkpoint(
    tmp_path: Path, uninterrupted: Path, number: signal.Signals
) -> None:
    config, handlers = toy_config(tmp_path), [signal.getsignal(one) for one in signal.Signals if one.name != "SIGRTMIN"]
    with pytest.raises(Interrupted) as caught:
        toy_train(config, progress=at(4, lambda: os.kill(os.getpid(), number)))
    assert caught.value.exit_code == 75
    assert f"{number.name} after step 4 of 8" in str(caught.value)
    assert (tmp_path / "run" / "checkpoints" / "step-4").is_dir()
    assert handlers == [signal.getsignal(one) for one in signal.Signals if one.name != "SIGRTMIN"]
    watcher = Watcher()
    run = toy_train(config, resume=True, progress=watcher)
    assert "resuming after step 4 of 8" in watcher.text
    assert fingerprint(run.output) == fingerprint(uninterrupted)


def test_a_second_signal_stops_at_once(tmp_path: Path, uninterrupted: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    config = toy_config(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        toy_train(config, progress=at(4, twice))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert fingerprint(toy_train(config, resume=True).output) == fingerprint(uninterrupted)


def test_stopped_before_the_first_step(tmp_path: Path) -> None:
    class Early(Watcher):
        def step(self, **metrics: float) -> None:
            if self.what == "evaluating before training":
                os.kill(os.getpid(), signal.SIGTERM)

    rows = write_rows(tmp_path / "rows.jsonl")
    config = toy_config(tmp_path, data={"train": rows, "eval": rows})
    with pytest.raises(Interrupted, match="before the first step"):
        toy_train(config, progress=Early())
    assert toy_train(config, resume=True).report["eval_before"]["loss"] > 0


def test_outside_the_main_thread_it_trains_all_the_same(tmp_path: Path) -> None:
    done: list[Path] = []
    thread = threading.Thread(target=lambda: done.append(toy_train(toy_config(tmp_path, max_steps=1)).output))
    thread.start()
    thread.join()
    assert done


def test_what_was_measured_before_is_remembered(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    config = toy_config(tmp_path, data={"train": rows, "eval": rows}, task="classify")
    with pytest.raises(Killed):
        toy_train(config, progress=at(5, kill))
    watcher = Watcher()
    resumed = toy_train(config, resume=True, progress=watcher)
    assert "before training" not in watcher.text
    whole = toy_train(config.replace(output=str(tmp_path / "whole")))
    for field in ("eval_before", "eval_after", "examples", "adapter_digest", "tokens", "steps"):
        assert resumed.report[field] == whole.report[field]


def test_resuming_a_finished_run_gives_the_same_again(tmp_path: Path) -> None:
    config = toy_config(tmp_path)
    first = toy_train(config)
    again = toy_train(config, resume=True)
    assert again.adapter == first.adapter
    assert curve(again.output) == curve(first.output)


def test_another_config_method_or_data_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    config = toy_config(tmp_path)
    with pytest.raises(Killed):
        toy_train(config, progress=at(5, kill))
    before = fingerprint_all(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"train\.lr: 0.01 then, 0.02 now"):
        toy_train(config.replace(lr=0.02), resume=True)
    with pytest.raises(CheckpointError, match=r"train\.epochs: 2 then, 3 now"):
        toy_train(config.replace(epochs=3), resume=True)
    with pytest.raises(CheckpointError, match=r"method\.r: 2 then, 3 now"):
        toy_train(config, resume=True, model=toy_model(r=3))
    other = write_rows(tmp_path / "other.jsonl", 23)
    with pytest.raises(CheckpointError, match=r"data\.train: [0-9a-f]{64} then"):
        toy_train(config.replace(data=other), resume=True)
    assert fingerprint_all(tmp_path / "run") == before
    toy_train(config.replace(log_every=2, checkpoint_every=2, keep_checkpoints=5), resume=True)


def fingerprint_all(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run to resume"):
        toy_train(toy_config(tmp_path), resume=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "diary.txt").write_text("not a run")
    with pytest.raises(CheckpointError, match="no run to resume"):
        toy_train(toy_config(tmp_path), resume=True)
    with pytest.raises(StateError, match="not empty"):
        toy_train(toy_config(tmp_path))


def test_two_at_once(tmp_path: Path) -> None:
    with open_run(tmp_path / "run"), pytest.raises(StateError, match="another process"):
        toy_train(toy_config(tmp_path))
    assert not (tmp_path / "run").exists(), "an empty folder that this made is not left behind"


def test_a_torn_line_of_the_log_is_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        folder.log({"step": step, "loss": 1.0})
    with open(folder.metrics, "a") as file:
        file.write('{"step": 4, "lo')
    folder.forget_after(2)
    assert [one["step"] for one in metrics_of(tmp_path)] == [1, 2]


def test_every_setting_is_declared_free_or_fixed() -> None:
    """A new one must say which, or this fails."""
    assert not FREE_ON_RESUME & FIXED_ON_RESUME
    assert {*LoopConfig.model_fields, "data", "task", "output"} == FREE_ON_RESUME | FIXED_ON_RESUME
    assert SPLITS_ON_RESUME < FREE_ON_RESUME


OTHERWISE = {
    "micro_batch_tokens": 16,
    "packing": False,
    "eval_batch_size": 2,
    "checkpointing": "on",
    "log_every": 2,
    "checkpoint_every": 1,
    "keep_checkpoints": 5,
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_resumed_with_a_free_setting_changed(tmp_path: Path, uninterrupted: Path, name: str) -> None:
    """What our own hints offer when a run has stopped must not make the run another one."""
    with pytest.raises(Killed):
        toy_train(toy_config(tmp_path), model=toy_model(dropout=0.0), progress=at(4, kill))
    watcher = Watcher()
    changed = toy_config(tmp_path, **{name: OTHERWISE[name]})
    run = toy_train(changed, model=toy_model(dropout=0.0), resume=True, progress=watcher)
    assert run.report["steps"] == 8
    assert (f"{name} was" in watcher.text and "but for rounding" in watcher.text) == (name in SPLITS_ON_RESUME)


@pytest.mark.parametrize("change", [{"lr": 0.02}, {"batch_size": 4}, {"weight_decay": 0.1}, {"clip": None}])
def test_resumed_with_a_fixed_setting_changed(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(Killed):
        toy_train(toy_config(tmp_path), progress=at(4, kill))
    with pytest.raises(CheckpointError, match=next(iter(change))):
        toy_train(toy_config(tmp_path, **change), resume=True)


def test_the_copy_of_the_config_is_gone(tmp_path: Path, uninterrupted: Path) -> None:
    """The checkpoints hold all that is needed."""
    with pytest.raises(Killed):
        toy_train(toy_config(tmp_path), progress=at(4, kill))
    (tmp_path / "run" / "config.yaml").unlink()
    run = toy_train(toy_config(tmp_path), resume=True)
    assert fingerprint(run.output) == fingerprint(uninterrupted)
    assert (run.output / "config.yaml").exists()
