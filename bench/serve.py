"""What does another adapter in every row cost, beside the base alone and beside PEFT's mixed batches?

Decoding: a step takes every sequence on by one token, with a key-value cache, to the likeliest token, and with all that
the library does besides. Reading: prompts of 64 tokens, to the first token of each. Before the clock starts, all have
read the same prompts, and agree on the next tokens and their probabilities.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import DynamicCache

import gossamer as gs
from bench.common import Row, Timing, interleaved, report
from bench.trainers.peers import canonical
from gossamer.adapter import Adapter
from gossamer.models import has_bfloat16_units
from gossamer.serving import Engine, Limits, Sampling, Sequence

BASE, RANK, PROMPT = "smollm2-135m", 8, 64
DECODING, READING = 11, 3
"""Rounds."""
TARGETS: Mapping[str, Any] = {"q, v": ("q_proj", "v_proj"), "all linear": "all-linear"}
CASES = ((1, 1), (8, 1), (8, 8), (32, 1), (32, 8), (32, 32))
MOST = 32
ROUNDING = {"float32": 1e-4, "bfloat16": 0.15}
"""Of log-probabilities, between ways to the same, in the mean over the rows."""


def dtypes() -> list[str]:
    """Those that this machine computes in at full speed, or those that GOSSAMER_DTYPES names."""
    full = ["bfloat16", "float32"] if has_bfloat16_units() else ["float32"]
    return os.environ["GOSSAMER_DTYPES"].split(",") if "GOSSAMER_DTYPES" in os.environ else full


def measure() -> list[Row]:
    """Base, ours and PEFT in turn, for every case."""
    gs.fetch(BASE)
    return [row for dtype in dtypes() for targets in TARGETS for row in _measured(dtype, targets)]


def _measured(dtype: str, targets: str) -> list[Row]:
    (model, tokenizer), (bare, _) = (gs.load_base(BASE, dtype=dtype) for _ in range(2))
    about: dict[str, Any] = {"dtype": dtype, "adapters on": targets}
    rows = compared(model, tokenizer, bare, TARGETS[targets])
    return [{**about, **row} for row in rows]


def compared(
    model: Any,
    tokenizer: Any,
    bare: Any,
    modules: Any,
    cases: Iterable[tuple[int, int]] = CASES,
    rounds: tuple[int, int] = (DECODING, READING),
) -> list[Row]:
    """Base, ours and PEFT in turn, for every case.

    Args:
        model: serves. bare: the same, for PEFT to change.
        modules: where adapters are. cases: requests, and adapters among them. rounds: of decoding, of reading.
    """
    made = {f"a{number:02}": _adapter(model, modules, number) for number in range(max(many for _, many in cases))}
    peft = _peft(bare, modules, made)
    rows: list[Row] = []
    for batch, many in cases:
        names = [f"a{row % many:02}" for row in range(batch)]
        draw = torch.Generator().manual_seed(0)
        words = min(model.config.vocab_size, len(tokenizer))  # an engine takes and draws tokens alone
        prompts = torch.randint(0, words, (batch, PROMPT), generator=draw)
        contenders: dict[str, Any] = {
            "the base, Gossamer": _Ours((model, tokenizer), {}, [""] * batch, prompts),
            "Gossamer": _Ours((model, tokenizer), made, names, prompts),
            "PEFT, mixed batch": _Peft(peft, names, prompts, words),
        }
        if model.device.type == "cuda":
            contenders["Gossamer, nothing recorded"] = _Ours((model, tokenizer), made, names, prompts, graphs=False)
        _same(contenders, ROUNDING[str(model.dtype).removeprefix("torch.")])
        about = {"requests": batch, "adapters": many}
        for what, tokens, count in (
            ("a decoding step", batch, rounds[0]),
            ("reading prompts", batch * PROMPT, rounds[1]),
        ):
            calls = {name: one.step if batch == tokens else one.read for name, one in contenders.items()}
            rows += _timed(about | {"what": what}, tokens, interleaved(calls, rounds=count, warmup=1))
        for one in contenders.values():
            one.close()
    return rows


def _timed(about: Row, tokens: int, times: Mapping[str, Timing]) -> list[Row]:
    plain, peers = times["the base, Gossamer"].median, times["PEFT, mixed batch"].median
    return [
        {
            **about,
            "contender": name,
            **time.row(),
            "tokens/s": round(tokens / time.median),
            "of the base": round(time.median / plain, 2),
            "times PEFT's": round(peers / time.median, 2),
        }
        for name, time in times.items()
    ]


def _same(contenders: Mapping[str, Any], rounding: float) -> None:
    found = {name: one.logprobs() for name, one in contenders.items()}
    base, his = found.pop("the base, Gossamer"), found.pop("PEFT, mixed batch")
    for name, mine in found.items():
        off, changed = ((mine - other).abs().mean().item() for other in (his, base))
        assert off < rounding, f"{name}: probabilities differ by {off:.1e}"
        least = max(2 * off, 0.05) if len(mine) > 1 else 0.0  # of one token chance may leave nearly as it was
        assert changed > least, f"{name}: the adapters change them by no more than {changed:.1e}"


class _Ours:
    def __init__(
        self, base: Any, made: Mapping[str, Adapter], names: list[str], prompts: torch.Tensor, graphs: bool = True
    ) -> None:
        used = {name: made[name] for name in names if name}
        limits = Limits(rows=len(names), tokens=PROMPT * len(names))
        self.engines = [Engine(base, used, limits=limits, prefixes=0) for _ in range(2)]
        for engine in self.engines:
            if not graphs:
                engine.decoder.graphs = None  # pyright: ignore[reportAttributeAccessIssue]
        self.names, self.prompts = names, prompts.tolist()
        self.sequences = self._submitted(self.engines[0])
        self.step = self.engines[0].step
        self.step()

    def _submitted(self, engine: Engine) -> list[Any]:
        sampling = Sampling(max_tokens=200, ignore_eos=True)
        return [
            engine.submit(Sequence(tuple(prompt), {name: 1.0} if name else {}, sampling))
            for prompt, name in zip(self.prompts, self.names, strict=True)
        ]

    def read(self) -> None:
        sequences = self._submitted(self.engines[1])
        self.engines[1].step()
        assert all(len(sequence.drawn) == 1 for sequence in sequences)
        for sequence in sequences:
            self.engines[1].cancel(sequence)

    def close(self) -> None:
        for engine in self.engines:
            engine.close()

    def logprobs(self) -> torch.Tensor:
        return torch.tensor([sequence.logprobs[0] for sequence in self.sequences])


class _Peft:
    def __init__(self, model: Any, names: list[str], prompts: torch.Tensor, words: int) -> None:
        self.model, self.names, self.prompts, self.words = model, names, prompts.to(model.device), words
        self.cache = DynamicCache()
        self.first = self._run(self.prompts, self.cache)
        self.next = self.first.argmax(-1, keepdim=True)

    def logprobs(self) -> torch.Tensor:
        return self.first.float().log_softmax(-1)[:, : self.words].max(-1).values.cpu()

    @torch.inference_mode()
    def _run(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        out = self.model(input_ids=ids, past_key_values=cache, adapter_names=self.names, logits_to_keep=1)
        return out.logits[:, -1]

    def step(self) -> None:
        self.next = self._run(self.next, self.cache).argmax(-1, keepdim=True)
        self.next.tolist()  # what is drawn has to be known

    def read(self) -> None:
        self._run(self.prompts, DynamicCache()).argmax(-1).tolist()

    def close(self) -> None:
        del self.cache


def _peft(bare: Any, modules: Any, made: Mapping[str, Adapter]) -> PeftModel:
    """PEFT's model of it with the same adapters, in the same dtype."""
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=modules, task_type="CAUSAL_LM")
    model: Any = None
    for name in made:
        if model is None:
            model = get_peft_model(bare, config, adapter_name=name, autocast_adapter_dtype=False)
        else:
            model.add_adapter(name, config, autocast_adapter_dtype=False)
    for full, value in model.named_parameters():
        name = next((one for one in made if f".{one}." in full), None)
        if name and "lora_" in full:
            path, _, slot = canonical(full.replace(f".{name}.", ".default.")).rpartition(".")
            with torch.no_grad():
                value.copy_(made[name].tensors[path][slot])
    return model.eval()


def _adapter(model: Any, modules: Any, seed: int) -> Adapter:
    gs.attach(model, gs.LoRA(r=RANK, alpha=2 * RANK, target_modules=modules), seed=seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gs.trainable_parameters(model, "default").values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw).to(parameter))
    made = gs.capture(model)
    gs.detach(model)
    return made


if __name__ == "__main__":
    report("serve", "What does another adapter in every row cost?", measure)
