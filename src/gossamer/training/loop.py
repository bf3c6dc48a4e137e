"""The training loop.

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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gossamer.adapter import Adapter
from gossamer.attachment import capture, sites_of_parameters, trainable_parameters
from gossamer.errors import Interrupted, NonFiniteError
from gossamer.files.atomic import write_text
from gossamer.training.audit import adapter_to_train, audit_gradients, refuse_misfits
from gossamer.training.batches import collate
from gossamer.training.checkpoint import newest_checkpoint, save_checkpoint
from gossamer.training.config import RunConfig, TrainConfig
from gossamer.training.evaluate import keeping_modes, pad_id
from gossamer.training.interrupt import StopRequest, interruptible
from gossamer.training.loss import refuse_unless_causal, supervised_nll
from gossamer.training.material import Material, Steps
from gossamer.training.memory import Memory, stored_as, within_memory
from gossamer.training.optim import auto_lr, lr_factor, make_optimizer, set_lr, usable_optimizer, warmup_steps
from gossamer.training.outcome import peak_memory, run_config, sampled, write_outcome
from gossamer.training.progress import Progress, for_terminal
from gossamer.training.run_folder import RunFolder, open_run

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, what report.json says, and the adapter."""

    output: Path
    report: dict[str, Any]
    adapter: Adapter


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig | RunConfig,
    *,
    resume: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Train the one trainable adapter of a model, and write a run folder.

    Args:
        model: a causal language model with an adapter attached; its base may be float32 or bfloat16.
        tokenizer: the model's own.
        config: what to do; a `RunConfig` is written to the folder as it is.
        resume: go on from the newest whole checkpoint in the output folder. On a CPU the adapter then ends bit for bit
            as without the interruption.
        progress: what is told how far the run is; by default a bar or lines on the error stream.

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
    show = progress if progress is not None else for_terminal()
    name = adapter_to_train(model)
    whole = run_config(model, name, config)
    settings = whole.train_config()
    refuse_unless_causal(model)
    device = next(model.parameters()).device
    generators = [device] if device.type == "cuda" else []
    with open_run(settings.output, resume=resume) as folder:
        material = Material.read(settings, tokenizer, show.say)
        refuse_misfits(model, material.examples)
        modes, random = keeping_modes(model), torch.random.fork_rng(generators)
        lengths = [len(example) for example in material.examples]
        try:
            with modes, random, interruptible() as stop, within_memory(model, whole, lengths) as memory:
                training = _Training(model, tokenizer, whole, name, material, folder, show, stop, memory)
                return training.run(whole, resume)
        finally:
            show.finish()


class _Training:
    """One run: where it is, and the few verbs that the algorithm is written in."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        whole: RunConfig,
        name: str,
        material: Material,
        folder: RunFolder,
        show: Progress,
        stop: StopRequest,
        memory: Memory,
    ) -> None:
        config = whole.train_config()
        self.model, self.config, self.name, self.pad = model, config, name, pad_id(tokenizer)
        self.material, self.folder, self.show, self.stop, self.memory = material, folder, show, stop, memory
        self.device = next(model.parameters()).device
        self.parameters, self.sites = trainable_parameters(model, name), sites_of_parameters(model, name)
        outer = whole.method.outer_slots
        self.kind, self.kind_rule = usable_optimizer(config.optimizer, self.device)
        self.optimizer = make_optimizer(self.parameters, config.weight_decay, outer, config.lr_ratio, self.kind)
        self.steps = Steps(material.examples, config)
        self.warmup = warmup_steps(config.warmup, self.steps.total)
        self.lr, self.lr_rule = auto_lr(model.config) if config.lr == "auto" else (config.lr, f"lr {config.lr:g}")
        self.identity = self._identity()
        self.step = self.tokens = 0
        self.training_seconds = 0.0
        self.before: dict[str, Any] | None = None
        self.saved_step = -1
        self.logged_at = (0, 0.0)  # tokens and seconds, for the rate since the last line

    def run(self, config: RunConfig, resume: bool) -> Run:
        """The algorithm, from the first evaluation to the report."""
        self.started = time.monotonic()
        self._begin(config, resume)
        first = self.step
        self.model.train()
        self.show.start(self.steps.total - first, "training")
        for step in range(first, self.steps.total):
            start = time.monotonic()
            loss, norm = self._accumulate(self.steps[step])
            if step == first:
                audit_gradients(self.parameters, self.sites)
            lr = self.lr * lr_factor(step, self.steps.total, self.warmup, self.config.schedule)
            set_lr(self.optimizer, lr)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step = step + 1
            self.training_seconds += time.monotonic() - start
            self._after_step(loss, norm, lr)
        self.show.finish()
        after = self._evaluate("after training")
        adapter = capture(self.model, self.name)
        outcome = write_outcome(
            self.folder, config, self.model, adapter, self.material, self.before, after, self._figures()
        )
        return Run(self.folder.path, outcome.report, outcome.adapter)

    def _begin(self, config: RunConfig, resume: bool) -> None:
        """Start at step 0, or where the newest whole checkpoint stands."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.optimizer.zero_grad(set_to_none=True)  # whatever was left from before
        for line in filter(None, (self.lr_rule, self.kind_rule, self.memory.rule)):
            self.show.say(line)
        checkpoint = newest_checkpoint(self.folder.checkpoints, self.show.say) if resume else None
        if checkpoint:
            checkpoint.refuse_other_run(self.identity)
        write_text(self.folder.config, config.to_yaml())
        if checkpoint:
            checkpoint.restore(self.parameters, self.optimizer, self.device)
            self.step = self.saved_step = checkpoint.state["step"]
            self.tokens, self.before = checkpoint.state["tokens"], checkpoint.state["eval_before"]
            self.training_seconds = checkpoint.state["training_seconds"]
            self.started -= checkpoint.state["seconds"]
            self.show.say(f"resuming after step {self.step:,} of {self.steps.total:,}")
        else:
            self.before = sampled(self._evaluate("before training"))
            torch.manual_seed(self.config.seed)
            self._save()
        self.folder.forget_after(self.step)
        self.logged_at = (self.tokens, self.training_seconds)

    def _accumulate(self, batches: list[list[int]]) -> tuple[float, float]:
        """Gradients of the mean loss over all supervised tokens of these batches, clipped; the loss and their norm."""
        examples = self.material.examples
        supervised = sum(sum(examples[index].supervised[1:]) for batch in batches for index in batch)
        losses: list[Tensor] = []
        for indices in batches:
            batch = collate([examples[index] for index in indices], self.pad, self.device)
            loss = supervised_nll(self.model, batch).sum() / supervised
            if not loss.requires_grad:  # no adapter had a part in it, or all runs under no_grad
                audit_gradients(self.parameters, self.sites)
            loss.backward()
            losses.append(loss.detach())
            self.tokens += batch.tokens
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        *parts, total = torch.stack([*losses, norm.to(self.device)]).tolist()
        if not all(map(_finite, [*parts, total])):
            self._refuse(batches, parts)
        if self.config.clip is not None:
            nn.utils.clip_grads_with_norm_(self.parameters.values(), self.config.clip, norm)
        return sum(parts), total

    def _refuse(self, batches: list[list[int]], losses: list[float]) -> None:
        """Say what was not finite and where it came from; the step is not taken."""
        bad = [batch for batch, loss in zip(batches, losses, strict=True) if not _finite(loss)]
        what = "loss" if bad else "gradient"
        modules = [
            name for name, p in self.parameters.items() if p.grad is not None and not bool(torch.isfinite(p.grad).all())
        ]
        self.folder.log({"step": self.step + 1, "loss": None, "fault": f"non-finite {what}"})
        self.optimizer.zero_grad(set_to_none=True)
        rows = [self.material.examples[index].where for batch in bad or batches for index in batch]
        raise NonFiniteError(
            f"the {what} of step {self.step + 1} is not finite; the step was not taken",
            where=", ".join(rows),
            got="" if bad else f"non-finite gradients at {', '.join(modules[:3])}",
            hint="look at these rows; lower lr, or use a base in float32 or bfloat16",
        )

    def _after_step(self, loss: float, norm: float, lr: float) -> None:
        """Log, evaluate, save and stop, each when it is due."""
        tokens, seconds = self.tokens - self.logged_at[0], self.training_seconds - self.logged_at[1]
        record = {
            "step": self.step,
            "epoch": round(self.step / self.steps.per_epoch, 4),
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "tokens": self.tokens,
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "seconds": self.training_seconds,
            "memory_bytes": peak_memory(self.device)[0],
        }
        self.show.step(**record)
        last = self.step == self.steps.total
        if self.step % self.config.log_every == 0 or last:
            self.folder.log(record)
            self.logged_at = (self.tokens, self.training_seconds)
        if self.step % self.config.checkpoint_every == 0 or last:
            self._save()
        if self.config.eval_every and self.step % self.config.eval_every == 0 and not last:
            self._evaluate_between()
        self._stop_if_asked()

    def _evaluate_between(self) -> None:
        self.show.finish()
        result = self._evaluate(f"after step {self.step:,}") or {}
        figures = {name: value for name, value in result.items() if isinstance(value, float)}
        self.folder.log({"step": self.step} | {f"eval_{name}": value for name, value in figures.items()})
        self.show.start(self.steps.total - self.step, "training")

    def _evaluate(self, when: str) -> dict[str, Any] | None:
        """Measure the held-out rows, if there are any; may stop between two of their batches."""
        evaluation = self.material.evaluation
        if evaluation is None:
            return None
        self.show.start(evaluation.batches, f"evaluating {when}")

        def tick() -> None:
            self.show.step()
            self._stop_if_asked()

        result = evaluation(self.model, tick)
        self.show.finish()
        figures = ", ".join(
            f"{name} {result[name]:.4g}" for name in ("accuracy", "loss", "perplexity") if name in result
        )
        self.show.say(f"{when}: {figures} over {result['rows']:,} rows")
        return result

    def _stop_if_asked(self) -> None:
        if not self.stop:
            return
        begun = self.saved_step >= 0
        if begun and self.saved_step != self.step:
            self._save()
        place = f"after step {self.step:,} of {self.steps.total:,}" if begun else "before the first step"
        raise Interrupted(
            f"stopped by {self.stop.signal} {place}",
            where=str(self.folder.path),
            hint="resume=True (--resume) goes on from here",
        )

    def _save(self) -> None:
        epoch, position = divmod(self.step, self.steps.per_epoch)
        state = self._figures() | {
            "epoch": epoch,
            "position": position,
            "eval_before": self.before,
            "identity": self.identity,
            "torch": torch.__version__,
        }
        save_checkpoint(
            self.folder.checkpoints,
            state,
            self.parameters,
            self.optimizer,
            self.device,
            keep=self.config.keep_checkpoints,
        )
        self.saved_step = self.step

    def _figures(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "steps": self.steps.total,
            "epochs": self.step / self.steps.per_epoch,
            "tokens": self.tokens,
            "training_seconds": self.training_seconds,
            "seconds": time.monotonic() - self.started,
            "lr": self.lr,
            "lr_rule": self.lr_rule,
            "optimizer": self.kind,
            "checkpointing": self.memory.checkpointing,
            "checkpointing_rule": self.memory.rule,
        }

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a resumed run to be the same run. What is only shown or kept may change."""
        adapter = capture(self.model, self.name)
        free = {"output", "data", "log_every", "checkpoint_every", "keep_checkpoints", "checkpointing"}
        train = {name: value for name, value in self.config.to_dict().items() if name not in free} | {"lr": self.lr}
        return {
            "train": train,
            "method": adapter.spec.to_dict(),
            "data": self.material.identity,
            "base": dict(adapter.base or {}),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "quant": stored_as(self.model),
            "device": self.device.type,
        }


def _finite(value: float) -> bool:
    return abs(value) < float("inf")  # false for NaN too
