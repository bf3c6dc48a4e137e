"""Many adapters on one base end as each does alone, stop and go on together, and fail one by one."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import gossamer as gs
from gossamer.errors import CheckpointError, DataError, Interrupted, NonFiniteError, StateError, TargetError, UsageError
from gossamer.models import tiny, tiny_tokenizer
from gossamer.training import Job, Run, RunConfig, Runs, train_many
from tests.training.toy_run import LABELS, Watcher, curve, fingerprint, toy_config, toy_train, write_rows

SAME = {
    "trainable_params",
    "total_params",
    "eval_before",
    "eval_after",
    "adapter_digest",
    "tokens",
    "steps",
    "lr",
    "data",
}


def jobs_in(folder: Path, **fields: Any) -> dict[str, Job]:
    """Three that differ in all that may differ; dropout makes each depend on its own random numbers."""
    folder.mkdir(exist_ok=True)
    rows, others = write_rows(folder / "rows.jsonl"), write_rows(folder / "others.jsonl", 10, LABELS[:2])
    one = {"data": {"train": rows, "eval": others}, "task": "classify", "eval_every": 3, "output": folder / "one"}
    two = {"data": others, "output": folder / "two", "lr": "auto", "schedule": "cosine", "clip": 0.01, "seed": 5}
    six = {"data": rows, "output": folder / "six", "weight_decay": 0.1, "warmup": 2, "max_steps": 5, "batch_size": 4}
    everywhere = gs.LoRA(r=2, dropout=0.1, target_modules="all-linear")
    return {
        "one": Job(everywhere, toy_config(folder, **one | fields)),
        "two": Job(gs.DoRA(r=3, dropout=0.2, target_modules=("q_proj", "v_proj")), toy_config(folder, **two | fields)),
        "six": Job(everywhere.replace(r=6, modules_to_save=("norm",)), toy_config(folder, **six | fields)),
    }


def train_jobs(jobs: Any, *, model: Any = None, progress: Any = None, **options: Any) -> Runs:
    model = tiny("llama") if model is None else model
    return train_many(model, tiny_tokenizer(), jobs, progress=progress or Watcher(), **options)


def alone(job: Job, output: Path) -> Run:
    model = tiny("llama")
    gs.attach(model, job.method, seed=job.config.train.seed)
    return toy_train(job.config.replace(output=str(output)), model=model)


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("alone")
    return {name: alone(job, folder / f"{name}-alone") for name, job in jobs_in(folder).items()}


def assert_equal(runs: Runs, expected: dict[str, Run]) -> None:
    assert [*runs] == [*expected]
    for name, run in expected.items():
        assert fingerprint(runs[name].output) == fingerprint(run.output)
        assert curve(runs[name].output) == curve(run.output)
        assert {field: runs[name].report[field] for field in SAME} == {field: run.report[field] for field in SAME}
        assert runs[name].adapter == run.adapter == gs.Adapter.load(runs[name].output / "adapter")


def test_many_equal_one_by_one_bit_for_bit(tmp_path: Path, one_by_one: dict[str, Run]) -> None:
    random, watcher = torch.get_rng_state(), Watcher()
    model = tiny("llama")
    runs = train_jobs(jobs_in(tmp_path), model=model, progress=watcher)
    assert not runs.failed
    assert_equal(runs, one_by_one)
    assert torch.equal(torch.get_rng_state(), random)
    assert watcher.text.count("24 rows of prompt/completion") == 2, (
        "rows that are evaluated differ from those that are not"
    )
    assert "two: lr auto" in watcher.text
    for run in runs.values():
        assert {"adapter", "checkpoints", "config.yaml", "metrics.jsonl", "report.html", "report.json"} == {
            path.name for path in run.output.iterdir()
        }


def test_one_base_and_small_states(tmp_path: Path) -> None:
    model, largest = tiny("llama"), []
    base = {name: (value.data_ptr(), value.clone()) for name, value in model.named_parameters()}

    def look(_: int) -> None:
        largest.append(sum(parameter.grad is not None for parameter in model.parameters()))

    runs = train_jobs(jobs_in(tmp_path), model=model, progress=Watcher(look))
    assert max(largest) == 0, "one adapter's gradients are gone before the next one's are made"
    assert gs.attached(model) == ("one", "two", "six")
    assert gs.active(model) == ()
    kept = dict(model.named_parameters())
    assert all(kept[name].data_ptr() == place for name, (place, _) in base.items())
    assert all(torch.equal(kept[name], value) for name, (_, value) in base.items())
    adapters = sum(run.report["trainable_params"] for run in runs.values())
    assert sum(value.numel() for value in kept.values()) == adapters + sum(value.numel() for _, value in base.values())
    gs.use(model, "two")
    assert gs.capture(model, "two") == runs["two"].adapter


def grouped_jobs(folder: Path) -> dict[str, Job]:
    """Nothing is drawn at random, so that rows of several may go through the model together."""
    folder.mkdir(exist_ok=True)
    rows, others = write_rows(folder / "rows.jsonl"), write_rows(folder / "others.jsonl", 10, LABELS[:2])
    fields: dict[str, Any] = {"max_steps": 4, "schedule": "constant", "lr": 1e-3}
    specs = {"small": gs.LoRA(r=2), "large": gs.LoRA(r=7, target_modules=("q_proj", "down_proj")), "three": gs.IA3()}
    return {
        name: Job(spec, toy_config(folder, data=data, output=folder / name, batch_size=size, seed=size, **fields))
        for (name, spec), data, size in zip(specs.items(), (rows, others, rows), (2, 3, 4), strict=True)
    }


def test_rows_of_several_adapters_in_one_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gossamer.training import loop

    calls: list[int] = []
    monkeypatch.setattr(
        loop, "joined", lambda batches, kept=loop.joined: (calls.append(len(batches)), kept(batches))[1]
    )
    runs = train_jobs(grouped_jobs(tmp_path), at_once=10_000)
    assert calls == [6] * 4  # two batches of each make a step
    calls.clear()
    apart = train_jobs(grouped_jobs(tmp_path / "apart"), at_once=1)
    assert calls == [1] * 24
    for name, run in runs.items():
        mine, other = curve(run.output), curve(apart[name].output)
        assert len(mine) == 4
        for (_, loss, *_), (_, expected, *_) in zip(mine, other, strict=True):
            assert loss == pytest.approx(expected, rel=1e-4)
        pairs = zip(run.adapter.named_tensors().values(), apart[name].adapter.named_tensors().values(), strict=True)
        assert all((one - two).norm() <= 1e-3 * two.norm() for one, two in pairs)
    assert apart["small"].adapter == alone(grouped_jobs(tmp_path / "apart")["small"], tmp_path / "alone").adapter


def test_what_fails_fails_alone(tmp_path: Path, one_by_one: dict[str, Run]) -> None:
    jobs = jobs_in(tmp_path)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "completion": " b"}\n{"prompt": "a", \n')
    wild = Job(gs.LoRA(r=2), toy_config(tmp_path, output=tmp_path / "wild", lr=1e30, clip=None))
    bad = Job(gs.LoRA(r=2), toy_config(tmp_path, output=tmp_path / "bad", data=broken))
    lost = Job(gs.LoRA(target_modules=("q_prj",)), toy_config(tmp_path, output=tmp_path / "lost"))
    model, watcher = tiny("llama"), Watcher()
    runs = train_jobs({"wild": wild, "bad": bad, **jobs, "lost": lost}, model=model, progress=watcher)
    for name, run in one_by_one.items():
        assert runs[name].adapter == run.adapter
    assert {name: type(error) for name, error in runs.failed.items()} == {
        "bad": DataError, "lost": TargetError, "wild": NonFiniteError,
    }  # fmt: skip
    assert "broken.jsonl:2" in str(runs.failed["bad"])
    assert "wild: non-finite: the loss of step 2" in watcher.text
    assert "bad: data-invalid" in watcher.text
    with pytest.raises(NonFiniteError):
        _ = runs["wild"]
    assert "wild" not in runs
    assert gs.attached(model) == tuple(jobs)
    assert not (tmp_path / "bad").exists()
    assert not (tmp_path / "lost").exists()
    assert json.loads((tmp_path / "wild" / "metrics.jsonl").read_text().splitlines()[-1])["fault"] == "non-finite loss"


def test_a_gradient_that_is_not_finite_fails_alone(tmp_path: Path, one_by_one: dict[str, Run]) -> None:
    jobs, model = jobs_in(tmp_path), tiny("llama")
    odd = Job(gs.LoRA(r=2, dropout=0.5), toy_config(tmp_path, output=tmp_path / "odd"))

    def spoil(step: int) -> None:
        for parameter in gs.trainable_parameters(model, "odd").values() if step == 2 else ():
            parameter.register_hook(lambda gradient: gradient * float("inf"))

    runs = train_jobs({"odd": odd, **jobs}, model=model, progress=Watcher(spoil))
    assert_equal(runs, one_by_one)
    assert "non-finite gradients at model.layers.0" in runs.failed["odd"].got
    assert (tmp_path / "odd" / "checkpoints" / "step-0").exists()


def test_when_all_fail(tmp_path: Path) -> None:
    model = tiny("llama")
    runs = train_jobs({"lost": Job(gs.LoRA(target_modules=("q_prj",)), toy_config(tmp_path))}, model=model)
    assert [*runs.failed] == ["lost"]
    assert not runs
    assert gs.attached(model) == ()


class Stopping(Watcher):
    """Asks for a stop at the n-th sign of progress of some kind."""

    def __init__(self, what: str, count: int) -> None:
        super().__init__()
        self.kind, self.count = what, count

    def step(self, **metrics: float) -> None:
        self.count -= self.kind == self.what.rpartition("evaluating ")[2]
        if self.count == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            self.count = -1


@pytest.mark.parametrize(
    ("what", "count"),
    [("training", 1), ("training", 8), ("training", 15), ("before training", 2), ("after training", 1)],
)
def test_stopped_and_resumed(tmp_path: Path, one_by_one: dict[str, Run], what: str, count: int) -> None:
    jobs, model = jobs_in(tmp_path), tiny("llama")
    with pytest.raises(Interrupted, match=r"SIGTERM with \d of 3 adapters trained"):
        train_jobs(jobs, model=model, progress=Stopping(what, count))
    assert gs.attached(model) == ()
    assert_equal(train_jobs(jobs, model=model, resume=True), one_by_one)


def test_stopped_again_and_again(tmp_path: Path, one_by_one: dict[str, Run]) -> None:
    jobs = jobs_in(tmp_path)
    for attempt in range(30):
        try:
            runs = train_jobs(jobs, progress=Stopping("training", 2), resume=attempt > 0)
        except Interrupted:
            continue
        assert attempt > 5
        assert_equal(runs, one_by_one)
        return
    pytest.fail("never came to an end")


def test_finished_ones_are_not_measured_again(tmp_path: Path) -> None:
    jobs = jobs_in(tmp_path)
    first = train_jobs({"one": jobs["one"]})
    page, watcher = (tmp_path / "one" / "report.html").stat().st_mtime_ns, Watcher()
    again = train_jobs(jobs, resume=True, progress=watcher)
    assert again["one"].report == first["one"].report
    assert again["one"].adapter == first["one"].adapter
    assert (tmp_path / "one" / "report.html").stat().st_mtime_ns == page
    assert "accuracy" not in watcher.text
    assert [*again] == [*jobs]


def test_adapters_that_begin_alike_are_measured_once(tmp_path: Path) -> None:
    job, calls = jobs_in(tmp_path)["one"], []

    class Counting(Watcher):
        def start(self, total: int, what: str) -> None:
            calls.append(what)

    slow, fast = (
        Job(job.method, job.config.replace(lr=lr, output=str(tmp_path / name)))
        for name, lr in (("slow", 1e-4), ("fast", 1e-2))
    )
    other = Job(job.method.replace(r=3), job.config.replace(output=str(tmp_path / "other")))
    runs = train_jobs({"slow": slow, "fast": fast, "other": other}, progress=Counting())
    assert [what for what in calls if "before" in what] == [
        "slow: evaluating before training",
        "other: evaluating before training",
    ]
    assert (
        runs["fast"].report["eval_before"] == runs["slow"].report["eval_before"] == runs["other"].report["eval_before"]
    )
    assert runs["fast"].report["eval_after"] != runs["slow"].report["eval_after"]


def test_beside_adapters_that_are_there_already(tmp_path: Path, one_by_one: dict[str, Run]) -> None:
    model = tiny("llama")
    gs.attach(model, gs.LoRA(r=1), name="old", trainable=False)
    jobs = jobs_in(tmp_path)
    runs = train_jobs({"two": jobs["two"]}, model=model)
    assert_equal(runs, {"two": one_by_one["two"]})
    assert gs.active(model) == ("old",)
    with pytest.raises(StateError, match="already"):
        train_jobs({"old": jobs["six"]}, model=model)
    gs.attach(model, gs.LoRA(r=1), name="learns")
    with pytest.raises(StateError, match="would not be trained"):
        train_jobs({"six": jobs["six"]}, model=model)
    gs.detach(model, "learns")
    gs.detach(model, "two")
    gs.use(model, "old")
    gs.merge(model)
    with pytest.raises(StateError, match="merged"):
        train_jobs({"six": jobs["six"]}, model=model)


def test_calls_that_cannot_be_meant(tmp_path: Path) -> None:
    jobs = jobs_in(tmp_path)
    with pytest.raises(UsageError, match="nothing to train"):
        train_jobs({})
    with pytest.raises(UsageError, match="one folder"):
        train_jobs({"a": jobs["one"], "b": jobs["one"]})
    with pytest.raises(CheckpointError, match="no run to resume"):
        train_jobs(jobs, resume=True)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "diary.txt").write_text("not a run")
    assert isinstance(train_jobs({"two": jobs["two"], "six": jobs["six"]}).failed["two"], StateError)


def test_a_job_from_a_file_keeps_its_config(tmp_path: Path) -> None:
    flat = toy_config(tmp_path, max_steps=2)
    config = RunConfig(base="toy", method=gs.LoRA(r=2), data=flat.data, train=flat.train, output=flat.output)
    run = train_jobs({"a": config})["a"]
    assert RunConfig.read(run.output / "config.yaml") == config
    assert run.report["base"] == "toy"
