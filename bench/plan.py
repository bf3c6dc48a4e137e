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
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gossamer as gs
from bench.common import Row, report
from gossamer.data.batches import Batch, collate
from gossamer.data.masks import Example
from gossamer.methods import METHODS, TargetedMethod
from gossamer.models import tiny
from gossamer.planning import Plan, plan
from gossamer.planning.fake import LiveBytes, tensors
from gossamer.planning.setting import TrainingSetting
from gossamer.planning.step import whole_output
from gossamer.running.fast import fast_path
from gossamer.training.loss import supervised_nll
from gossamer.training.memory import checkpointing
from gossamer.training.optim import make_optimizer

WIDE = {"hidden_size": 256, "num_attention_heads": 8, "num_hidden_layers": 5, "vocab_size": 2048}
GATED = WIDE | {"num_key_value_heads": 2, "intermediate_size": 704}
PLAIN = WIDE | {"intermediate_size": 1024}
PAIR: dict[str, Any] = {"d_model": 256, "vocab_size": 2048} | {
    f"{stack}_{field}": value
    for stack in ("encoder", "decoder")
    for field, value in (("layers", 5), ("attention_heads", 8), ("ffn_dim", 1024))
}
TOYS: dict[str, dict[str, Any]] = {
    "llama": GATED,
    "qwen2": GATED | {"vocab_size": 8192, "tie_word_embeddings": True},
    "gpt2": {"n_embd": 256, "n_layer": 5, "n_head": 8, "vocab_size": 2048},
    "mistral": GATED | {"head_dim": 32, "num_key_value_heads": 4, "intermediate_size": 512},
    "gemma": GATED | {"head_dim": 32},
    "gemma3": GATED | {"head_dim": 32, "layer_types": ["full_attention"] * 5},
    "mixtral": GATED,
    "qwen3_moe": GATED | {"head_dim": 32, "moe_intermediate_size": 256},
    "phi": PLAIN,
    "falcon": WIDE | {"ffn_hidden_size": 1024},
    "bloom": {"hidden_size": 256, "n_layer": 5, "n_head": 8, "vocab_size": 2048},
    "gpt_neox": PLAIN,
    "opt": WIDE | {"ffn_dim": 1024, "word_embed_proj_dim": 256},
    "t5": {"d_model": 256, "d_kv": 32, "d_ff": 1024, "num_layers": 5, "num_decoder_layers": 5, "num_heads": 8}
    | {"vocab_size": 2048},
    "bart": PAIR,
    "bert": PLAIN,
    "bert_mlm": PLAIN,
    "roberta": PLAIN,
    "deberta_v2": PLAIN,
    "llama_classifier": GATED,
    "vit": {"hidden_size": 256, "num_attention_heads": 8, "num_hidden_layers": 5, "intermediate_size": 1024}
    | {"image_size": 64, "patch_size": 4},
}
"""Toys wide enough that what is fixed does not decide, and deep enough that a layer stands for others."""
TEXT = ("llama", "qwen2", "gpt2", "mistral", "gemma", "gemma3", "mixtral", "qwen3_moe", "phi", "falcon", "bloom")
TEXT += ("gpt_neox", "opt")
"""Those that are trained on the next token."""


@dataclass(frozen=True)
class Case:
    """One configuration. `method` is lora, qv (LoRA on query and value), dora or full."""

    model: str
    method: str = "lora"
    quant: str | None = None
    batch: int = 2
    sequence: int = 128
    checkpointing: bool = False
    padded: bool = False
    supervised: float = 0.5
    dtype: str = "float32"
    fast: bool = True

    def __str__(self) -> str:
        marks = [self.model, self.method, self.quant or "", f"{self.batch}x{self.sequence}", self.dtype]
        marks += ["checkpointed" if self.checkpointing else "", "padded" if self.padded else ""]
        marks += ["" if self.fast else "plain"]
        return " ".join(mark for mark in marks if mark)

    def spec(self) -> TargetedMethod:
        """What is trained."""
        pair = ("c_attn",) if self.model == "gpt2" else ("q_proj", "v_proj")
        starts = {"qv": gs.LoRA(r=8, target_modules=pair), "pissa": gs.LoRA(r=8, start="pissa")}
        starts["dropout"] = gs.LoRA(r=8, dropout=0.1)
        return starts.get(self.method) or METHODS[self.method]()

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

    def planned(self) -> Plan:
        """The prediction, from the classes alone."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shape: Any = replace(self, quant=None).build() if self.model in TOYS else self.model
        return plan(
            shape, self.spec(), quant=self.quant, sequence=self.sequence, batch=self.batch, dtype=self.dtype,
            checkpointing=self.checkpointing, supervised=self.supervised, padded=self.padded, fused=self.fast,
        )  # fmt: skip


def toys() -> list[Case]:
    """A few, for the ordinary tests: seconds in all."""
    return [
        Case("llama"),
        Case("llama", "qv", padded=True, fast=False),
        Case("llama", "full", batch=1, checkpointing=True),
        Case("llama", "dora", batch=1, dtype="bfloat16"),
        Case("qwen2", quant="nf4", checkpointing=True),
        Case("gpt2", batch=1, checkpointing=True),
        Case("mixtral"),
        Case("bert", "houlsby"),
        Case("t5"),
        Case("vit", "full"),
    ]


def grid() -> list[Case]:
    """All of them: architectures, methods, quantisation, sizes, checkpointing, types."""
    cases = [Case(toy) for toy in TOYS]
    cases += [Case(toy, "full", checkpointing=True) for toy in ("gpt2", "mixtral", "phi", "bert", "vit", "gemma")]
    cases += [Case(toy, checkpointing=True) for toy in ("llama", "gemma3", "opt", "bert", "bart", "vit", "bloom")]
    cases += [Case("llama", one) for one in METHODS if one not in ("lora", "bitfit")]
    cases += [Case("gpt2", one) for one in ("bitfit", "dora", "ia3", "houlsby", "prefix", "prompt", "full", "vera")]
    cases += [Case("bert", one) for one in ("bitfit", "dora", "ia3", "norm", "lin")]
    cases += [Case("llama", "pissa"), Case("llama", "dropout"), Case("llama", "qv")]
    cases += [Case(toy, quant=quant) for toy in ("llama", "gpt2", "mixtral") for quant in ("nf4", "int8")]
    cases += [
        Case("llama", quant="nf4", checkpointing=True, batch=4),
        Case("t5", quant="nf4"),
        Case("vit", quant="nf4"),
    ]
    cases += [Case(toy, padded=True, batch=3) for toy in ("llama", "gemma3", "falcon", "mistral")]
    cases += [Case("llama", batch=batch, sequence=tokens) for batch, tokens in ((1, 512), (8, 32), (1, 64))]
    cases += [Case("qwen2", supervised=share) for share in (0.05, 1.0)]
    cases += [Case(toy, dtype="bfloat16") for toy in ("llama", "gpt2", "vit", "mixtral")]
    cases += [Case(toy, fast=False) for toy in ("llama", "gpt2")]
    return [*dict.fromkeys([*cases, *toys()])]


def batch_of(vocabulary: int, case: Case, packed: bool) -> Batch:
    """Random tokens; the last share of each row has labels; a padded batch has one row that is a token shorter."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (case.batch, case.sequence), generator=draw).tolist()
    first = case.sequence - max(1, round((case.sequence - 1) * case.supervised))
    learned = [place >= first for place in range(case.sequence)]
    examples = [Example(row, learned, "") for row in ids]
    if case.padded:
        examples[0] = Example(ids[0][:-1], learned[:-1], "")
    return collate(examples, 0, packed=packed)


def step(compute: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> None:
    """One step, as the training loop takes it."""
    compute().backward()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measured(case: Case) -> tuple[int, int]:
    """Peak of live tensor bytes in the second step, when the moments are there from its start; and peak of the
    process's resident set in it, 0 where the system does not tell."""
    model = case.build()
    gs.attach(model, case.spec())
    model.train()
    optimizer = make_optimizer(gs.trainable_parameters(model), 0.0)
    with ExitStack() as stack:
        fast = stack.enter_context(fast_path(model, fused=case.fast))
        stack.enter_context(checkpointing(model, case.checkpointing))
        if case.model not in TEXT:
            setting = TrainingSetting(case.sequence, case.batch, dtype=case.dtype)
            return _watched(model, optimizer, lambda: whole_output(model, setting))
        packed = fast.packed and not case.padded
        batch = batch_of(model.config.vocab_size, case, packed)
        return _watched(model, optimizer, lambda: supervised_nll(model, batch).sum() / batch.supervised, batch)


def _watched(
    model: Any, optimizer: torch.optim.Optimizer, compute: Callable[[], Tensor], batch: Any = None
) -> tuple[int, int]:
    step(compute, optimizer)
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    known = [*model.parameters(), *(one for one in tensors(model).values()), *states]
    known += [batch.input_ids, batch.attention_mask] if batch else []
    gc.collect()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest resident set so far
    with LiveBytes(known) as live:
        step(compute, optimizer)
    return live.peak, _highest_resident()


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
        peak, resident = measured(case)
        planned = case.planned()
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
