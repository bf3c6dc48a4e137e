"""Gossamer, with one technique switched on after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import gossamer as gs
from bench.trainers.contender import Contender, Loop, transformers_loss
from bench.trainers.work import Work
from gossamer.data.batches import collate
from gossamer.methods.lora_layers import LoRALayer
from gossamer.running.blocks import blocks
from gossamer.running.packed import packed_attention
from gossamer.training.loss import supervised_nll


@dataclass(frozen=True)
class Variant:
    """What is switched on."""

    labels: bool = False
    """Only positions with a label meet the head, in chunks, and the loss's gradient is formed on the way forward."""
    functions: bool = False
    """Each adapted module is one function with its backward written out."""
    blocks: bool = False
    """So is each half of a decoder layer."""
    packed: bool = False
    """Rows one after another instead of side by side."""
    shared: bool = False
    """What rows begin with is computed once."""


NOTHING = Variant()
LABELS = replace(NOTHING, labels=True)
FUNCTIONS = replace(LABELS, functions=True)
BLOCKS = replace(FUNCTIONS, blocks=True)
PACKED = replace(BLOCKS, packed=True)
SHARED = replace(PACKED, shared=True)
VARIANTS = {
    "ours-nothing": ("Gossamer, everything off", NOTHING),
    "ours-labels": ("+ loss only at labels", LABELS),
    "ours-functions": ("+ fused functions", FUNCTIONS),
    "ours-blocks": ("+ fused blocks", BLOCKS),
    "ours-packed": ("+ packing", PACKED),
    "ours-shared": ("+ shared prefix", SHARED),
}
"""Key -> what the row is called, and what is on."""


def lora(variant: Variant) -> Callable[[Work], Contender]:
    """A contender that trains the work's adapter."""

    def make(work: Work) -> Contender:
        model = work.model()
        gs.attach(model, gs.LoRA(r=work.rank, alpha=2 * work.rank))
        named: Any = gs.trainable_parameters(model, "default")
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(work.factors[name])
        return Ours(model.train(), named, work, variant)

    return make


def full(variant: Variant) -> Callable[[Work], Contender]:
    """A contender that trains every weight, with weights of its own."""

    def make(work: Work) -> Contender:
        model = work.model(own=True)
        gs.attach(model, gs.FullTuning())
        return Ours(model.train(), dict(gs.trainable_parameters(model, "default")), work, variant)

    return make


class Ours(Loop):
    """The library's step with some of its techniques."""

    def __init__(self, model: Any, named: Any, work: Work, variant: Variant) -> None:
        super().__init__(
            model, named, ours_loss(model, work, variant) if variant.labels else transformers_loss(model, work)
        )
        self.variant, self.stack = variant, ExitStack()
        if variant.blocks:
            self.stack.enter_context(blocks(model))
        if variant.packed:
            self.stack.enter_context(packed_attention(model))

    def step(self, inside: AbstractContextManager[Any] | None = None) -> float:
        with plain_layers(not self.variant.functions):
            return super().step(inside)

    def close(self) -> None:
        self.stack.close()
        super().close()


def ours_loss(model: Any, work: Work, variant: Variant) -> Callable[[], Tensor]:
    """The mean loss of the batch's supervised tokens, as the training loop computes it."""

    def loss() -> Tensor:
        batch = collate(work.examples, work.pad, work.device, packed=variant.packed, shared=variant.shared)
        return supervised_nll(model, batch).sum() / batch.supervised

    return loss


@contextmanager
def plain_layers(wanted: bool) -> Iterator[None]:
    """If wanted, let adapted modules do what the equation says, operation by operation."""
    with patch.object(LoRALayer, "plain_pair", lambda layer: None) if wanted else ExitStack():
        yield
