"""Laws of several adapters at once: any order of any methods computes what merging them in that order gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

import gossamer as gs
from gossamer.methods import IA3, DoRA, LoRA, VeRA
from tests.adapters import bits, same_bits, trained
from tests.laws.nets import towers
from tests.laws.specs import LOOSER
from tests.laws.test_laws import law

STACKS = {
    "lora": LoRA(r=2),
    "dora": DoRA(r=2),
    "vera": VeRA(target_modules="all-linear", r=3),
    "ia3": IA3(target_modules="all-linear", feedforward_modules=r"layers\.1.*"),
}
"""Methods that stand around a call, so that others can stand around them."""


@pytest.mark.parametrize("outer", STACKS)
@pytest.mark.parametrize("inner", STACKS)
@law
@given(case=towers())
def test_two_at_once_are_what_they_merge_to(inner: str, outer: str, case):
    net, x = case.net(), case.x()
    before = bits(net)
    trained(net, STACKS[inner], "inner", 1)
    trained(net, STACKS[outer], "outer", 2)
    gs.use(net, "inner", "outer")
    beside = net(x)
    gs.merge(net, "inner", "outer")
    tolerance = case.tolerance * max(LOOSER.get(name, 1.0) for name in (inner, outer))
    torch.testing.assert_close(net(x), beside, rtol=tolerance, atol=tolerance)
    gs.unmerge(net)
    assert same_bits(bits(net), before)
