"""A contender in a process of its own: for libraries that change torch or transformers when they are imported."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from bench.trainers.contender import Contender, Loop, transformers_loss
from bench.trainers.peers import filled, with_peft
from bench.trainers.work import Observed, Work
from gossamer.data.masks import Example


@dataclass(frozen=True)
class Recipe:
    """What the other process makes its contender from."""

    folder: str
    """The base, as transformers saves it."""
    examples: list[Example]
    factors: dict[str, Tensor]
    rank: int
    dtype: torch.dtype
    threads: int


class Elsewhere(Contender):
    """Asks another process for each step. Its weights are copies."""

    def __init__(self, work: Work, make: Callable[[Recipe], Contender]) -> None:
        super().__init__(None, {})
        self.folder = tempfile.TemporaryDirectory()
        work.base.save_pretrained(self.folder.name)
        work.tokenizer.save_pretrained(self.folder.name)
        recipe = Recipe(
            self.folder.name, work.examples, work.factors, work.rank, work.dtype, torch.get_num_threads()
        )  # fmt: skip
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, recipe), daemon=True)
        self.process.start()
        theirs.close()
        self._answer()

    def step(self, inside: AbstractContextManager[Any] | None = None) -> float:
        return self._ask("step")

    def observe(self) -> Observed:
        return self._ask("observe")

    def values(self) -> dict[str, Tensor]:
        return self._ask("values")

    def held(self) -> int:
        return self._ask("held")

    def close(self) -> None:
        self.pipe.close()
        self.process.join()
        self.folder.cleanup()

    def _ask(self, verb: str) -> Any:
        self.pipe.send(verb)
        return self._answer()

    def _answer(self) -> Any:
        good, value = self.pipe.recv()
        if not good:
            raise RuntimeError(f"in the other process:\n{value}")
        return value


def _serve(pipe: Any, make: Callable[[Recipe], Contender], recipe: Recipe) -> None:
    """Make a contender, then do as asked until the pipe is closed."""
    torch.set_num_threads(recipe.threads)
    try:
        contender = make(recipe)
        pipe.send((True, None))
        while True:
            value = getattr(contender, pipe.recv())()
            pipe.send((True, value))
    except EOFError:
        return
    except Exception:  # told to the process that waits for it
        pipe.send((False, traceback.format_exc()))


def peft_there(recipe: Recipe) -> Contender:
    """PEFT's plain loop, to try the process itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    base: Any = AutoModelForCausalLM.from_pretrained(recipe.folder, dtype=recipe.dtype, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(recipe.folder, local_files_only=True)
    work = Work(base.to(device).requires_grad_(False), tokenizer, recipe.examples, recipe.rank, recipe.factors)
    model, named = with_peft(work)
    return Loop(model, named, transformers_loss(model, work))


def unsloth(recipe: Recipe) -> Contender:
    """Unsloth's model and adapter, no checkpointing, its fused loss on the padded batch."""
    from unsloth import FastLanguageModel  # pyright: ignore[reportMissingImports]

    longest = max(map(len, recipe.examples))
    base, tokenizer = FastLanguageModel.from_pretrained(
        recipe.folder, dtype=recipe.dtype, load_in_4bit=False, max_seq_length=longest
    )
    targets = sorted({name.split(".")[-2] for name in recipe.factors})
    model = FastLanguageModel.get_peft_model(
        base, r=recipe.rank, lora_alpha=2 * recipe.rank, target_modules=targets, lora_dropout=0, bias="none",
        use_gradient_checkpointing=False, max_seq_length=longest,
    )  # fmt: skip
    work = Work(base, tokenizer, recipe.examples, recipe.rank, recipe.factors)
    return Loop(model.train(), filled(model, recipe.factors), transformers_loss(model, work))
