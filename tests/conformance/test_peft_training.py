"""Training beside PEFT from one start, on one order of data: the same losses, step by step."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

import gossamer as gs
from tests.conformance.oracle import Toys, peft_config, spec

STEPS, RATE = 50, 5e-3


def curve(model: nn.Module, parameters: Iterable[nn.Parameter]) -> list[float]:
    """Losses of a plain AdamW loop; the loss itself in float64, so that it is no source of difference."""
    optimiser = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01)
    losses = []
    for step in range(STEPS):
        ids = torch.randint(0, 250, (4, 12), generator=torch.Generator().manual_seed(step % 8))
        logits = model(input_ids=ids).logits.double()
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


def start_alike(model: nn.Module, ours: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Copy our factors into PEFT's; returns PEFT's by our names, in our order."""
    theirs = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert theirs.keys() == ours.keys()
    for name, parameter in ours.items():
        theirs[name].data.copy_(parameter.data)
    return {name: theirs[name] for name in ours}


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_fifty_steps(name: str, scaling: str, toy: Toys):
    model, peft = toy(name), get_peft_model(toy(name), peft_config(name, "patterns", scaling))
    gs.attach(model, spec(name, "patterns", scaling))
    ours = gs.trainable_parameters(model, "default")
    theirs = start_alike(peft, ours)
    got, expected = curve(model, ours.values()), curve(peft, theirs.values())
    assert expected[-1] < expected[0] - 0.05, "it must learn something"
    assert max(abs(one - other) for one, other in zip(got, expected, strict=True)) <= 1e-4


def einsum(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    out = torch.einsum("bi,oi->bo", x, weight) + scaling * torch.einsum("bi,ri,or->bo", x, A, B)
    return out if bias is None else out + bias


def test_the_equation_itself():
    """PEFT is not its own referee: h = W x + b + alpha/r B A x by einsum, in float64."""
    layer = nn.Linear(7, 5).double()
    model, x = nn.Sequential(layer), torch.randn(3, 7, dtype=torch.float64)
    gs.attach(model, gs.LoRA(r=3, alpha=5.0))
    for parameter in gs.trainable_parameters(model).values():
        parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    slots = {slot: tensor.double() for slot, tensor in gs.capture(model).tensors["0"].items()}
    expected = einsum(x, layer.weight, layer.bias, slots["lora_A"], slots["lora_B"], 5 / 3)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    gs.merge(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
