"""The optimiser, the learning rate and its schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from functools import partial

import torch
from torch import nn

from gossamer.errors import UnsupportedError, UsageError

ANCHOR = 5e-4
"""Learning rate at a hidden size of 2000: ten times full fine-tuning's 5e-5."""
EXPONENTS = {"qwen": 0.0775}
"""Family -> how the best learning rate falls with the hidden size; others behave as Llama does."""
LLAMA = 0.781
EIGHT_BIT = {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit"}
"""Our name -> the class in bitsandbytes."""


def usable_optimizer(asked: str, device: torch.device) -> tuple[str, str]:
    """The optimiser that a device can run, and a line that says so when it is not the one that was asked for."""
    if asked in EIGHT_BIT and device.type != "cuda":
        return "adamw", f"optimizer {asked} needs a CUDA device; on {device.type} this run uses adamw, in float32"
    return asked, ""


def make_optimizer(
    parameters: Mapping[str, nn.Parameter],
    weight_decay: float,
    outer: Collection[str] = (),
    ratio: float = 1.0,
    kind: str = "adamw",
) -> torch.optim.Optimizer:
    """AdamW over adapter parameters alone; its moments have the parameters' dtype, float32, or 8 bits.

    Args:
        parameters: "<path>.<slot>" -> parameter.
        outer: slots whose learning rate is `ratio` times the others' (LoRA+): the factors that are applied last.
        kind: "adamw", or a name in `EIGHT_BIT`, of which bitsandbytes keeps tensors below 4,096 numbers in float32.

    Raises: UsageError when a ratio is asked for and no parameter is an outer factor; UnsupportedError when an 8-bit
    optimiser is asked for and bitsandbytes is not there.
    Source: LoRA+: Hayou et al. 2024, arXiv:2402.12354, section 4. 8-bit moments: Dettmers et al. 2022,
    arXiv:2110.02861, section 2; paged: Dettmers et al. 2023, arXiv:2305.14314, section 3.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(ratio if name.rpartition(".")[2] in outer else 1.0, []).append(parameter)
    if ratio != 1.0 and ratio not in groups:
        raise UsageError("lr_ratio is about the factor B of LoRA, and this method has none", got=f"lr_ratio={ratio:g}")
    named = [{"params": members, "lr_ratio": factor} for factor, members in groups.items()]
    return _maker(kind)(named, lr=0.0, weight_decay=weight_decay)


def _maker(kind: str) -> Callable[..., torch.optim.Optimizer]:
    """What makes an optimiser of a kind."""
    if kind == "adamw":  # fused: hundreds of small tensors; on a CPU seven of eight parts of a plain step are overhead
        return partial(torch.optim.AdamW, fused=True)
    from gossamer.quant import bitsandbytes

    library = bitsandbytes()
    if library is None:
        raise UnsupportedError(
            "8-bit AdamW comes from bitsandbytes, which is not installed",
            got=f"optimizer: {kind}",
            hint="pip install 'gossamer[quant]', or optimizer: adamw",
        )
    return getattr(library.optim, EIGHT_BIT[kind])


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the next step; a group's own is `lr_ratio` times it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_ratio"]


def auto_lr(config: object) -> tuple[float, str]:
    """The learning rate for a model, and a line that says how it came about.

        lr = 5e-5 * 10 * (2000 / hidden) ** p        p = 0.781 (Llama and others), 0.0775 (Qwen)

    Args:
        config: a transformers config.

    Raises: UsageError when it does not state a hidden size.
    Source: Schulman et al. 2025, "LoRA Without Regret", and its cookbook; within 0.5% of a sweep's best loss there.
    """
    hidden = getattr(config, "hidden_size", None)
    if not isinstance(hidden, int) or hidden < 1:
        raise UsageError(
            "lr: auto needs the model's hidden size, which its config does not state", hint="set lr to a number"
        )
    kind = str(getattr(config, "model_type", ""))
    power = next((value for family, value in EXPONENTS.items() if kind.startswith(family)), LLAMA)
    lr = ANCHOR * (2000 / hidden) ** power
    return lr, f"lr auto: 5e-5 x 10 x (2000 / {hidden}) ^ {power} = {lr:.3g}"


def warmup_steps(warmup: float, total: int) -> int:
    """`warmup` as a number of steps: below 1 it is a share of `total`."""
    return round(warmup * total) if warmup < 1 else int(warmup)


def lr_factor(step: int, total: int, warmup: int, schedule: str) -> float:
    """What the peak learning rate is multiplied by on a step; never zero, so that no step is wasted.

    Args:
        step: 0 for the first one.
        total: steps of the whole run.
        warmup: steps on which the factor rises, to 1 on the last of them.
        schedule: "linear", "cosine" or "constant".
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, total - warmup)
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
