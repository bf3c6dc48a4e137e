"""PEFT in a plain loop, in its variants; full fine-tuning with transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from bench.trainers.contender import Contender, Loop, transformers_loss
from bench.trainers.work import Observed, Work, truth


def with_peft(work: Work, model: Any = None, **options: Any) -> tuple[Any, dict[str, nn.Parameter]]:
    """PEFT's LoRA on the model with the work's factors, and what is trained by our names."""
    config = LoraConfig(r=work.rank, lora_alpha=2 * work.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    peft = get_peft_model(work.model() if model is None else model, config, **options).train()
    return peft, filled(peft, work.factors)


def filled(peft: nn.Module, factors: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    """A PEFT model's trained parameters by our names, after they were given the factors' values."""
    named = {canonical(name): one for name, one in peft.named_parameters() if one.requires_grad}
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(factors[name])
    return named


def canonical(name: str) -> str:
    """`base_model.model.<module>.lora_A.default.weight` -> `<module>.lora_A`."""
    return name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight")


def peft_loop(work: Work) -> Contender:
    """The loop of PEFT's own examples."""
    model, named = with_peft(work)
    return Loop(model, named, transformers_loss(model, work))


def peft_low_precision(work: Work) -> Contender:
    """Adapters in the base's dtype."""
    model, named = with_peft(work, autocast_adapter_dtype=False)
    return Loop(model, named, transformers_loss(model, work))


def peft_autocast(work: Work) -> Contender:
    """Adapters in float32 whose products run under autocast."""
    model, named = with_peft(work)
    return Loop(model, named, autocast(transformers_loss(model, work), work))


def peft_liger(work: Work) -> Contender:
    """With Liger's kernels in the model, its fused head and loss among them."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama  # pyright: ignore[reportMissingImports]

    base = work.model()
    apply_liger_kernel_to_llama(model=base)
    model, named = with_peft(work, base)
    return Loop(model, named, autocast(transformers_loss(model, work), work))


def full_loop(work: Work) -> Contender:
    """Every weight trained, with weights of its own."""
    model = work.model(own=True).requires_grad_(True)
    return Loop(model, dict(model.named_parameters()), transformers_loss(model, work))


def autocast(loss: Callable[[], Tensor], work: Work) -> Callable[[], Tensor]:
    """The same under autocast to the base's dtype."""

    def under() -> Tensor:
        with torch.autocast(work.device.type, work.dtype, enabled=work.dtype != torch.float32):
            return loss()

    return under


def truth_of_lora(work: Work) -> Observed:
    """By PEFT's modules in float64."""
    model, named = with_peft(work, work.model(own=True))
    return truth(model, named, work.examples)


def truth_of_full(work: Work) -> Observed:
    """By transformers' modules in float64."""
    model = work.model(own=True).requires_grad_(True)
    return truth(model, dict(model.named_parameters()), work.examples)
