"""TRL's SFTTrainer, its own `train()` running in a thread that waits at the beginning of every step.

So that its steps can take turns with others', and are all of what it does: loading, collating, logging, scheduling.
"""

# pyright: reportMissingImports=false, reportPrivateImportUsage=false
from __future__ import annotations

import tempfile
import threading
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from torch import Tensor
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from bench.trainers.contender import Contender, labels_of
from bench.trainers.peers import with_peft
from bench.trainers.work import Work

STEPS = 100_000  # more than anybody takes


def at_defaults(work: Work) -> Contender:
    """Whatever SFTConfig says, but that it autocasts only where the base is in bfloat16: checkpointing, padding."""
    return SFT(work)


def without_checkpointing(work: Work) -> Contender:
    """Nothing computed twice."""
    return SFT(work, gradient_checkpointing=False)


def packed(work: Work) -> Contender:
    """Nothing computed twice, nothing padded: all rows in one, by its own best-fit packing."""
    model = work.model()
    if work.device.type == "cuda" and find_spec("flash_attn"):  # else a mask of all tokens by all tokens
        model.set_attn_implementation("flash_attention_2")
    return SFT(work, model, gradient_checkpointing=False, packing=True, max_length=work.tokens)


class SFT(Contender):
    """A trainer whose `train()` is let go on for a step at a time. An epoch is one batch."""

    def __init__(self, work: Work, model: Any = None, **options: Any) -> None:
        super().__init__(*with_peft(work, model))
        rows = [{"input_ids": one.ids, "labels": labels_of(one)} for one in work.examples]
        options.setdefault("max_length", max(map(len, work.examples)))  # by default it cuts rows at 1,024 tokens
        disable_progress_bars()
        self.folder = tempfile.TemporaryDirectory()
        config = SFTConfig(
            output_dir=self.folder.name, max_steps=STEPS, per_device_train_batch_size=len(rows),
            bf16=work.dtype == torch.bfloat16, save_strategy="no", report_to="none", disable_tqdm=True,
            **options,
        )  # fmt: skip
        self.trainer: Any = _Trainer(
            model=self.model, args=config, train_dataset=Dataset.from_list(rows), processing_class=work.tokenizer
        )
        self.turns = _Turns()
        self.trainer.add_callback(self.turns)
        self.thread = threading.Thread(target=self._train, daemon=True)
        self.fault: BaseException | None = None
        self.thread.start()
        self._wait()
        self.optimizer = self.trainer.optimizer

    def _train(self) -> None:
        try:
            self.trainer.train()
        except _Over:
            pass
        except BaseException as error:  # whatever it is, the main thread raises it
            self.fault = error
        finally:
            self.turns.ready.set()

    def _wait(self) -> None:
        """Until the next step would begin."""
        self.turns.ready.wait()
        self.turns.ready.clear()
        if self.fault:
            raise self.fault

    def step(self, inside: AbstractContextManager[Any] | None = None) -> float:
        self.turns.inside = inside or nullcontext()
        self.turns.go.set()
        self._wait()
        return self.trainer.loss.item()

    def close(self) -> None:
        self.turns.stop = True
        self.turns.go.set()
        self.thread.join()
        self.folder.cleanup()
        self.turns.inside = nullcontext()
        super().close()
        del self.trainer


class _Over(Exception):
    """Nobody wants another step."""


class _Trainer(SFTTrainer):
    loss: Tensor

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.loss = super().training_step(*args, **kwargs)
        return self.loss


class _Turns(TrainerCallback):
    """Stops before each step until it may go, and does the step within a context."""

    def __init__(self) -> None:
        self.ready, self.go, self.stop = threading.Event(), threading.Event(), False
        self.inside: AbstractContextManager[Any] = nullcontext()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ready.set()
        self.go.wait()
        self.go.clear()
        if self.stop:
            raise _Over
        self.inside.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.inside.__exit__(None, None, None)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
