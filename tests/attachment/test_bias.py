"""Trained biases, wherever a module adds them."""

from __future__ import annotations

import torch
from torch import nn

import gossamer as gs
from tests.adapters import trained


def test_a_bias_along_another_dimension_than_the_last():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(2), nn.Linear(4, 5)).eval()
        x = torch.randn(2, 3, 2, 2)
    adapter = trained(net, gs.LoRA(r=2, bias="all"))
    assert {path for path, slots in adapter.tensors.items() if "bias" in slots} == {"0", "1", "3"}
    beside = net(x)
    gs.merge(net)
    torch.testing.assert_close(net(x), beside)
