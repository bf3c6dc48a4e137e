"""What does torch.compile do for a LoRA step? The general path, whose layers are transformers' own; blocks are fused.

Four decoder layers with random weights, in SmolLM2-135M's sizes on a CPU and in an 8B model's on CUDA, rank 8 at every
linear map, one row of tokens, forward and backward without an optimizer. Compile time is a column of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gossamer as gs
from bench.common import Row, interleaved, report

LAYERS, ROUNDS, TOLERANCE = 4, 7, {torch.float32: 1e-4, torch.bfloat16: 5e-2}
_SHAPE = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
SIZES = {"cpu": (576, 1536, 9, 3), "cuda": (4096, 14336, 32, 8)}
TOKENS = {"cpu": 1472, "cuda": 4096}


def measure(tokens: int | None = None) -> list[Row]:
    """A row a contender; each has the gradients of the eager one before anything is timed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    ids = torch.arange(tokens or TOKENS[device], device=device).remainder(64).unsqueeze(0)
    models = {
        "eager": _model(device, dtype),
        "norms and activations compiled": _compiled(_model(device, dtype), parts=True),
        "whole layers compiled": _compiled(_model(device, dtype), parts=False),
    }
    steps = {name: _step(model, ids) for name, model in models.items()}
    first = {name: _timed(step) for name, step in steps.items()}
    _check(models, TOLERANCE[dtype])
    times = interleaved(steps, rounds=ROUNDS, warmup=1)
    plain = times["eager"].median
    return [
        {"layers": name, **time.row(), "times eager": round(plain / time.median, 3), "first step s": first[name]}
        for name, time in times.items()
    ]


def _model(device: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=LAYERS, vocab_size=64, **dict(zip(_SHAPE, SIZES[device], strict=True)))
    model: Any = LlamaForCausalLM(config)
    model.to(device, dtype)
    gs.attach(model, gs.LoRA(r=8), seed=0)
    return model


def _compiled(model: Any, parts: bool) -> Any:
    for layer in model.model.layers:
        for one in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp.act_fn) if parts else (layer,):
            one.compile()
    return model


def _step(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad()
        model(ids, use_cache=False).logits.float().logsumexp(-1).mean().backward()
        if ids.is_cuda:
            torch.cuda.synchronize()

    return step


def _timed(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return round(time.perf_counter() - start, 2)


def _check(models: dict[str, Any], tolerance: float) -> None:
    """The same gradient in all, and one that is not zero."""
    flat = {
        name: torch.cat([_gradient(one) for one in gs.trainable_parameters(model, "default").values()])
        for name, model in models.items()
    }
    for name, gradient in flat.items():
        off = (gradient - flat["eager"]).norm() / flat["eager"].norm()
        assert off < tolerance, f"{name}: its gradient is {off:.1e} off"


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    assert 0 < parameter.grad.norm().item() < float("inf")
    return parameter.grad.flatten().double()


if __name__ == "__main__":
    report("compile", "What does torch.compile do for a LoRA step?", measure)
