"""A contender: a whole training step on one batch, watched from outside in the same way for all of them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from bench.trainers.work import Observed, Work
from gossamer.data.masks import Example
from gossamer.planning.fake import LiveBytes

LR, CLIP, IGNORED = 2e-5, 1.0, -100
"""Of every contender: TRL's defaults, so that these need not be changed."""


class Contender:
    """Trains the parameters `named`, by canonical names, of a model; `step` is what is timed."""

    optimizer: Any

    def __init__(self, model: Any, named: dict[str, nn.Parameter]) -> None:
        self.model: Any = model
        self.named = named

    def step(self, inside: AbstractContextManager[Any] | None = None) -> float:
        """Batch, forward, backward, clipping, AdamW; the loss. All of it happens within `inside`."""
        raise NotImplementedError

    def observe(self) -> Observed:
        """Take a step, and keep the gradients that it makes and the memory it takes: bytes above the weights at the
        fullest moment, which are activations, gradients and the optimiser's state."""
        self.ready_state()
        gc.collect()
        found: dict[str, Tensor] = {}
        hooks = [one.register_post_accumulate_grad_hook(_keeper(found, name)) for name, one in self.named.items()]
        states = sum(state.nbytes for state in self.states())
        if self.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            loss = self.step()
            peak = torch.cuda.max_memory_allocated() - before
        else:
            live = LiveBytes([*self.model.parameters(), *self.model.buffers(), *self.states()])
            before = live.now
            loss = self.step(live)
            peak = live.peak - before
        for hook in hooks:
            hook.remove()
        return Observed(loss, found, peak + states)

    def ready_state(self) -> None:
        """Let the optimiser make its state; a step of no gradient changes nothing."""
        for parameter in self.named.values():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def values(self) -> dict[str, Tensor]:
        """What is trained."""
        return {name: parameter.detach().cpu() for name, parameter in self.named.items()}

    def states(self) -> list[Tensor]:
        """The optimiser's tensors."""
        return [value for one in self.optimizer.state.values() for value in one.values() if isinstance(value, Tensor)]

    def held(self) -> int:
        """Bytes of gradients and of the optimiser's state."""
        return sum(one.nbytes for one in (*self.named.values(), *self.states()))

    def close(self) -> None:
        """Give back what was held."""
        self.model, self.named, self.optimizer = None, {}, None


class Loop(Contender):
    """A plain loop around a function that computes the loss."""

    def __init__(self, model: Any, named: dict[str, nn.Parameter], loss: Callable[[], Tensor]) -> None:
        super().__init__(model, named)
        self.loss = loss
        self.optimizer = torch.optim.AdamW(named.values(), lr=LR, weight_decay=0.0, fused=True)

    def step(self, inside: AbstractContextManager[Any] | None = None) -> float:
        with inside or nullcontext():
            loss = self.loss()
            loss.backward()
            nn.utils.clip_grad_norm_(self.named.values(), CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            return loss.item()  # waits for the device

    def close(self) -> None:
        super().close()
        del self.loss


def padded(examples: list[Example], pad: int, device: torch.device) -> dict[str, Tensor]:
    """A batch as most people make it: padded on the right, -100 where nothing is learned."""
    width = max(map(len, examples))
    rest = [width - len(one) for one in examples]
    ids = [[*one.ids, *[pad] * more] for one, more in zip(examples, rest, strict=True)]
    mask = [[*[1] * len(one), *[0] * more] for one, more in zip(examples, rest, strict=True)]
    given = {"input_ids": ids, "attention_mask": mask}
    labels = [[*labels_of(one), *[IGNORED] * more] for one, more in zip(examples, rest, strict=True)]
    return {name: torch.tensor(value, device=device) for name, value in (given | {"labels": labels}).items()}


def labels_of(example: Example) -> list[int]:
    """Token ids where they are learned, -100 elsewhere."""
    return [one if learned else IGNORED for one, learned in zip(example.ids, example.supervised, strict=True)]


def transformers_loss(model: Any, work: Work) -> Callable[[], Tensor]:
    """The model's own loss on the padded batch."""
    return lambda: model(**padded(work.examples, work.pad, work.device), use_cache=False).loss


def _keeper(found: dict[str, Tensor], name: str) -> Callable[[Tensor], None]:
    def keep(parameter: Tensor) -> None:
        assert parameter.grad is not None
        with _disable_current_modes():  # not the contender's own memory
            found[name] = parameter.grad.detach().to("cpu", copy=True)

    return keep
