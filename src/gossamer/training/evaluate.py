"""How good is a model on held-out rows, by the measures of a task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gossamer.attachment import active
from gossamer.data.batches import Batch, BatchLayout, collate, plan_batches
from gossamer.data.formats import Records, Rows
from gossamer.data.masks import Overlong, encode
from gossamer.errors import UsageError
from gossamer.running.fast import Fast, fast_path
from gossamer.training.audit import keeping_modes, refuse_misfits
from gossamer.training.config import DataFiles
from gossamer.training.loss import supervised_nll
from gossamer.training.tasks import DEFAULT, TASKS, task_of
from gossamer.training.tasks.task import EncodingOptions, EvaluationPass, Figures, Task, Tick

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: str | Path | Rows | Records,
    *,
    task: str | Task = DEFAULT,
    batch_size: int = 16,
    labels: Sequence[str] | None = None,
    max_length: int = 1024,
    overlong: Overlong = "error",
    format: str | None = None,
    chat_template: bool = True,
    tick: Tick | None = None,
) -> dict[str, Any]:
    """Evaluate a model as it stands, adapters and all, without changing it or torch's random state.

    Rows go through the model as in training: one after another without padding, where the model can be packed.

    Args:
        model: one that fits the task: for "sft" and "classify" a causal language model.
        data: a data file, also of a catalog entry (`reviews/eval.jsonl`); rows; or records in memory, such as a list of
            dicts or a `datasets.Dataset`.
        task: a task, or the name of one.
        batch_size: sequences that go through the model at once.
        labels: what a classifier chooses from; the labels in the data when None.
        max_length, overlong, format, chat_template: as in `TrainConfig`.
        tick: called after each batch.

    Returns:
        sft: {"task", "rows", "loss" (nats a token), "perplexity", "tokens"}.
        classify: {"task", "rows", "accuracy", "loss" (nats a right label), "labels", "confusion" (rows true, columns
        predicted), "predictions" [{"where", "label", "predicted"}]}.

    Raises: DataError for rows or labels that cannot be used; UnsupportedError for a model that does not fit the task;
        NonFiniteError when the model's output is NaN or infinite.
    """
    chosen = with_labels(task_of(task), labels)
    rows = DataFiles.model_validate({"train": data, "format": format}).read()[0].rows
    held_out = chosen.held_out(rows, (), tokenizer, EncodingOptions(max_length, overlong, chat_template))
    return Evaluation(chosen, held_out, batch_size, pad_id(tokenizer))(model, tick).to_dict()


def with_labels(task: Task, labels: Sequence[str] | None) -> Task:
    """The task with these labels to choose from. Raises `UsageError` for one that chooses from none."""
    if labels is None:
        return task
    if "labels" not in type(task).model_fields:
        able = " and ".join(name for name, kind in TASKS.items() if "labels" in kind.model_fields)
        raise UsageError(f"only the task {able} has labels", got=f"task {task.name!r}")
    return task.replace(labels=tuple(labels))


def answer_batches(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: str | Path,
    *,
    batch_size: int = 8,
    **encoding: Any,
) -> list[Batch]:
    """The rows of a data file as batches for `answer_loss`, in the file's order. Raises `DataError`."""
    examples, device = encode(DataFiles(train=data).read()[0], tokenizer, **encoding), next(model.parameters()).device
    refuse_misfits(model, examples)
    plan = plan_batches(examples, batch_size, seed=0, epoch=0, shuffle=False)
    return [collate([examples[index] for index in indices], pad_id(tokenizer), device) for indices in plan]


def answer_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean over the supervised tokens of `-ln p(token)`, in nats; gradients flow."""
    return supervised_nll(model, batch).mean()


@dataclass(frozen=True)
class Evaluation:
    """Encoded rows, ready to be measured any number of times: `evaluation(model)`."""

    task: Task
    examples: Sequence[Any]
    batch_size: int
    pad_id: int

    @property
    def at_once(self) -> int:
        """Examples that go through the model at once."""
        return max(1, self.batch_size // self.task.sequences(self.examples))

    @property
    def batches(self) -> int:
        """How often `tick` is called."""
        return math.ceil(len(self.examples) / self.at_once)

    def __call__(self, model: nn.Module, tick: Tick | None = None, fast: Fast | None = None) -> Figures:
        """Measure a model; `fast` where its fast path is open already."""
        self.task.fits(model)
        packing = self.task.packs and isinstance(active(model), tuple)  # rows of adapters of their own are found by row
        opened = nullcontext(fast) if fast else fast_path(model, packing=packing, fused=False)
        with keeping_modes(model), torch.no_grad(), opened as way:
            model.eval()
            packed = packing and way.packed
            layout = BatchLayout(self.pad_id, next(model.parameters()).device, packed=packed)
            return self.task.judge(model, self.examples, EvaluationPass(layout, self.at_once, tick))


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to pad with. Which one does not matter: padding is neither attended to nor learned."""
    found = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(one) for one in found if isinstance(one, int))
