"""How close is a plan to what a training step really takes?

Live tensor bytes are followed through every operation of a real step of the library's own path: forward, backward,
clipping, fused AdamW. Every result passes through a dispatch mode that knows storages by their identity and hears from
each of them when it is freed, so views count once and nothing counts after its end. What a kernel allocates and frees
inside one operation is not seen; the process's resident set, which has the interpreter and all libraries in it, stands
beside.
"""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import gossamer as gs
from bench.common import Row, report
from gossamer.data.batches import Batch, collate
from gossamer.data.masks import Example
from gossamer.models import tiny
from gossamer.planning import Plan, plan
from gossamer.running.fast import fast_path
from gossamer.training.loss import supervised_nll
from gossamer.training.optim import make_optimizer

WIDE = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 4}
WIDE |= {"intermediate_size": 704, "vocab_size": 2048}
TOYS: dict[str, dict[str, Any]] = {
    "llama": WIDE,
    "qwen2": WIDE | {"vocab_size": 8192, "tie_word_embeddings": True},
    "gpt2": {"n_embd": 256, "n_layer": 4, "n_head": 8, "vocab_size": 2048},
    "mistral": WIDE | {"head_dim": 32, "num_key_value_heads": 4, "intermediate_size": 512},
    "gemma3": WIDE | {"head_dim": 32, "layer_types": ["full_attention"] * 4},
    "opt": {"hidden_size": 256, "num_attention_heads": 8, "num_hidden_layers": 4, "ffn_dim": 1024}
    | {"word_embed_proj_dim": 256, "vocab_size": 2048},
}
"""Toys wide enough that what is fixed does not decide."""


class Live(TorchDispatchMode):
    """While open, `now` is the bytes of all tensors known, and `peak` the most there has been."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.storages: dict[int, Any] = {}
        for tensor in known:
            self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        """Count the tensor's storage until it is freed; a tensor of the meta device has none."""
        if tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.storages and storage.nbytes():
            self.storages[key] = weakref.finalize(storage, self._freed, key, storage.nbytes())
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def _freed(self, key: int, size: int) -> None:
        del self.storages[key]
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self.add(value)
        return out


@dataclass(frozen=True)
class Case:
    """One configuration. `method` is lora, qv (LoRA on query and value), dora or full."""

    model: str
    method: str = "lora"
    quant: str | None = None
    batch: int = 2
    sequence: int = 256
    checkpointing: bool = False
    padded: bool = False
    supervised: float = 0.5
    dtype: str = "float32"
    fast: bool = False

    def __str__(self) -> str:
        marks = [self.model, self.method, self.quant or "", f"{self.batch}x{self.sequence}", self.dtype]
        marks += ["checkpointed" if self.checkpointing else "", "padded" if self.padded else ""]
        marks += ["fast" if self.fast else ""]
        return " ".join(mark for mark in marks if mark)

    def spec(self) -> gs.LoRA | gs.DoRA | gs.FullTuning:
        """What is trained."""
        pair = ("c_attn",) if self.model == "gpt2" else ("q_proj", "v_proj")
        kinds = {"qv": gs.LoRA(r=8, target_modules=pair), "dora": gs.DoRA(r=8), "full": gs.FullTuning()}
        return kinds.get(self.method) or gs.LoRA(r=8)

    def build(self) -> Any:
        """The model, quantised where that is asked for."""
        dtype = getattr(torch, self.dtype)
        if self.model in TOYS:
            model = tiny(self.model, dtype=dtype, **copy.deepcopy(TOYS[self.model]))
        else:
            model, _ = gs.load_base(self.model, dtype=self.dtype, device="cpu")
        if self.quant:
            from gossamer.quant import quantize_model

            quantize_model(model, self.quant, skip=["lm_head"])
        return model

    def planned(self, config: dict[str, Any]) -> Plan:
        """The prediction, from the config alone."""
        return plan(
            config, self.spec(), quant=self.quant, sequence=self.sequence, batch=self.batch, dtype=self.dtype,
            checkpointing=self.checkpointing, supervised=self.supervised, padded=self.padded, fused=self.fast,
        )  # fmt: skip


def toys() -> list[Case]:
    """A few, for the ordinary tests: seconds in all."""
    return [
        Case("llama"),
        Case("llama", "qv", padded=True),
        Case("llama", "full", batch=1, checkpointing=True),
        Case("llama", "dora", batch=1, dtype="bfloat16"),
        Case("llama", quant="nf4", checkpointing=True),
        Case("qwen2", quant="int8", supervised=0.2),
        Case("qwen2", "full", batch=1, sequence=128),
        Case("gpt2", batch=1, checkpointing=True),
        Case("opt", batch=1, supervised=1.0),
        Case("llama", fast=True),
        Case("llama", "qv", fast=True, dtype="bfloat16"),
        Case("qwen2", quant="nf4", fast=True, checkpointing=True),
        Case("gpt2", fast=True, supervised=1.0),
    ]


def grid() -> list[Case]:
    """All of them: method, quantisation, batch, sequence, checkpointing, on the real model and on toys."""
    real = "smollm2-135m"
    cases = [
        Case(real, method, batch=batch, sequence=sequence, checkpointing=checkpointing, padded=batch > 1)
        for method in ("lora", "qv", "full")
        for batch, sequence in ((1, 128), (2, 256))
        for checkpointing in (False, True)
    ]
    cases += [
        Case(real, quant=quant, batch=2, sequence=256, checkpointing=checkpointing)
        for quant in ("nf4", "int8")
        for checkpointing in (False, True)
    ]
    cases += [Case(real, batch=1, sequence=512, supervised=0.1), Case(real, "dora", batch=1, sequence=256)]
    cases += [
        Case(toy, method, batch=2, checkpointing=checkpointing, padded=toy == "mistral")
        for toy in ("gpt2", "mistral", "gemma3")
        for method in ("lora", "full")
        for checkpointing in (False, True)
    ]
    return [*cases, *toys()]


def batch_of(vocabulary: int, case: Case, options: dict[str, bool]) -> Batch:
    """Random tokens; the last share of each row has labels; a padded batch has one row that is a token shorter."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (case.batch, case.sequence), generator=draw).tolist()
    first = case.sequence - max(1, round((case.sequence - 1) * case.supervised))
    learned = [place >= first for place in range(case.sequence)]
    examples = [Example(row, learned, "") for row in ids]
    if case.padded:
        examples[0] = Example(ids[0][:-1], learned[:-1], "")
    return collate(examples, 0, packed=options.get("packed", False))


def step(model: Any, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """One step, as the training loop takes it."""
    loss = supervised_nll(model, batch).sum() / batch.supervised
    loss.backward()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measured(case: Case) -> tuple[int, int, dict[str, Any]]:
    """Peak of live tensor bytes in the second step, when the moments are there from its start; peak of the process's
    resident set in it (0 where the system does not tell); the model's config."""
    model = case.build()
    gs.attach(model, case.spec())
    if case.checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its new name is not in the oldest transformers we allow
            model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = make_optimizer(gs.trainable_parameters(model), 0.0)
    with fast_path(model) if case.fast else nullcontext() as fast:
        return _watched(model, optimizer, batch_of(model.config.vocab_size, case, fast.options() if fast else {}))


def _watched(model: Any, optimizer: torch.optim.Optimizer, batch: Batch) -> tuple[int, int, dict[str, Any]]:
    step(model, optimizer, batch)
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    known = [*model.parameters(), *model.buffers(), *states, batch.input_ids, batch.attention_mask]
    gc.collect()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest resident set so far
    with Live(known) as live:
        step(model, optimizer, batch)
    return live.peak, _highest_resident(), model.config.to_dict()


def _highest_resident() -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def rows_of(cases: Iterable[Case]) -> list[Row]:
    """One row a configuration."""
    rows = []
    for case in cases:
        peak, resident, config = measured(case)
        planned = case.planned(config)
        rows.append(
            {
                "configuration": str(case),
                "measured MB": round(peak / 1e6, 1),
                "planned MB": round(planned.peak / 1e6, 1),
                "planned / measured": round(planned.peak / peak, 4),
                "fullest at": planned.moment.name,
                "resident set MB": round(resident / 1e6),
            }
        )
    return rows


def measure() -> list[Row]:
    """The whole grid."""
    torch.set_num_threads(1)
    return rows_of(grid())


if __name__ == "__main__":
    report(
        "plan", "How close is a plan to what a training step takes?", measure, notes=str(__doc__).partition("\n\n")[2]
    )
