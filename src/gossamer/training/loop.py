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

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gossamer.attachment import active, using_spans
from gossamer.data.batches import collate, joined
from gossamer.errors import GossamerError, Interrupted
from gossamer.progress import Progress
from gossamer.running.fast import fast_path
from gossamer.training.audit import adapter_to_train, refuse_misfits
from gossamer.training.config import RunConfig, TrainConfig
from gossamer.training.dataset import EncodedDataset, Files
from gossamer.training.evaluate import keeping_modes, pad_id
from gossamer.training.interrupt import interruptible
from gossamer.training.loss import refuse_unless_causal, supervised_nll
from gossamer.training.memory import agreed, checkpointing
from gossamer.training.runs.folder import open_run
from gossamer.training.runs.outcome import Run, run_config
from gossamer.training.spread.world import World
from gossamer.training.state import Batches, Parts, TrainState

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Piece = tuple[TrainState, list[int]]
"""Examples of one adapter that go through the model together."""


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig | RunConfig,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    world: World | None = None,
    files: Files | None = None,
) -> Run:
    """Train the one trainable adapter of a model, and write a run folder.

    Args:
        model: a causal language model with an adapter attached; its base may be float32 or bfloat16.
        tokenizer: the model's own.
        config: what to do; a `RunConfig` is written to the folder as it is.
        resume: go on from the newest whole checkpoint in the output folder. On a CPU the adapter then ends bit for bit
            as without the interruption.
        progress: what is told how far the run is; by default a bar or lines on the error stream.
        world: the processes of the run; by default those that torchrun started, or this one alone.
        files: the rows, where `read_files` has read them already.

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
    settings = whole.train_config()
    refuse_unless_causal(model)
    with world.opened(lambda: open_run(settings.output, resume=resume)) as folder:
        began = world.first(folder.began)
        dataset = EncodedDataset.read(settings, tokenizer, show.say, files, model=model, began=began)
        refuse_misfits(model, dataset.examples)
        state = TrainState(model, tokenizer, name, running, whole, dataset, folder, show, resume, world=world)
        loop = Loop(model, tokenizer, [state], show, world=world)
        loop.run()
        return loop.finished[name]


class Loop:
    """Trains every state to its end; they take turns, step by step.

    Args:
        together: an error of one state ends that one alone, and is kept in `failed`.
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
            fast_path(self.model, packing=all(one.config.packing for one in self.states)) as self.fast,
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
            state.memory, state.pause = self.memory, self._pause
            with self._turn(state):
                state.begin()
        self.model.train()
        self._show_bar()
        while live := self.live:
            if work := [(one, one.batches()) for one in live if one.left]:
                for state, parts in self._gradients(work):
                    with self._turn(state):
                        self._step(state, parts)
            for state in [one for one in self.live if not one.left]:
                self.show.finish()
                with self._turn(state):
                    self.finished[state.name] = state.finish()
                self._show_bar()

    def _gradients(self, work: Sequence[tuple[TrainState, Batches]]) -> Iterator[tuple[TrainState, Parts]]:
        """Leave d loss / d parameters of each adapter in its parameters, and give the parts of its loss.

        The loss is the mean over all supervised tokens of an adapter's own batches. Its step follows at once, so that
        the gradients of few adapters exist at a time.
        """
        if self.world.size > 1:
            yield from self._shared_gradients(work)
            return
        pieces = [(state, indices) for state, batches in work for indices in batches]
        last = {state: number for number, (state, _) in enumerate(pieces)}
        supervised = {state: state.supervised(batches) for state, batches in work}
        parts: dict[TrainState, list[tuple[list[int], Tensor]]] = {state: [] for state, _ in work}
        done = 0
        for group in self._groups(pieces):
            for (state, indices), loss in zip(group, self._losses(group, supervised), strict=True):
                parts[state].append((indices, loss))
            done += len(group)
            for state in dict.fromkeys(state for state, _ in group):
                if last[state] < done and state.name not in self.failed:
                    yield state, parts[state]

    def _shared_gradients(self, work: Sequence[tuple[TrainState, Batches]]) -> Iterator[tuple[TrainState, Parts]]:
        """The same on several processes: each goes through its share of the rows, one adapter after the other."""
        for state, batches in work:
            examples, lengths = state.dataset.examples, state.steps.lengths
            supervised = state.supervised(batches)
            step = self.world.exchange(state.parameters.values(), batches, lengths)
            with self._turn(state), state.learning(), step:
                self.world.reseed(state.config.seed, state.step)
                for micro_batch in step.mine:
                    rows = [examples[index] for index in micro_batch.indices]
                    batch = collate(rows, self.pad, self.device, **self.fast.options(shared=not state.draws))
                    loss = supervised_nll(self.model, batch).sum() / supervised
                    if not loss.requires_grad:
                        state.audit()
                    (micro_batch.weight * loss).backward()
                    step.add(loss)
            if state.name not in self.failed:
                state.tokens += sum(lengths[index] for batch in batches for index in batch)
                yield state, step.parts

    def _groups(self, pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
        """Pieces that go through the model at once: no more tokens than the largest of them has, or `at_once`.

        An adapter that draws random numbers is alone, as these come from its own sequence.
        """
        sizes = [sum(state.steps.lengths[index] for index in indices) for state, indices in pieces]
        most = self.at_once or max(sizes)
        group: list[Piece] = []
        room = 0
        for piece, size in zip(pieces, sizes, strict=True):
            if group and (size > room or not self.fast.packed or piece[0].draws or group[0][0].draws):
                yield group
                group = []
            if piece[0].name not in self.failed:
                room = (room if group else most) - size
                group.append(piece)
        if group:
            yield group

    def _losses(self, group: Sequence[Piece], supervised: Mapping[TrainState, int]) -> list[Tensor]:
        """Run the rows of a group forwards and backwards; the part of the loss of each of its pieces."""
        if len(group) == 1:
            (state, _), found = group[0], []
            with self._turn(state), state.learning():
                found = self._through_model(group, supervised)
            return found or [torch.zeros(())]  # failed, and looked at no more
        start = time.monotonic()
        with self.memory.errors():
            found = self._through_model(group, supervised)
        for state, indices in group:
            share = sum(state.steps.lengths[index] for index in indices) / sum(
                other.steps.lengths[index] for other, others in group for index in others
            )
            state.training_seconds += share * (time.monotonic() - start)
        return found

    def _through_model(self, group: Sequence[Piece], supervised: Mapping[TrainState, int]) -> list[Tensor]:
        batches, spans, first = [], [], 0
        for state, indices in group:
            examples = [state.dataset.examples[index] for index in indices]
            batches.append(collate(examples, self.pad, self.device, **self.fast.options(shared=not state.draws)))
            spans.append((state.active, first, first := first + batches[-1].input_ids.shape[1]))
            state.tokens += batches[-1].tokens
        with using_spans(self.model, spans) if len(group) > 1 else nullcontext():
            each = supervised_nll(self.model, joined(batches)).split([batch.supervised for batch in batches])
            losses = [nll.sum() / supervised[state] for nll, (state, _) in zip(each, group, strict=True)]
            total = torch.stack(losses).sum()
            if not total.requires_grad:  # no adapter had a part in it, or all runs under no_grad
                group[0][0].audit()
            total.backward()
        return [loss.detach() for loss in losses]

    def _step(self, state: TrainState, parts: Parts) -> None:
        """Take the step that the gradients say; then log, evaluate, save and stop, each when it is due."""
        with state.learning():
            taken = state.take_step(parts)
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
        """Stop here if somebody asked for it; what is to be saved is saved in `_saved`, on the way out."""
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
