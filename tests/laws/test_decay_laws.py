"""Weight decay leads back to the base: without gradients, many steps of it bring the output towards the base's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gossamer as gs
from gossamer.attachment import neutral_values
from gossamer.training.optim import make_optimizer, set_lr
from tests.adapters import shaken
from tests.laws.nets import Case, cases
from tests.laws.specs import MOVE_AT_THE_START, SPECS
from tests.laws.test_laws import every_method, law


def decayed(net: torch.nn.Module, steps: int, kind: str = "adamw") -> None:
    """AdamW with a weight decay of 1 and gradients of zero."""
    parameters = gs.trainable_parameters(net, "default")
    optimizer = make_optimizer(parameters, 1.0, kind=kind, neutral=neutral_values(net, "default"))
    set_lr(optimizer, 0.1)
    for _ in range(steps):
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()


def away(net: torch.nn.Module, case: Case) -> float:
    """How far the output is from the base's."""
    with torch.no_grad():
        adapted = net(case.x()).float()
        with gs.using(net, None):
            return (adapted - net(case.x()).float()).norm().item()


@every_method
@settings(parent=law, max_examples=6)
@given(data=st.data())
def test_decay_leads_to_the_base(method: str, data: st.DataObject):
    case = data.draw(cases(method))
    net = case.net()
    gs.attach(net, data.draw(SPECS[method]))
    shaken(net, "default", scale=0.3)
    before = away(net, case)
    own = {name: value.clone() for name, value in gs.trainable_parameters(net, "default").items()}
    decayed(net, 80)
    if method in MOVE_AT_THE_START:  # virtual tokens have nothing to be led to, so they are left alone
        moved = {name for name, value in gs.trainable_parameters(net, "default").items() if not value.equal(own[name])}
        assert not any(name.endswith("prompt_embeddings") for name in moved)
    else:
        assert away(net, case) <= 0.05 * before + case.tolerance


def test_a_factor_of_lora_is_pulled_to_zero_as_torch_does_it():
    """What no layer names is decayed as torch does it, so LoRA's own runs keep their bits."""
    one, two = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    ours, theirs = (
        make_optimizer({"a.lora_A": one}, 0.1),
        torch.optim.AdamW([two], lr=0.0, weight_decay=0.1, fused=True),
    )
    set_lr(ours, 1e-2)
    theirs.param_groups[0]["lr"] = 1e-2
    for _ in range(3):
        one.grad, two.grad = torch.ones(3), torch.ones(3)
        ours.step()
        theirs.step()
    assert torch.equal(one, two)


def test_a_goal_of_none_is_left_alone_and_the_ratio_of_lora_plus_counts():
    slots = {name: torch.nn.Parameter(torch.full((2,), 3.0)) for name in ("a.lora_B", "a.scale", "a.prompt")}
    optimizer = make_optimizer(
        slots, 0.5, ("lora_B", "scale"), 4.0, neutral={"a.scale": torch.ones(2), "a.prompt": None}
    )
    set_lr(optimizer, 0.1)
    for slot in slots.values():
        slot.grad = torch.zeros(2)
    optimizer.step()
    factor = 1 - 0.1 * 4 * 0.5
    assert slots["a.lora_B"][0].item() == pytest.approx(3 * factor)
    assert slots["a.scale"][0].item() == pytest.approx(1 + 2 * factor)
    assert slots["a.prompt"][0].item() == 3.0
