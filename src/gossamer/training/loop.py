"""The training loop: one adapter, or many that share a frozen base.

    for each step:
        loss = sum over its batches of nll(supervised tokens) / number of supervised tokens in all of them
        g    = d loss / d (A, B)            the base is frozen: no gradient, no moments, no copy of it
        g    = g * min(1, clip / |g|)
        A, B = AdamW(A, B, g, lr(step))

A batch split into several gives the same gradient. A step whose loss or gradient is not finite is never taken. All
randomness follows from the seed and is part of each checkpoint, so a run that was stopped ends as if it had not been.

Source: Hu et al. 2021, arXiv:2106.09685, section 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch

from gossamer.attachment import active, using, using_spans
from gossamer.data.batches import BatchLayout, joined
from gossamer.errors import GossamerError, Interrupted
from gossamer.progress import Progress
from gossamer.running.fast import fast_path
from gossamer.training.audit import adapter_to_train, keeping_modes, refuse_misfits
from gossamer.training.config import RunConfig
from gossamer.training.dataset import EncodedDataset, Files
from gossamer.training.evaluate import pad_id
from gossamer.training.memory import agreed, checkpointing
from gossamer.training.runs.outcome import Run, open_run, run_config
from gossamer.training.spread.exchange import MicroBatch
from gossamer.training.spread.world import World
from gossamer.training.state import TrainState
from gossamer.training.stopping import interruptible

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Assignment = tuple[TrainState, MicroBatch]
"""Rows of one adapter that go through the model together."""


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    world: World | None = None,
    files: Files | None = None,
) -> Run:
    """Train the one trainable adapter of a model, and write a run folder.

    Args:
        model: one that fits the task, with an adapter attached; its base may be float32 or bfloat16.
        tokenizer: the model's own.
        config: what to do; one that names a base is written to the folder as it is.
        resume: go on from the newest whole checkpoint in the output folder. On a CPU the adapter then ends bit for bit
            as without the interruption.
        progress: shows how far the run is; by default a bar or lines on the error stream.
        world: the processes of the run; by default those that torchrun started, or this one alone.
        files: the rows, where `config.data.read()` has been called already.

    Returns:
        The run. The model keeps the trained adapter attached and active.

    Raises:
        StateError: not exactly one trainable, active adapter, or an output folder in use. DataError: rows or labels.
        GradientError: a module that the first step does not reach. NonFiniteError: a loss or gradient that is NaN or
        infinite; the step is not taken. CheckpointError: nothing whole to resume, or another run's. DiskError: writing
        failed; earlier checkpoints are untouched. ResourceError: out of memory. UnsupportedError: checkpointing that
        the model or method cannot do, or an 8-bit optimiser without bitsandbytes. Interrupted: stopped by a signal
        after a checkpoint was written.
    """
    world = world or World.here(next(model.parameters()).device.type)
    show = world.shown(progress)
    name = adapter_to_train(model)
    running = active(model)
    assert isinstance(running, tuple)
    whole = run_config(model, name, config)
    whole.task.fits(model)
    with world.opened(lambda: open_run(whole.output, resume=resume)) as folder:
        began = world.first(folder.began)
        dataset = EncodedDataset.read(whole, tokenizer, show.say, files, model=model, began=began)
        refuse_misfits(model, dataset.examples)
        with using(model, *[one for one in running if one != name] or [None]):
            dataset = dataset.begun(whole.task, model)
        state = TrainState(model, tokenizer, name, running, whole, dataset, folder, show, resume, world=world)
        loop = Loop(model, tokenizer, [state], show, world=world)
        loop.run()
        return loop.finished[name]


class Loop:
    """Trains every adapter to its end; they take turns, step by step.

    Args:
        together: an error of one adapter ends that one alone, and is kept in `failed`.
        at_once: tokens of several adapters that go through the model together; by default as many as the largest batch
            of any of them has, so that memory is that of one.

    Attributes:
        finished: name -> run. failed: name -> what went wrong.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        states: Sequence[TrainState],
        show: Progress,
        *,
        together: bool = False,
        at_once: int | None = None,
        world: World | None = None,
    ) -> None:
        self.model, self.pad, self.states, self.show = model, pad_id(tokenizer), states, show
        self.together, self.at_once = together, at_once
        self.device = next(model.parameters()).device
        self.world = world or World()
        self.memory = agreed([one for many in self.world.gathered([one.memory for one in states]) for one in many])
        self.finished: dict[str, Run] = {}
        self.failed: dict[str, GossamerError] = {}

    @property
    def live(self) -> list[TrainState]:
        """Those that have neither finished nor failed."""
        return [one for one in self.states if one.name not in self.finished and one.name not in self.failed]

    def run(self) -> None:
        """The algorithm, from the first evaluations to the reports.

        Raises: what `train` raises; Interrupted once all that have begun are saved.
        """
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with (
            keeping_modes(self.model),
            interruptible() as self.stop,
            checkpointing(self.model, self.memory.checkpointing),
            fast_path(
                self.model, packing=all(one.config.packing and one.task.packs for one in self.states)
            ) as self.fast,
        ):
            self.show.say(self.fast.rule)
            try:
                self._run()
            except Interrupted:
                raise self._saved() from None
            finally:
                self.show.finish()

    def _run(self) -> None:
        for state in self.states:
            state.memory, state.fast, state.pause = self.memory, self.fast, self._pause
            with self._turn(state):
                state.begin()
        self.model.train()
        self._show_bar()
        while live := self.live:
            for state in self._gradients([one for one in live if one.left]):
                with self._turn(state):
                    self._step(state)
            for state in [one for one in self.live if not one.left]:
                self.show.finish()
                with self._turn(state):
                    self.finished[state.name] = state.finish()
                self._show_bar()

    def _gradients(self, due: Sequence[TrainState]) -> Iterator[TrainState]:
        """Leave d loss / d parameters of each adapter in its parameters, and the parts of its loss in its exchange.

        The loss is the mean over all terms of an adapter's own batches. Its step follows at once, so that the gradients
        of few adapters exist at a time.
        """
        for state in due:
            state.open_step()
        for states, passes in self._turns(due):
            if len(states) == 1:
                (state,) = states
                with self._turn(state), state.learning(), state.exchange:
                    self.world.reseed(state.config.seed, state.step)
                    for micro_batches in passes:
                        self._backward(micro_batches)
            else:
                with self.memory.errors(), _learning_together(states):
                    for micro_batches in passes:
                        self._backward(micro_batches)
            for state in states:
                if state.name not in self.failed and state.exchange.complete:
                    state.close_step()
                    yield state

    def _turns(self, due: Sequence[TrainState]) -> Iterator[tuple[list[TrainState], list[list[Assignment]]]]:
        """Who learns next, and from what: lists of micro-batches that go through the model at once.

        Several processes take one adapter after the other, each with its share of the rows.
        """
        if self.world.size > 1:
            yield from (([state], [[(state, one)] for one in state.exchange.mine]) for state in due)
            return
        for group in self._groups([(state, one) for state in due for one in state.exchange.mine]):
            yield [*dict.fromkeys(state for state, _ in group)], [group]

    def _groups(self, work: Sequence[Assignment]) -> Iterator[list[Assignment]]:
        """Micro-batches that go through the model at once: no more tokens than the largest of them has, or `at_once`.

        An adapter that draws random numbers is alone, as these come from its own sequence; so is one whose task's loss
        is not a sum over examples.
        """
        sizes = [state.size(micro_batch) for state, micro_batch in work]
        most = self.at_once or max(sizes, default=0)
        group: list[Assignment] = []
        room = 0
        for (state, micro_batch), size in zip(work, sizes, strict=True):
            if group and (size > room or not self.fast.packed or not state.mixes_with(group[0][0])):
                yield group
                group = []
            if state.name not in self.failed:
                room = (room if group else most) - size
                group.append((state, micro_batch))
        if group:
            yield group

    def _backward(self, group: Sequence[Assignment]) -> None:
        batches, spans, first = [], [], 0
        for state, micro_batch in group:
            examples = [state.dataset.examples[index] for index in micro_batch.indices]
            layout = BatchLayout(self.pad, self.device, self.fast.packed, shared=not state.draws)
            batches.append(state.task.collate(examples, layout))
            spans.append((state.active, first, first := first + batches[-1].input_ids.shape[1]))
        with using_spans(self.model, spans) if len(group) > 1 else nullcontext():
            (learner, _), *_ = group
            each = learner.task.losses(self.model, joined(batches)).split([len(batch.counts) for batch in batches])
            losses = [sums.sum() / state.terms for sums, (state, _) in zip(each, group, strict=True)]
            total = torch.stack([one.weight * loss for loss, (_, one) in zip(losses, group, strict=True)]).sum()
            if not total.requires_grad:  # no adapter had a part in it, or all runs under no_grad
                learner.audit()
            total.backward()
        for loss, (state, _) in zip(losses, group, strict=True):
            state.exchange.add(loss)

    def _step(self, state: TrainState) -> None:
        """Take the step that the gradients say; then log, evaluate, save and stop, each when it is due."""
        with state.learning():
            taken = state.take_step()
        record = state.record(taken)
        self.show.step(**record)
        state.log_if_due(record)
        if state.evaluation_due:
            self.show.finish()
            state.evaluate_between()
            self._show_bar()
        state.save_if_due()
        self._pause()

    @contextmanager
    def _turn(self, state: TrainState) -> Iterator[None]:
        """Its adapter runs, with its own random numbers; among others, what goes wrong meanwhile is its own affair."""
        try:
            with self.memory.errors(), state.current():
                yield
        except Interrupted:
            raise
        except GossamerError as error:
            if not self.together or self.world.sharded:  # the others are inside the model
                raise
            error.__traceback__ = error.__cause__ = None  # its frames hold the step's tensors
            self.failed[state.name] = error
            state.optimizer.zero_grad(set_to_none=True)
            state.show.say(str(error))

    def _show_bar(self) -> None:
        if self.live:
            self.show.start(sum(one.left for one in self.live), "training")

    def _pause(self) -> None:
        """Stop here if a signal came; `_saved` saves what has begun, on the way out."""
        if by := self.world.stop(self.stop):
            raise Interrupted(f"stopped by {by}")

    def _saved(self) -> Interrupted:
        """Save all that have begun, and say where they stand."""
        live = self.live
        for state in [one for one in live if one.saved_step >= 0]:
            with self._turn(state):
                state.save()
        if self.together:
            place = f"with {len(self.finished)} of {len(self.states)} adapters trained"
        else:
            (one,) = live
            begun = one.saved_step >= 0
            place = f"after step {one.step:,} of {one.steps.total:,}" if begun else "before the first step"
        return Interrupted(
            f"stopped by {self.stop.signal} {place}",
            where=", ".join(str(one.folder.path) for one in live[:3]),
            hint="resume=True (--resume) goes on from here",
        )


@contextmanager
def _learning_together(states: Sequence[TrainState]) -> Iterator[None]:
    """While open, time counts as time spent on steps, in equal parts."""
    with ExitStack() as stack:
        for state in states:
            stack.enter_context(state.learning(1 / len(states)))
        yield
