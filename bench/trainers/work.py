"""What every contender of `bench.training` is given: a base, rows, the adapter's first values, and the true answer."""

from __future__ import annotations

import copy
import csv
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerBase

import gossamer as gs
from bench.common import ROOT
from gossamer.data.masks import Example
from gossamer.models import data_file, tiny, tiny_tokenizer

SYSTEM = "You write for a guide of places to eat. Say what the facts say, all of it, in plain words, and add nothing:"
PREFIX = 24
UNEVEN = ((164, 71), (191, 30), (156, 52), (154, 38), (116, 64), (139, 25), (101, 47), (101, 26))
"""Tokens of the prompt and the answer of each row: 1,475 in all, 353 of them learned, 1,880 when padded."""
WORKLOADS = {"instructions": UNEVEN, "full rows": ((0, 184),) * 8}
"""Rows of uneven length that begin alike, prompts masked; rows of one length, every token learned."""

_SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
_SHAPE += ("vocab_size", "tie_word_embeddings")
SHAPES: dict[str, dict[str, Any]] = {
    "1b": dict(zip(_SHAPE, (2048, 16, 32, 8, 8192, 128256, True), strict=True)),
    "3b": dict(zip(_SHAPE, (3072, 28, 24, 8, 8192, 128256, True), strict=True)),
    "8b": dict(zip(_SHAPE, (4096, 32, 32, 8, 14336, 128256, False), strict=True)),
}
"""Of Llama 3, for random weights."""
_LARGEST = 2 * 10**9  # parameters that are still followed in float64


@dataclass(frozen=True)
class Observed:
    """One step: its loss, the gradient of each trained parameter before clipping, and its peak of memory."""

    loss: float
    gradients: dict[str, Tensor]
    peak: int = 0


@dataclass(frozen=True)
class Work:
    """One workload on one base. Models made from it share the frozen weights, so that many fit into memory."""

    base: Any
    tokenizer: PreTrainedTokenizerBase
    examples: list[Example]
    rank: int
    factors: dict[str, Tensor]
    """The adapter's first values, by "<module>.lora_A" and "<module>.lora_B"; no factor is zero."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the base."""
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        """Where the base is."""
        return self.base.device

    @property
    def pad(self) -> int:
        """A token id for padding."""
        found: Any = self.tokenizer.pad_token_id
        return int(found)

    @property
    def tokens(self) -> int:
        """Real tokens of the batch."""
        return sum(map(len, self.examples))

    @property
    def supervised(self) -> int:
        """Tokens that are learned and have one before them."""
        return sum(sum(one.supervised[1:]) for one in self.examples)

    def model(self, own: bool = False) -> Any:
        """The base again, in training mode, with the same weights or its own."""
        held = [*self.base.parameters(), *self.base.buffers()]
        return copy.deepcopy(self.base, {} if own else {id(one): one for one in held}).train()


def load_base(base: str, shape: str | None, dtype: torch.dtype) -> tuple[Any, PreTrainedTokenizerBase]:
    """A real model and its tokenizer, a toy, or random weights in the shape of a large one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if shape:
        config = LlamaConfig(max_position_embeddings=8192, rope_theta=500000.0, **SHAPES[shape])  # pyright: ignore[reportCallIssue]
        torch.manual_seed(0)
        with torch.device(device):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        return model.requires_grad_(False), tiny_tokenizer()
    if base == "tiny":
        return tiny("llama", dtype=dtype).to(device).requires_grad_(False), tiny_tokenizer()  # pyright: ignore[reportArgumentType]
    gs.fetch(base)
    model, tokenizer = gs.load_base(base, dtype=dtype)
    return model.requires_grad_(False), tokenizer


def make_rows(lengths: Sequence[tuple[int, int]], stream: Sequence[int], system: Sequence[int]) -> list[Example]:
    """Rows of these lengths, cut from the stream one after the other; those with a prompt begin with `system`."""
    rows, start = [], 0
    for number, (prompt, answer) in enumerate(lengths):
        head = [*system[: min(prompt, len(system))]]
        stop = start + prompt + answer - len(head)
        ids = [*head, *stream[start:stop]]
        assert len(ids) == prompt + answer, f"{len(stream):,} tokens of text are too few"
        rows.append(Example(ids, [place >= prompt for place in range(len(ids))], f"row {number}"))
        start = stop
    return rows


def token_stream(
    tokenizer: PreTrainedTokenizerBase, vocabulary: int, count: int, real: bool
) -> tuple[list[int], list[int]]:
    """So many tokens of text, and those that rows begin with; random ones for a model that knows no language."""
    if not real:
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(0, min(vocabulary, 250), (count + PREFIX,), generator=draw).tolist()
        return ids[PREFIX:], ids[:PREFIX]
    system = tokenizer(SYSTEM)["input_ids"]
    ids: list[int] = []
    for text in _texts():
        ids += tokenizer(text)["input_ids"]
        if len(ids) >= count:
            break
    return ids, [*system[:PREFIX]]


def _texts() -> list[str]:
    """Facts with their sentences from E2E, ../shared/data/e2e/train.csv or the folder that E2E names; else reviews."""
    table = Path(os.environ.get("E2E", ROOT.parent / "shared" / "data" / "e2e")) / "train.csv"
    if table.is_file():
        with table.open(encoding="utf-8", newline="") as stream:
            return [f"{row['mr']}\n{row['ref']}\n" for row in csv.DictReader(stream)]
    gs.fetch("reviews")
    lines = data_file("reviews/train.jsonl").read_text(encoding="utf-8").splitlines()
    return [f"{row['prompt']}{row['completion']}\n" for row in map(json.loads, lines)]


def first_factors(base: Any, rank: int) -> dict[str, Tensor]:
    """The same small factors for everybody: B is zero at first, and would hide what A and its gradient are."""
    model = copy.deepcopy(base, {id(one): one for one in [*base.parameters(), *base.buffers()]})
    gs.attach(model, gs.LoRA(r=rank, alpha=2 * rank))
    draw = torch.Generator().manual_seed(1)
    return {
        name: parameter.detach().cpu() + 0.01 * torch.randn(parameter.shape, generator=draw)
        for name, parameter in gs.trainable_parameters(model, "default").items()
    }


# The truth -----------------------------------------------------------------------------------------------------------


def truth(model: Any, named: dict[str, nn.Parameter], examples: Sequence[Example]) -> Observed:
    """Loss and gradients in float64: one row at a time, so that nothing is padded, packed, shared, or fused.

    The largest models are followed in float32. Changes the model, which must have weights of its own.
    """
    wide = torch.float64 if sum(one.numel() for one in model.parameters()) < _LARGEST else torch.float32
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):  # transformers' own computes in float32, whatever it is given
            width, eps = [*module.weight.shape], module.variance_epsilon
            module.forward = partial(nn.functional.rms_norm, normalized_shape=width, weight=module.weight, eps=eps)
    model.to(wide)
    supervised = sum(sum(one.supervised[1:]) for one in examples)
    total = 0.0
    for one in examples:
        ids = torch.tensor([one.ids], device=model.device)
        places = torch.tensor(one.supervised[1:], device=model.device).nonzero()[:, 0]
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=places).logits[0]
        loss = nn.functional.cross_entropy(logits, ids[0, places + 1], reduction="sum") / supervised
        loss.backward()
        total += loss.item()
    found = {name: parameter.grad.cpu() for name, parameter in named.items() if parameter.grad is not None}
    return Observed(total, found)
