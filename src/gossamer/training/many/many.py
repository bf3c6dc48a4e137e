"""Many adapters on one frozen base: each with its own method, rows, learning rate, schedule, clipping, seed and length.

    memory = base + activations of one micro-batch + sum over adapters of 3 |A, B| + |gradients of one of them|

(three: the parameters and AdamW's two moments). Every adapter has random numbers of its own, so it ends as it does when
it is trained alone: bit for bit where what goes through the model at once are rows of one adapter, and but for rounding
where small batches of several go together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.attachment import attach, attached, detach, trainable_parameters, use, using
from gossamer.errors import CheckpointError, GossamerError, StateError, UnsupportedError, UsageError
from gossamer.methods import TargetedMethod
from gossamer.progress import Progress
from gossamer.training.audit import refuse_misfits
from gossamer.training.config import RunConfig
from gossamer.training.dataset import EncodedDataset
from gossamer.training.loop import Loop
from gossamer.training.runs.outcome import Run, open_run, run_config
from gossamer.training.spread.world import World
from gossamer.training.state import TrainState

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Job:
    """One of many adapters: what is trained, and how. Its factors start from `config.seed`."""

    method: TargetedMethod
    config: RunConfig


@dataclass(frozen=True, eq=False)
class Runs(Mapping[str, Run]):
    """What became of many jobs: a mapping of the finished ones. Asking for one that failed raises its error."""

    finished: Mapping[str, Run]
    failed: Mapping[str, GossamerError]

    def __getitem__(self, name: str) -> Run:
        if name in self.failed:
            raise self.failed[name]
        return self.finished[name]

    def __contains__(self, name: object) -> bool:
        return name in self.finished

    def __iter__(self) -> Iterator[str]:
        return iter(self.finished)

    def __len__(self) -> int:
        return len(self.finished)


def train_many(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    jobs: Mapping[str, Job | RunConfig],
    *,
    resume: bool = False,
    at_once: int | None = None,
    progress: Progress | None = None,
    world: World | None = None,
) -> Runs:
    """Train many adapters on one base, each as `train` would have trained it alone, and write a run folder for each.

    Args:
        model: a causal language model, with no trainable adapter on it; it is held in memory once.
        tokenizer: the model's own.
        jobs: the name of an adapter -> what it is, what it learns from and where its run folder is. A `RunConfig` is
            written to that folder as it is.
        resume: go on from the newest whole checkpoint of each job; one that never began begins now.
        at_once: tokens of several adapters that go through the model together, where rows can be packed; by default as
            many as the largest batch of any of them has. 1 keeps the rows of each to themselves.
        progress: what is told how far the runs are; by default a bar or lines on the error stream.
        world: the processes of the run; by default those that torchrun started, or this one alone. They share the rows
            of each adapter.

    Returns:
        The runs, by name. A job that fails (its data, a loss that is NaN) is among `failed`, and the others go on.
        The finished adapters stay attached under their names; what was active before is active again.

    Raises:
        StateError: a trainable adapter on the model, a name that is taken, weights that are merged. UsageError: no
        jobs, two with one folder, or an impossible name. CheckpointError: nothing at all to resume. UnsupportedError: a
        model that is not causal, a base to be sharded. Interrupted: stopped by a signal, after a checkpoint of each
        that had begun was written. After any of these the model is as it was found.
    """
    world = world or World.here(next(model.parameters()).device.type)
    every = {name: Job(job.method, job) if isinstance(job, RunConfig) else job for name, job in jobs.items()}
    world.first(lambda: _check(model, every, resume, world))
    with _restoring(model):
        room = _Room(model, tokenizer, every, world.shown(progress), world, resume, at_once)
        try:
            with room.folders:
                finished = room.train()
        except BaseException:
            room.remove(*jobs)
            raise
        room.remove(*room.failed)
    return Runs({name: finished[name] for name in jobs if name in finished}, room.failed)


@contextmanager
def _restoring(model: PreTrainedModel) -> Iterator[None]:
    """The base alone runs in a block, whatever is attached there; what was active before is active again after it."""
    with using(model, None) if attached(model) else nullcontext():  # refuses while merged
        try:
            yield
        finally:
            if attached(model):
                use(model, None)


class EncodedDatasets:
    """Rows for one model, read once for all who read the same rows in the same way."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.known: dict[Any, EncodedDataset] = {}

    def read(self, config: RunConfig, show: Progress, began: str | None = None) -> EncodedDataset:
        """The rows of a config of a run begun on that day, encoded and checked. Raises `DataError`."""
        loop = config.train
        key = (config.data, config.task, loop.max_length, loop.overlong, loop.eval_batch_size, began)
        if key not in self.known:
            dataset = EncodedDataset.read(config, self.tokenizer, show.say, model=self.model, began=began)
            refuse_misfits(self.model, dataset.examples)
            self.known[key] = dataset.begun(config.task, self.model)
        return self.known[key]


@dataclass
class _Room:
    """Everything that happens before the first step, job by job."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    jobs: Mapping[str, Job]
    show: Progress
    world: World
    resume: bool
    at_once: int | None
    folders: ExitStack = field(default_factory=ExitStack)
    failed: dict[str, GossamerError] = field(default_factory=dict)
    measured: dict[Any, Any] = field(default_factory=dict)

    def train(self) -> dict[str, Run]:
        """Make a state of every job that can be begun, and let them learn."""
        states, datasets = [], EncodedDatasets(self.model, self.tokenizer)
        for name, job in self.jobs.items():
            try:
                states.append(self._state(name, job, datasets))
            except GossamerError as error:
                self.failed[name] = error
                self.remove(name)
                _Named(self.show, name).say(str(error))
        if not states:
            return {}
        how: dict[str, Any] = {"together": True, "at_once": self.at_once, "world": self.world}
        loop = Loop(self.model, self.tokenizer, states, self.show, **how)
        loop.run()
        self.failed |= loop.failed
        return loop.finished

    def remove(self, *names: str) -> None:
        for name in names:
            if name in attached(self.model):
                detach(self.model, name)

    def _state(self, name: str, job: Job, datasets: EncodedDatasets) -> TrainState:
        config = job.config
        show = _Named(self.show, name)
        resume = self.world.first(lambda: self.resume and Path(config.output).is_dir())
        folder = self.folders.enter_context(self.world.opened(lambda: open_run(config.output, resume=resume)))
        dataset = datasets.read(config, show, self.world.first(folder.began))
        attach(self.model, job.method, name, seed=config.train.seed)
        whole = run_config(self.model, name, config)
        shared: dict[str, Any] = {"measured": self.measured, "world": self.world}
        return TrainState(self.model, self.tokenizer, name, (name,), whole, dataset, folder, show, resume, **shared)


def _check(model: PreTrainedModel, jobs: Mapping[str, Job], resume: bool, world: World) -> None:
    if not jobs:
        raise UsageError("there is nothing to train", expected="at least one job")
    if attached(model):
        if trainable := [name for name in attached(model) if trainable_parameters(model, name)]:
            what = "an adapter that trains is attached already, and would not be trained"
            raise StateError(what, got=", ".join(trainable), hint="detach it, or make it one of the jobs")
        if taken := [name for name in jobs if name in attached(model)]:
            raise StateError("an adapter of this name is attached already", got=", ".join(taken))
    for one in jobs.values():
        one.config.task.fits(model)
    if world.size > 1 and (sharding := [name for name, one in jobs.items() if one.config.train.shard != "none"]):
        raise UnsupportedError(
            "a base that many adapters learn on cannot be sharded",
            got=", ".join(sharding),
            hint="shard: none; each process then holds the whole base",
        )
    owners: dict[Path, str] = {}
    for name, one in jobs.items():
        output = Path(one.config.output)
        if (other := owners.setdefault(output.absolute(), name)) != name:
            both = f"{other} and {name}"
            raise UsageError("two jobs would write to one folder", where=str(output), got=both, hint="one folder a job")
    if resume and not any(output.is_dir() for output in owners):
        places = ", ".join(map(str, owners))
        raise CheckpointError("there is no run to resume", where=places, hint="start without resume")


class _Named:
    """A progress that says of whom its lines are."""

    def __init__(self, show: Progress, name: str) -> None:
        self.show, self.name = show, name

    def start(self, total: int, what: str) -> None:
        self.show.start(total, f"{self.name}: {what}")

    def step(self, **metrics: float) -> None:
        self.show.step(**metrics)

    def say(self, line: str) -> None:
        self.show.say("\n".join(f"{self.name}: {part}" for part in line.splitlines()))

    def finish(self) -> None:
        self.show.finish()
