"""Starts made of the weight, against PEFT and torch's own decompositions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import gossamer as gs
from gossamer.errors import NonFiniteError, UsageError
from gossamer.methods import LoRA, starts
from tests.adapters import bits, same_bits, shaken


def matrix(out: int = 12, inner: int = 9, seed: int = 0) -> Tensor:
    return torch.randn(out, inner, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scaling", [2.0, 0.25, -2.0])
@pytest.mark.parametrize("size", [(12, 9), (9, 12), (10, 10)])
def test_pissa_takes_the_principal_part(size: tuple[int, int], scaling: float):
    weight = matrix(*size).double()
    inner, outer = starts.pissa(weight, 3, scaling)
    left = torch.linalg.svdvals(weight - scaling * outer @ inner)
    rest = min(size) - 3
    torch.testing.assert_close(left[:rest], torch.linalg.svdvals(weight)[3:], rtol=1e-10, atol=1e-10)
    assert left[rest:].max() < 1e-10
    torch.testing.assert_close(inner.norm(dim=1), outer.norm(dim=0))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    ("start", "make"),
    [("pissa", nn.Linear), ("olora", nn.Linear), ("pissa", Conv1D)],  # PEFT's OLoRA takes a Conv1D the wrong way round
)
def test_as_peft_starts(start: Any, make: Any, rslora: bool):
    layer, transposed = make(12, 9), make is Conv1D
    net = nn.Sequential(layer)
    with torch.no_grad():
        layer.weight.copy_(matrix(*layer.weight.shape))
    before = layer.weight.detach().clone()
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["0"], use_rslora=rslora, fan_in_fan_out=transposed)
    config.init_lora_weights = start
    peft: Any = get_peft_model(net, config)  # pyright: ignore[reportArgumentType]
    theirs = {name.split(".")[-3]: p.detach() for name, p in peft.named_parameters() if "lora_" in name}
    scaling = 6 / (3**0.5 if rslora else 3)
    inner, outer = getattr(starts, start)(before.T if transposed else before, 3, scaling)
    torch.testing.assert_close(inner, theirs["lora_A"])
    torch.testing.assert_close(outer, theirs["lora_B"])
    residual = next(p.detach() for name, p in peft.named_parameters() if name.endswith("base_layer.weight"))
    change = scaling * outer @ inner
    torch.testing.assert_close(before - (change.T if transposed else change), residual, rtol=1e-4, atol=1e-5)


def test_pissa_fast_is_pissa():
    weight = matrix(40, 30).double()
    exact = starts.pissa(weight, 4, 2.0)
    fast = starts.pissa_fast(weight, 4, 2.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(fast[1] @ fast[0], exact[1] @ exact[0], rtol=0, atol=1e-7)
    torch.testing.assert_close(fast[0].norm(dim=1), exact[0].norm(dim=1), rtol=0, atol=1e-7)
    again = starts.pissa_fast(weight, 4, 2.0, torch.Generator().manual_seed(0))
    assert all(torch.equal(*pair) for pair in zip(fast, again, strict=True))
    rough = starts.pissa_fast(weight, 4, 2.0, torch.Generator().manual_seed(0), iterations=0)
    assert (rough[1] @ rough[0] - exact[1] @ exact[0]).norm() > 0.1


def test_olora_has_orthonormal_columns():
    weight = matrix()
    inner, outer = starts.olora(weight, 4, 2.0)
    torch.testing.assert_close(outer.T @ outer, torch.eye(4))
    torch.testing.assert_close(outer.T @ weight, inner)


@pytest.mark.parametrize("start", ["pissa", "pissa_fast", "olora"])
def test_the_base_is_not_changed_and_the_result_is_a_plain_lora(start: Any):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(9, 12), nn.Linear(12, 5)), matrix(4, 9)
    before, out = bits(net), net(x)
    gs.attach(net, LoRA(r=2, start=start))
    assert torch.equal(net(x), out)
    assert {name.rpartition(".")[2] for name in gs.trainable_parameters(net, "default")} == {"lora_A", "lora_B"}
    shaken(net, "default", 0.2)
    beside, adapter = net(x), gs.capture(net)
    gs.merge(net)
    torch.testing.assert_close(net(x), beside, rtol=1e-5, atol=1e-5)
    gs.detach(net)
    assert same_bits(bits(net), before)
    plain = 2.0 * adapter  # a value of its own, whose factors hold the constants
    assert isinstance(plain.spec, LoRA)
    assert plain.spec.rank_at("0") == 4
    torch.testing.assert_close(plain.delta("0"), 2 * adapter.delta("0"))


def coarse(weight: Tensor) -> Tensor:
    step = weight.abs().amax(dim=1, keepdim=True) / 3
    return weight.div_(step).round_().mul_(step)  # in place: a quantiser may do so


def test_loftq_makes_up_for_quantisation():
    weight = matrix(30, 20).double()
    kept = weight.clone()
    errors = []
    for iterations in (1, 2, 3, 4):
        inner, outer, stored = starts.loftq(weight, 4, -0.5, coarse, iterations)
        errors.append((weight - stored + 0.5 * outer @ inner).norm().item())
    assert torch.equal(weight, kept)
    once = starts.loftq(weight, 4, -0.5, coarse)
    assert torch.equal(once[2], coarse(weight.clone()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]
    lost = torch.linalg.svdvals(weight - once[2])
    assert errors[0] == pytest.approx(lost[4:].norm().item())  # the best that rank 4 can do


def test_loftq_is_the_paper_s_loop():
    weight, scaling = matrix(14, 11).double(), 0.5
    inner, outer = torch.zeros(3, 11).double(), torch.zeros(14, 3).double()
    stored = weight
    for _ in range(3):
        stored = coarse(weight - scaling * outer @ inner)
        left, values, right = torch.linalg.svd(weight - stored)
        outer, inner = left[:, :3] * values[:3], right[:3] / scaling
    found = starts.loftq(weight, 3, scaling, coarse, 3)
    torch.testing.assert_close(found[1] @ found[0], outer @ inner)
    torch.testing.assert_close(found[2], stored)


def test_what_cannot_start_says_so():
    with pytest.raises(UsageError, match="other than 0"):
        starts.pissa(matrix(), 2, 0.0)
    with pytest.raises(UsageError, match="at least one iteration"):
        starts.loftq(matrix(), 2, 1.0, coarse, 0)
    with pytest.raises(UsageError, match="shape it got"):
        starts.loftq(matrix(), 2, 1.0, lambda weight: weight[0])
    with pytest.raises(NonFiniteError, match="quantising"):
        starts.loftq(matrix(), 2, 1.0, lambda weight: weight / 0)
    with pytest.raises(NonFiniteError, match="principal directions"):
        starts.RunningSVD(3).add(matrix() / 0)
    for rho in (0.5, float("inf"), float("nan")):
        with pytest.raises(UsageError, match="rho"):
            starts.redistribute({"": torch.ones(3)}, 2, rho)


def centred_svd(rows: Tensor) -> tuple[Tensor, Tensor]:
    _, values, right = torch.linalg.svd(rows - rows.mean(dim=0), full_matrices=False)
    return values**2 / (values**2).sum(), right


@pytest.mark.parametrize("part", [1, 7, 30, 200])
def test_a_running_svd_is_the_svd_of_all_rows(part: int):
    rows = (matrix(200, 5) @ matrix(5, 16, 1)).double() + 10 * torch.arange(16)
    rows[100:] *= 3  # the mean moves on the way
    running = starts.RunningSVD(6)
    for some in rows.split(part):
        running.add(some)
        running.add(some[:0])
    vectors, shares = running.components()
    wanted, right = centred_svd(rows)
    assert running.rows == 200
    torch.testing.assert_close((vectors[:6] @ right[:6].T).abs(), torch.eye(6).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(shares, wanted[:6], rtol=1e-9, atol=1e-12)


def test_a_running_svd_cuts_off_little_and_keeps_directions_orthonormal():
    rows = matrix(400, 30) * 0.8 ** torch.arange(30)
    running = starts.RunningSVD(10)
    for some in rows.split(40):
        running.add(some)
    vectors, shares = running.components()
    wanted, right = centred_svd(rows)
    assert len(vectors) == 10
    torch.testing.assert_close(shares[:4], wanted[:4], rtol=1e-3, atol=0)
    assert torch.linalg.svdvals(vectors[:4] @ right[:4].T).min() > 0.999
    still = starts.RunningSVD(3)
    still.add(torch.ones(5, 4))  # no variance at all
    torch.testing.assert_close(still.components()[0] @ still.components()[0].T, torch.eye(3))
    assert torch.equal(still.components()[1], torch.zeros(3))


def test_ranks_go_where_the_variance_is():
    ratios = {"flat": torch.tensor([0.2, 0.2, 0.2]), "steep": torch.tensor([0.9, 0.05, 0.01]), "none": torch.zeros(3)}
    assert starts.redistribute(ratios, 2, 2.0) == {"flat": 3, "steep": 3, "none": 0}
    assert starts.redistribute(ratios, 1, 3.0) == {"flat": 2, "steep": 1, "none": 0}
    assert starts.redistribute(ratios, 2, 1.0) == {"flat": 2, "steep": 2, "none": 2}
    assert starts.redistribute(ratios, 1, 1.9) == {"flat": 1, "steep": 1, "none": 1}
    assert starts.redistribute(ratios, {"flat": 1, "steep": 2, "none": 1}, 2.0) == {"flat": 2, "steep": 2, "none": 0}
    assert starts.most(100, 1.15) == 115
