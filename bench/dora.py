"""What does a training step of DoRA cost beside one of LoRA at the same rank, and beside PEFT's own pair?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import gossamer as gs
from bench.common import Row, interleaved, report
from gossamer.kernels.losses import token_nll

BASE, RANK, ROWS, TOKENS = "smollm2-135m", 8, 4, 128


def measure() -> list[Row]:
    """Four models, one batch, the same loss, the same optimiser; ratios of medians of interleaved steps."""
    gs.fetch(BASE)
    model, _ = gs.load_base(BASE, dtype="float32")
    ids = torch.randint(1000, 2000, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    models = {"LoRA": _ours(model, gs.LoRA(r=RANK)), "DoRA": _ours(model, gs.DoRA(r=RANK))}
    models |= {f"PEFT {kind}": _theirs(model, kind == "DoRA") for kind in ("LoRA", "DoRA")}
    _check(models, ids)
    steps = {name: _step(model, ids) for name, model in models.items()}
    times = interleaved(steps, rounds=9)
    return [{"step": name, **times[name].row(), **_ratio(times, name)} for name in times]


def _ratio(times: Any, name: str) -> Row:
    plain = name.replace("DoRA", "LoRA")
    return {"of LoRA's": f"{times[name].median / times[plain].median:.3f}"}


def _ours(model: Any, spec: Any) -> Any:
    twin = copy.deepcopy(model)
    gs.attach(twin, spec)
    return twin.train()


def _theirs(model: Any, dora: bool) -> Any:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=RANK, lora_alpha=16, target_modules=targets, use_dora=dora)
    return get_peft_model(copy.deepcopy(model), config).train()


def _check(models: dict[str, Any], ids: Tensor) -> None:
    """Before anything is timed: trained a little, ours and PEFT's compute the same from the same factors."""
    generator = torch.Generator().manual_seed(1)
    for kind in ("LoRA", "DoRA"):
        theirs = {
            name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight"): parameter
            for name, parameter in models[f"PEFT {kind}"].named_parameters()
            if parameter.requires_grad
        }
        ours = gs.trainable_parameters(models[kind], "default")
        assert ours.keys() == theirs.keys()
        with torch.no_grad():
            for name, parameter in ours.items():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.01)
                theirs[name].copy_(parameter)
            found, expected = models[kind](ids).logits, models[f"PEFT {kind}"](ids).logits
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def _step(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def step() -> None:
        logits = model(input_ids=ids).logits[:, :-1]
        token_nll(logits.flatten(0, 1), ids[:, 1:].flatten()).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    report("dora", "What does a training step of DoRA cost beside LoRA's, at the same rank?", measure)
