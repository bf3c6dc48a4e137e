"""One adapter in training: its parameters and optimiser, its rows, its random numbers, its folder.

    g    = g * min(1, clip / |g|)
    A, B = AdamW(A, B, g, lr(step))

Nothing here knows of other adapters on the same model, so an adapter that is trained among many ends as one that was
trained alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gossamer.attachment import capture, neutral_values, sites_of_parameters, trainable_parameters, using
from gossamer.errors import NonFiniteError, UnsupportedError
from gossamer.files.atomic import write_text
from gossamer.progress import Progress
from gossamer.running.fast import Fast, drops_out
from gossamer.training.audit import audit_gradients
from gossamer.training.config import FREE_ON_RESUME, RunConfig
from gossamer.training.dataset import EncodedDataset, Steps
from gossamer.training.memory import decide
from gossamer.training.optim import lr_factor, make_optimizer, peak_lr, set_lr, usable_optimizer, warmup_steps
from gossamer.training.runs.checkpoint import (
    checkpoint_at,
    identity,
    newest_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
    split_anew,
    split_settings,
)
from gossamer.training.runs.outcome import Run, RunFolder, peak_memory, read_outcome, write_outcome
from gossamer.training.spread.exchange import Exchange, MicroBatch
from gossamer.training.spread.world import World
from gossamer.training.stopping import Stopping
from gossamer.training.tasks import Figures, read_figures

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SAMPLES = 5
"""Predictions from before training that a checkpoint keeps, to be shown beside those after it."""


@dataclass(eq=False)
class TrainState:
    """Where the training of one adapter is, and the few verbs that it is written in.

    All of them but the first two ask to be called while `current` is open.

    Attributes:
        active: the names that run when this adapter is trained: its own, and those that it learns on top of.
        resume: go on from the newest whole checkpoint.
        measured: evaluations before training, shared by adapters that begin alike.
        pause: called between two batches of an evaluation; it may raise.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    active: tuple[str, ...]
    whole: RunConfig
    dataset: EncodedDataset
    folder: RunFolder
    show: Progress
    resume: bool = False
    measured: dict[tuple[int, str], Figures | None] = field(default_factory=dict)
    pause: Callable[[], None] = lambda: None
    world: World = field(default_factory=World)

    def __post_init__(self) -> None:
        self.whole = self.whole.on_day(self.dataset.date)
        config = self.config = self.whole.train
        self.task = self.whole.task
        if self.world.size > 1 and not self.task.additive:
            raise UnsupportedError(
                f"the rows of a batch of the task {self.task.name} cannot be shared over processes",
                got=f"{self.world.size} processes",
                hint="run it in one: its loss is not a sum over examples",
            )
        self.device = next(self.model.parameters()).device
        self.parameters = trainable_parameters(self.model, self.name)
        self.sites = sites_of_parameters(self.model, self.name)
        self.steps = Steps(self.dataset.examples, self.whole)
        self.memory = decide(self.model, self.whole, self.steps.largest())
        self.draws = drops_out(self.model, self.active)
        outer = self.whole.method.outer_slots
        self.kind, self.kind_rule = usable_optimizer(config.optimizer, self.device)
        decay, neutral = config.weight_decay, self._neutral() if config.weight_decay else {}
        self.optimizer = make_optimizer(self.parameters, decay, outer, config.lr_ratio, self.kind, neutral)
        self.warmup = warmup_steps(config.warmup, self.steps.total)
        self.lr, self.lr_rule = peak_lr(self.model.config, self.whole)
        self.random = random_state(self.device)
        self.step = self.first = self.tokens = 0
        self.training_seconds = self.seconds_before = 0.0
        self.before: Figures | None = None
        self.fast: Fast | None = None
        self.saved_step = -1
        self.stopping = Stopping(config.patience)
        self.logged_at = (0, 0.0)  # tokens and seconds, for the rate since the last line

    def _neutral(self) -> dict[str, Tensor | None]:
        """What weight decay pulls parameters to; a line names those that it leaves alone."""
        neutral = neutral_values(self.model, self.name)
        if spread := [name for name, goal in neutral.items() if isinstance(goal, DTensor)]:
            raise UnsupportedError(
                "weight decay pulls these to the base's own values, which are spread over processes",
                where=", ".join(spread[:3]),
                hint="weight_decay: 0, or shard: none",
            )
        if alone := [name for name, goal in neutral.items() if goal is None]:
            self.show.say(f"weight_decay leaves {', '.join(alone[:3])} alone: no value of it changes nothing")
        return neutral

    @property
    def left(self) -> int:
        """Steps still to take."""
        return 0 if self.stopping.over else self.steps.total - self.step

    @contextmanager
    def current(self) -> Iterator[None]:
        """While open, its adapter runs, random numbers come from its own sequence, and time counts as its own."""
        outside, self.since = random_state(self.device), time.monotonic()
        set_random_state(self.random, self.device)
        try:
            with using(self.model, *self.active):
                yield
        finally:
            self.random = random_state(self.device)
            set_random_state(outside, self.device)
            self.seconds_before += time.monotonic() - self.since

    @contextmanager
    def learning(self, share: float = 1.0) -> Iterator[None]:
        """While open, a share of the time counts as time spent on steps."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.training_seconds += share * (time.monotonic() - start)

    def begin(self) -> None:
        """Start at step 0, or where the newest whole checkpoint stands. Raises `CheckpointError` for another run's."""
        self.optimizer.zero_grad(set_to_none=True)  # whatever was left from before
        for line in filter(None, (self.lr_rule, self.kind_rule, self.memory.rule)):
            self.show.say(line)
        start = capture(self.model, self.name)
        self.identity = identity(self.model, self.whole, self.lr, start, self.dataset.identity)
        self.world.require_same("run", self.identity)
        self.world.copy_from_first(self.parameters.values())
        checkpoint = None
        if self.resume:
            checkpoint = self.world.first(lambda: newest_checkpoint(self.folder.checkpoints, self.show.say))
        if checkpoint:
            checkpoint.refuse_other_run(self.identity, free={f"train.{name}" for name in FREE_ON_RESUME})
        self.world.first(lambda: write_text(self.folder.config, self.whole.to_yaml()))
        if checkpoint:
            checkpoint.restore(self.parameters, self.optimizer, self.device)
            self.step = self.first = self.saved_step = checkpoint.state["step"]
            self.tokens, before = checkpoint.state["tokens"], checkpoint.state["eval_before"]
            self.before = before and read_figures(before)
            self.training_seconds = checkpoint.state["training_seconds"]
            self.seconds_before += checkpoint.state["seconds"]
            self.stopping = Stopping(**checkpoint.state["stopping"])
            changes = (
                self.world.resumed(checkpoint.state.get("processes", 1)),
                split_anew(self.config, checkpoint.state, self.draws),
            )
            for line in filter(None, changes):
                self.show.say(line)
            self.show.say(f"resuming after step {self.step:,} of {self.steps.total:,}")
        else:
            key = (id(self.dataset), start.digest)
            if key not in self.measured:
                self.measured[key] = self._evaluate("before training")
            found = self.measured[key]
            self.before = found and found.sampled(_SAMPLES)
            torch.manual_seed(self.config.seed)
            self.save()
        self.world.first(lambda: self.folder.forget_after(self.step))
        self.logged_at = (self.tokens, self.training_seconds)
        if self.evaluation_due:  # the run was stopped in the middle of it
            self.evaluate_between()

    def open_step(self) -> None:
        """Deal out the rows of the next step; each term of their loss, such as a token with a label, counts alike."""
        batches = self.steps[self.step]
        self.terms = sum(self.dataset.examples[index].terms for batch in batches for index in batch)
        self.exchange = Exchange(self.world, self.parameters.values(), batches, self.steps.lengths)

    def close_step(self) -> None:
        """Gather what came of the step's rows in this process, after the last of them, and count their tokens."""
        if self.world.size == 1:
            self.exchange.close()
        self.tokens += sum(self.steps.lengths[index] for indices, _ in self.exchange.parts for index in indices)

    def size(self, micro_batch: MicroBatch) -> int:
        """Tokens of the rows."""
        return sum(self.steps.lengths[index] for index in micro_batch.indices)

    def mixes_with(self, other: TrainState) -> bool:
        """Whether rows of both may go through the model at once: neither draws, and one loss serves both."""
        return not (self.draws or other.draws) and self.task == other.task and self.task.additive

    def take_step(self) -> dict[str, float]:
        """Clip the gradients that are there, and step. Returns the loss, the learning rate, and the gradients' norm.

        Raises: NonFiniteError, with the rows, and the step is not taken. GradientError, on the first step, for a
        parameter that it does not reach.
        """
        parts = self.exchange.parts
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        *losses, size = torch.stack([*(loss for _, loss in parts), norm.to(self.device)]).tolist()
        if not all(map(isfinite, [*losses, size])):
            self._refuse(parts, losses)
        if self.config.clip is not None:
            nn.utils.clip_grads_with_norm_(self.parameters.values(), self.config.clip, norm)
        if self.step == self.first:
            self.audit()
        lr = self.lr * lr_factor(self.step, self.steps.total, self.warmup, self.config.schedule)
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {"loss": sum(losses), "lr": lr, "grad_norm": size}

    def audit(self) -> None:
        """Raise `GradientError` unless the gradients reach every module."""
        audit_gradients(self.parameters, self.sites)

    def record(self, taken: dict[str, float]) -> dict[str, float]:
        """All there is to show of the step that was just taken."""
        tokens, seconds = self.tokens - self.logged_at[0], self.training_seconds - self.logged_at[1]
        memory = peak_memory(self.device)[0]
        return {
            "step": self.step,
            "epoch": round(self.steps.epochs(self.step), 4),
            **taken,
            "tokens": self.tokens,
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "seconds": self.training_seconds,
            **({} if memory is None else {"memory_bytes": memory}),
        }

    def log_if_due(self, record: dict[str, float]) -> None:
        """Write a line of the figures, after the last step in any case."""
        if self.step % self.config.log_every == 0 or not self.left:
            self._log(record)
            self.logged_at = (self.tokens, self.training_seconds)

    def save_if_due(self) -> None:
        """Write a checkpoint, after the last step in any case."""
        if self.step % self.config.checkpoint_every == 0 or not self.left:
            self.save()

    @property
    def evaluation_due(self) -> bool:
        """Whether to evaluate here, between two steps; with patience also after the last one, which may be the best."""
        every, last = self.config.eval_every, self.step == self.steps.total
        if not every or self.step == self.stopping.evaluated:
            return False
        return self.config.patience is not None if last else self.step % every == 0

    def evaluate_between(self) -> None:
        """Measure the held-out rows in the middle of training, log the figures, and stop if it has been enough."""
        figures = self._evaluate(f"after step {self.step:,}")
        assert figures is not None, "a config that evaluates between steps has held-out rows"
        self._log({"step": self.step} | {f"eval_{name}": value for name, value in figures.named().items()})
        if self.stopping.see(self.step, self.world.first(lambda: figures.loss)):
            self.saved_step = -1
            self.save()
        elif self.stopping.over:
            self.show.say(f"stopping after step {self.step:,}: the held-out loss has not become better since")

    def finish(self) -> Run:
        """Measure the held-out rows again, and write what a finished run leaves, unless that is there already."""
        best = self._back_to_best()
        adapter = capture(self.model, self.name)
        run = self.world.first(lambda: read_outcome(self.folder, adapter)) if self.first == self.step else None
        if run is None:
            after = self._evaluate("after training")
            figures = self._figures() | best | {"steps": self.step, "processes": self.world.size}
            written = self.folder, self.whole, self.model, adapter, self.dataset, self.before, after, figures
            run = self.world.first(lambda: write_outcome(*written, self.tokenizer))
        return run

    def _back_to_best(self) -> dict[str, int]:
        """Take the factors of the best evaluation, if there was patience for one. Raises `CheckpointError`."""
        step = self.stopping.best_step
        if step is None:
            return {}
        if step != self.step:
            best = self.world.first(lambda: checkpoint_at(self.folder.checkpoints, step))
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(best.parameters[name])
            self.show.say(f"going back to step {step:,}, whose held-out loss was the lowest: {self.stopping.best:.4g}")
        return {"step": step, "best_step": step}

    def _log(self, record: dict[str, Any]) -> None:
        self.world.first(lambda: self.folder.log(record))

    def save(self) -> None:
        """Write a checkpoint, unless this step has one."""
        if self.saved_step == self.step:
            return
        epoch, position = self.steps.place(self.step)
        state = self._figures() | {
            "epoch": epoch,
            "position": position,
            "eval_before": self.before and self.before.to_dict(),
            "identity": self.identity,
            "split": split_settings(self.config),
            "torch": torch.__version__,
            "processes": self.world.size,
            "stopping": self.stopping.state(),
        }
        place, kept = self.folder.checkpoints, {"keep": self.config.keep_checkpoints, "spare": self.stopping.best_step}
        self.world.first(lambda: save_checkpoint(place, state, self.parameters, self.optimizer, self.device, **kept))
        self.saved_step = self.step

    def _refuse(self, parts: Sequence[tuple[list[int], Tensor]], losses: Sequence[float]) -> None:
        """Say what was not finite and where it came from; the step is not taken."""
        every = [indices for indices, _ in parts]
        bad = [indices for indices, loss in zip(every, losses, strict=True) if not isfinite(loss)]
        what = "loss" if bad else "gradient"
        modules = [
            name for name, p in self.parameters.items() if p.grad is not None and not bool(torch.isfinite(p.grad).all())
        ]
        self._log({"step": self.step + 1, "loss": None, "fault": f"non-finite {what}"})
        self.optimizer.zero_grad(set_to_none=True)
        rows = [self.dataset.examples[index].where for indices in bad or every for index in indices]
        raise NonFiniteError(
            f"the {what} of step {self.step + 1} is not finite; the step was not taken",
            where=", ".join(rows),
            got="" if bad else f"non-finite gradients at {', '.join(modules[:3])}",
            hint="look at these rows; lower lr, or use a base in float32 or bfloat16",
        )

    def _evaluate(self, when: str) -> Figures | None:
        """Measure the held-out rows, if there are any; may stop between two of their batches."""
        evaluation = self.dataset.evaluation
        if evaluation is None:
            return None
        self.show.start(evaluation.batches, f"evaluating {when}")

        def tick() -> None:
            self.show.step()
            self.pause()

        found = evaluation(self.model, tick, self.fast)
        self.show.finish()
        figures = ", ".join(f"{name} {value:.4g}" for name, value in found.named().items())
        self.show.say(f"{when}: {figures} over {found.rows:,} rows")
        return found

    def _figures(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "steps": self.steps.total,
            "epochs": self.steps.epochs(self.step),
            "tokens": self.tokens,
            "training_seconds": self.training_seconds,
            "seconds": self.seconds_before + time.monotonic() - self.since,
            "lr": self.lr,
            "lr_rule": self.lr_rule,
            "optimizer": self.kind,
            "checkpointing": self.memory.checkpointing,
            "checkpointing_rule": self.memory.rule,
        }
