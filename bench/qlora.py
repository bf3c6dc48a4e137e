"""What does a step on a base in 4 bits cost beside the same step on the dense base, and beside PEFT + bitsandbytes?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import gossamer as gs
from bench.common import Row, interleaved, report
from gossamer.kernels.losses import token_nll
from gossamer.models import has_bfloat16_units
from gossamer.models.locate import locate
from gossamer.models.quantizer import make_dense, packed_modules
from gossamer.quant import bitsandbytes

BASE, RANK, ROWS, TOKENS = "smollm2-135m", 8, 4, 128
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPE = torch.bfloat16 if torch.cuda.is_available() or has_bfloat16_units() else torch.float32


def measure() -> list[Row]:
    """One batch, the same factors, the same loss and optimiser; ratios of medians of interleaved steps."""
    gs.fetch(BASE)
    dense, _ = gs.load_base(BASE, dtype=DTYPE)
    packed, _ = gs.load_base(BASE, dtype=DTYPE, quant="nf4")
    twin = copy.deepcopy(packed)
    make_dense(twin, DTYPE)
    sizes = {"LoRA": _bytes(dense), "QLoRA": sum(one.packed.nbytes for one in packed_modules(packed).values())}
    models: dict[str, Any] = {"LoRA": dense, "QLoRA": packed, "twin": twin}
    for model in models.values():
        gs.attach(model, gs.LoRA(r=RANK), force_base=True)
        _train_a_little(model)
    models["PEFT + bitsandbytes"] = _theirs(gs.trainable_parameters(packed, "default"))
    sizes["PEFT + bitsandbytes"] = _their_bytes(models["PEFT + bitsandbytes"])
    ids = torch.randint(1000, 2000, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0)).to(dense.device)
    _check(models, ids)
    del models["twin"]
    times = interleaved({name: _step(model, ids) for name, model in models.items()}, rounds=9)
    plain = times["LoRA"].median
    return [
        {
            "step": f"{name}, {str(DTYPE).removeprefix('torch.')}",
            **times[name].row(),
            "of LoRA's": f"{times[name].median / plain:.3f}",
            "linear weights, MB": round(sizes[name] / 1e6, 1),
        }
        for name in times
    ]


def _bytes(model: nn.Module) -> int:
    named = {name.removesuffix(".weight"): weight for name, weight in model.named_parameters()}
    return sum(weight.nbytes for name, weight in named.items() if name.rpartition(".")[2] in TARGETS)


def _their_bytes(model: nn.Module) -> int:
    kind = bitsandbytes().nn.Linear4bit  # PEFT's wrapper has the same name, and shows the same weight again
    weights: list[Any] = [module.weight for module in model.modules() if isinstance(module, kind)]
    states = [weight.quant_state for weight in weights]
    scales = [part for state in states for part in (state.absmax, state.state2.absmax, state.offset)]
    return sum(part.nbytes for part in (*weights, *scales))


def _train_a_little(model: nn.Module) -> None:
    """The same small factors in every model: B is zero at first, and hides whatever A and its gradient are."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in gs.trainable_parameters(model, "default").values():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.device), alpha=0.01)
    model.train()


def _theirs(factors: dict[str, nn.Parameter]) -> Any:
    """PEFT on transformers' 4-bit model, without its float32 copies of embeddings and head; the same factors."""
    config: Any = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=DTYPE
    )
    model: Any = AutoModelForCausalLM.from_pretrained(
        locate(BASE), dtype=DTYPE, quantization_config=config, local_files_only=True
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    peft = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=16, target_modules=TARGETS)).train()
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if parameter.requires_grad:
                ours = name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight")
                parameter.copy_(factors[ours])
    return peft


def _check(models: dict[str, Any], ids: Tensor) -> None:
    """Before anything is timed: on the codes and on what they stand for, here and there, one loss and one gradient."""
    losses, norms, counts = {}, {}, {}
    for name, model in models.items():
        loss = _loss(model, ids)
        loss.backward()
        each = torch.stack([one.grad.float().norm() for one in model.parameters() if one.grad is not None])
        assert (each.isfinite() & (each > 0)).all(), f"{name}: a gradient that is zero or not finite"
        losses[name], norms[name], counts[name] = loss.item(), each.norm().item(), len(each)
        model.zero_grad()
    assert len({*counts.values()}) == 1, counts
    slack = max(1e-4, torch.finfo(DTYPE).eps)
    for name in ("QLoRA", "PEFT + bitsandbytes"):
        assert abs(losses[name] - losses["twin"]) < slack * losses["twin"], losses
        assert abs(norms[name] - norms["twin"]) < 10 * slack * norms["twin"], norms


def _loss(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits[:, :-1]
    return token_nll(logits.flatten(0, 1), ids[:, 1:].flatten()).mean()


def _step(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def step() -> None:
        _loss(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        if ids.is_cuda:
            torch.cuda.synchronize()  # the clock stops when the work is done, not when it is queued

    return step


if __name__ == "__main__":
    report("qlora", "What does a step on a base in 4 bits (NF4, double quantisation) cost?", measure)
