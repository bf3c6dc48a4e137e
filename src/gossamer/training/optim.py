"""The optimiser, the learning rate and its schedule."""

import math
from collections.abc import Callable, Collection, Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn

from gossamer.errors import UnsupportedError, UsageError
from gossamer.families import rate_exponent
from gossamer.methods import LoRA, TargetedMethod
from gossamer.models.language import text_config
from gossamer.training.config import RunConfig

ANCHOR = 5e-4
"""LoRA's learning rate at a hidden size of 2000: ten times full fine-tuning's 5e-5."""
EIGHT_BIT = {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit"}
"""Our name -> the class in bitsandbytes."""


def usable_optimizer(kind: str, device: torch.device) -> tuple[str, str]:
    """The optimiser that a device can run, and a line that says so where it is not the one of the config."""
    if kind in EIGHT_BIT and device.type != "cuda":
        return "adamw", f"optimizer {kind} needs a CUDA device; on {device.type} this run uses adamw, in float32"
    return kind, ""


def make_optimizer(
    parameters: Mapping[str, nn.Parameter],
    weight_decay: float,
    outer: Collection[str] = (),
    ratio: float = 1.0,
    kind: str = "adamw",
    neutral: Mapping[str, Tensor | None] = MappingProxyType({}),
) -> torch.optim.Optimizer:
    """AdamW over adapter parameters alone; its moments have the parameters' dtype, float32, or 8 bits.

    Args:
        parameters: "<path>.<slot>" -> parameter.
        outer: slots whose learning rate is `ratio` times the others' (LoRA+): the factors that are applied last.
        kind: "adamw", or a name in `EIGHT_BIT`, of which bitsandbytes keeps tensors below 4,096 numbers in float32.
        neutral: parameters that decay does not pull to zero -> what it pulls them to instead, or None for those that
            it leaves alone: `p = p - lr * weight_decay * (p - neutral)` in front of each step.

    Raises: UsageError for a ratio without an outer factor; UnsupportedError for 8-bit moments without bitsandbytes.
    Source: decay towards a value: Li et al. 2018, arXiv:1802.01483, equation 2, decoupled as in Loshchilov and Hutter
    2017, arXiv:1711.05101. LoRA+: Hayou et al. 2024, arXiv:2402.12354, section 4. 8-bit moments: Dettmers et al. 2022,
    arXiv:2110.02861, section 2; paged: Dettmers et al. 2023, arXiv:2305.14314, section 3.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        rate = ratio if name.rpartition(".")[2] in outer else 1.0
        groups.setdefault((rate, weight_decay == 0 or name not in neutral), []).append(parameter)
    if ratio != 1.0 and not any(rate == ratio for rate, _ in groups):
        raise UsageError("lr_ratio is about the factor B of LoRA, and this method has none", got=f"lr_ratio={ratio:g}")
    named = [
        {"params": members, "lr_ratio": rate, "weight_decay": weight_decay if to_zero else 0.0}
        for (rate, to_zero), members in groups.items()
    ]
    optimizer = _maker(kind)(named, lr=0.0, weight_decay=weight_decay)
    goals = {parameters[name]: goal for name, goal in neutral.items() if name in parameters and goal is not None}
    if weight_decay and goals:
        optimizer.register_step_pre_hook(lambda *_: _pull(optimizer, weight_decay, goals))
    return optimizer


@torch.no_grad()
def _pull(optimizer: torch.optim.Optimizer, weight_decay: float, goals: Mapping[nn.Parameter, Tensor]) -> None:
    """Decoupled weight decay of the parameters that have another goal than zero."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter in goals and parameter.grad is not None:
                parameter.lerp_(goals[parameter].to(parameter), group["lr"] * weight_decay)


def _maker(kind: str) -> Callable[..., torch.optim.Optimizer]:
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


def auto_lr(config: object, method: type[TargetedMethod] | TargetedMethod = LoRA) -> tuple[float, str]:
    """The learning rate for a model and a method, and a line that says how it came about.

        lr = 5e-4 * (2000 / hidden) ** p * lr_over_lora        p = 0.781 (Llama and others), 0.0775 (Qwen)

    Args:
        config: a transformers config; one that keeps its text's sizes inside another says them there.
        method: what is trained; how its rate compares with LoRA's is `lr_over_lora` of its class.

    Raises: UsageError when the config does not state a hidden size.
    Source: Schulman et al. 2025, "LoRA Without Regret", and its cookbook; within 0.5% of a sweep's best loss there.
    Each method's docstring says where its own factor comes from.
    """
    config = text_config(config)
    hidden = getattr(config, "hidden_size", None)
    if not isinstance(hidden, int) or hidden < 1:
        raise UsageError(
            "lr: auto needs the model's hidden size, which its config does not state", hint="set lr to a number"
        )
    power = rate_exponent(str(getattr(config, "model_type", "")))
    factor = method.lr_over_lora
    lr = ANCHOR * (2000 / hidden) ** power * factor
    own = "" if factor == 1 else f" x {factor:g} for {method.name}"
    return lr, f"lr auto: 5e-4 x (2000 / {hidden}) ^ {power}{own} = {lr:.3g}"


def peak_lr(config: object, run: RunConfig) -> tuple[float, str]:
    """The highest learning rate of a run on a model with this config, and a line that says where it comes from."""
    lr = run.train.lr
    return auto_lr(config, run.method) if lr == "auto" else (lr, f"lr {lr:g}")


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
