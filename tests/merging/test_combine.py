"""Ways of combining, against plain references written from the papers, in float64 and on whole matrices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import gossamer as gs
from gossamer.errors import GossamerError, StateError, TargetError, UnsupportedError, UsageError
from gossamer.merging.combining import WAYS
from gossamer.methods import TargetedMethod
from gossamer.models import tiny
from tests.adapters import tokens, trained

WEIGHTS = [0.7, -0.4, 0.5]
SHAPE = (9, 12)


def adapter(seed: int, r: int = 2, shape: tuple[int, int] = SHAPE, paths: str = "ab", **fields: Any) -> gs.Adapter:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"m.{path}": {
            "lora_A": torch.randn(r, shape[1], generator=generator),
            "lora_B": torch.randn(shape[0], r, generator=generator),
        }
        for path in paths
    }
    return gs.Adapter(gs.LoRA(r=r, alpha=3.0, target_modules=tuple(tensors), **fields), tensors)


PARTS = [adapter(1, 2), adapter(2, 3, scaling="rslora"), adapter(3, 1, paths="a")]


def dense(value: gs.Adapter, path: str = "m.a") -> Tensor:
    """delta in float64, by the definition."""
    spec, slots = value.spec, value.tensors[path]
    assert isinstance(spec, gs.LoRA)
    return spec.scaling_at(path) * slots["lora_B"].double() @ slots["lora_A"].double()


def weighted(path: str = "m.a") -> list[tuple[float, Tensor]]:
    return [(weight, dense(one, path)) for weight, one in zip(WEIGHTS, PARTS, strict=True) if path in one.paths]


def near(value: gs.Adapter, expected: Tensor, path: str = "m.a", tolerance: float = 2e-6) -> None:
    assert (dense(value, path) - expected).norm() <= tolerance * expected.norm()


# References ----------------------------------------------------------------------------------------------------------


def trim(matrix: Tensor, density: float) -> Tensor:
    """Entry by entry: is it among the round(density * count) largest?"""
    sizes = sorted((abs(number) for number in matrix.flatten().tolist()), reverse=True)
    least = sizes[max(1, round(density * len(sizes))) - 1]
    return torch.tensor([[number if abs(number) >= least else 0.0 for number in row] for row in matrix.tolist()]).to(
        matrix
    )


def elect(parts: list[tuple[float, Tensor]]) -> Tensor:
    """TIES after trimming, entry by entry."""
    out = torch.zeros_like(parts[0][1])
    whole = sum(abs(weight) for weight, _ in parts)
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            votes = [(weight, float(weight * part[i, j])) for weight, part in parts]
            sign = sum(vote for _, vote in votes)
            chosen = [(abs(weight), vote) for weight, vote in votes if vote * sign > 0]
            if chosen:
                out[i, j] = whole * sum(vote for _, vote in chosen) / sum(weight for weight, _ in chosen)
    return out


def ties(parts: list[tuple[float, Tensor]], density: float) -> Tensor:
    return elect([(weight, trim(part, density)) for weight, part in parts])


def knots(parts: list[tuple[float, Tensor]], density: float, scaled: bool) -> Tensor:
    side = torch.cat([part for _, part in parts], 1)
    left, values, right = torch.linalg.svd(side, full_matrices=False)
    rank = int((values > 1e-9 * values[0]).sum())
    spread, right = values[:rank].diag(), right[:rank]
    turned = (spread @ right if scaled else right).split([part.shape[1] for _, part in parts], 1)
    merged = ties([(weight, one) for (weight, _), one in zip(parts, turned, strict=True)], density)
    return left[:, :rank] @ (merged if scaled else spread @ merged)


def total(parts: list[tuple[float, Tensor]]) -> Tensor:
    return torch.stack([weight * part for weight, part in parts]).sum(0)


def iso_c(parts: list[tuple[float, Tensor]]) -> Tensor:
    left, values, right = torch.linalg.svd(total(parts), full_matrices=False)
    rank = int((values > 1e-9 * values[0]).sum())
    return values[:rank].mean() * left[:, :rank] @ right[:rank]


def iso_cts(parts: list[tuple[float, Tensor]], common: float) -> Tensor:
    left, values, right = torch.linalg.svd(total(parts), full_matrices=False)
    rank = int((values > 1e-9 * values[0]).sum())
    own = (rank - round(common * rank)) // len(parts)
    k = rank - own * len(parts)
    lefts, sizes, rights = [left[:, :k]], [values[:k]], [right[:k]]
    for weight, part in parts:
        rest = weight * part
        rest = rest - left[:, :k] @ left[:, :k].T @ rest
        one, two, three = torch.linalg.svd(rest, full_matrices=False)
        lefts, sizes, rights = [*lefts, one[:, :own]], [*sizes, two[:own]], [*rights, three[:own]]
    p, _, q = torch.linalg.svd(torch.cat(lefts, 1), full_matrices=False)
    x, _, y = torch.linalg.svd(torch.cat(rights, 0), full_matrices=False)
    return torch.cat(sizes).mean() * (p @ q) @ (x @ y)


# Ways against references ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["m.a", "m.b"])
def test_exact(path: str):
    value = gs.combine(PARTS, WEIGHTS)
    near(value, total(weighted(path)), path)
    assert value.provenance["distance"] <= 1e-6
    assert value.tensors["m.a"]["lora_A"].shape[0] == 6
    near(gs.combine(PARTS), total([(1 / 3, one) for _, one in weighted()]))


def test_svd_is_the_nearest_of_its_rank():
    value = gs.combine(PARTS, WEIGHTS, method="svd", r=2)
    left, values, right = torch.linalg.svd(total(weighted()), full_matrices=False)
    near(value, left[:, :2] * values[:2] @ right[:2], tolerance=1e-5)
    assert value.provenance["distances"]["m.a"] == pytest.approx((values[2:].norm() / values.norm()).item(), rel=1e-4)


def test_linear_is_pefts():
    one, two = adapter(1, 2), adapter(2, 2, scaling="rslora")
    value = gs.combine([one, two], [0.7, -0.3], method="linear")
    scaled = [0.7 * 3 / 2, -0.3 * 3 / 2**0.5]
    inner = scaled[0] ** 0.5 * one.tensors["m.a"]["lora_A"] - (-scaled[1]) ** 0.5 * two.tensors["m.a"]["lora_A"]
    outer = scaled[0] ** 0.5 * one.tensors["m.a"]["lora_B"] + (-scaled[1]) ** 0.5 * two.tensors["m.a"]["lora_B"]
    near(value, outer.double() @ inner.double())
    assert value.provenance["distance"] > 0.3
    with pytest.raises(UnsupportedError, match="one rank"):
        gs.combine(PARTS, WEIGHTS, method="linear")


@pytest.mark.parametrize("density", [0.2, 0.55, 1.0])
def test_ties_and_pruning(density: float):
    value = gs.combine(PARTS, WEIGHTS, method="ties", density=density, r="full")
    near(value, ties(weighted(), density), tolerance=1e-5)
    pruned = gs.combine(PARTS, WEIGHTS, method="magnitude_prune", density=density, r="full")
    near(pruned, total([(weight, trim(part, density)) for weight, part in weighted()]), tolerance=1e-5)


def test_equal_weights_are_the_papers_ties():
    kept = torch.stack([trim(dense(one), 0.3) for one in PARTS])
    sign = kept.sum(0).sign()
    agree = (kept.sign() == sign) & (sign != 0)
    expected = (kept * agree).sum(0) / agree.sum(0).clamp(min=1)
    near(gs.combine(PARTS, method="ties", density=0.3, r="full"), expected, tolerance=1e-5)


def test_ties_where_all_agree_is_the_exact_sum():
    near(gs.combine([PARTS[0], PARTS[0] * 2], [0.3, 0.6], method="ties", density=1.0), 1.5 * dense(PARTS[0]))


@pytest.mark.parametrize("density", [0.3, 0.9])
def test_dare(density: float):
    value = gs.combine(PARTS[:1], [0.5], method="dare", density=density, r="full")
    ratio = dense(value) / (0.5 * dense(PARTS[0]))
    kept = ratio.abs() > 0.5 / density
    assert ((ratio - 1 / density).abs()[kept] < 1e-3).all()
    assert (ratio.abs()[~kept] < 1e-3).all()
    assert 0.6 * density < kept.float().mean() < min(1, 1.5 * density)
    again = gs.combine(PARTS[:1], [0.5], method="dare", density=density, r="full")
    assert again == value
    assert gs.combine(PARTS[:1], [0.5], method="dare", density=density, r="full", seed=1) != value
    assert gs.combine(PARTS, WEIGHTS, method="dare", density=1.0).provenance["distance"] <= 1e-5
    near(gs.combine(PARTS, WEIGHTS, method="dare_ties", density=1.0, r="full"), elect(weighted()), tolerance=1e-5)


def test_dare_keeps_the_sum_on_average():
    draws = [dense(gs.combine(PARTS, WEIGHTS, method="dare", density=0.5, r="full", seed=seed)) for seed in range(200)]
    expected = total(weighted())
    assert (torch.stack(draws).mean(0) - expected).norm() < 0.2 * expected.norm()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("density", [0.3, 0.6])
@pytest.mark.parametrize("path", ["m.a", "m.b"])
def test_knots(density: float, path: str, scaled: bool):
    value = gs.combine(PARTS, WEIGHTS, method="knots", density=density, scaled=scaled)
    near(value, knots(weighted(path), density, scaled), path, tolerance=1e-5)


@pytest.mark.parametrize("scaled", [False, True])
def test_knots_without_trimming_is_the_sum(scaled: bool):
    assert gs.combine(PARTS, WEIGHTS, method="knots", inside="sum", scaled=scaled).provenance["distance"] <= 1e-6


@pytest.mark.parametrize("path", ["m.a", "m.b"])
def test_iso_c(path: str):
    near(gs.combine(PARTS, WEIGHTS, method="iso_c"), iso_c(weighted(path)), path, tolerance=1e-5)


@pytest.mark.parametrize("common", [0.3, 0.5, 0.8, 1.0])
def test_iso_cts(common: float):
    value = gs.combine(PARTS, WEIGHTS, method="iso_cts", common=common)
    near(value, iso_cts(weighted(), common), tolerance=2e-5)


@pytest.mark.parametrize("method", [method for method in WAYS if method not in ("linear", "exact")])
def test_every_way_takes_a_rank_and_states_its_distance(method: str):
    value = gs.combine(PARTS, WEIGHTS, method=method, r=2)
    assert {slots["lora_A"].shape[0] for slots in value.tensors.values()} == {2}
    apart = [(dense(value, path) - total(weighted(path))).norm() for path in ("m.a", "m.b")]
    whole = [total(weighted(path)).norm() for path in ("m.a", "m.b")]
    expected = (torch.stack(apart).norm() / torch.stack(whole).norm()).item()
    assert value.provenance["distance"] == pytest.approx(expected, rel=1e-3)
    assert value.provenance["method"] == method


# Weights and refusals ------------------------------------------------------------------------------------------------


def test_weights_by_pattern():
    value = gs.combine(PARTS[:2], [{"a": 2.0, ".*": 0.5}, 1.0])
    near(value, 2 * dense(PARTS[0]) + dense(PARTS[1]))
    near(value, 0.5 * dense(PARTS[0], "m.b") + dense(PARTS[1], "m.b"), "m.b")
    assert value.provenance["weights"] == [{"a": 2.0, ".*": 0.5}, 1.0]
    with pytest.raises(TargetError, match="matches no module"):
        gs.combine(PARTS[:2], [{"c": 2.0, ".*": 0.5}, 1.0])
    with pytest.raises(TargetError, match="no weight"):
        gs.combine(PARTS[:2], [{"a": 2.0}, 1.0])
    with pytest.raises(UsageError, match="regular expression"):
        gs.combine(PARTS[:2], [{"(": 2.0}, 1.0])


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (([],), {}, "nothing to combine"),
        ((PARTS, [1.0]), {}, "one weight"),
        ((PARTS, [1.0, 2.0, float("nan")]), {}, "finite"),
        ((PARTS,), {"method": "tie"}, "did you mean 'ties'"),
        ((PARTS,), {"method": "ties", "densitty": 0.2}, "did you mean 'density'"),
        ((PARTS,), {"method": "ties", "density": 0.0}, "share"),
        ((PARTS,), {"method": "svd", "r": 0}, "rank"),
        ((PARTS,), {"r": 4}, "svd"),
        ((PARTS,), {"method": "knots", "inside": "dare"}, "ties or sum"),
    ],
)
def test_what_cannot_be_asked(arguments: Any, options: dict[str, Any], words: str):
    with pytest.raises(UsageError, match=words):
        gs.combine(*arguments, **options)


def test_what_does_not_fit():
    with pytest.raises(StateError, match="shapes"):
        gs.combine([PARTS[0], adapter(4, shape=(8, 12))])
    with pytest.raises(StateError, match="different bases"):
        gs.combine([replace(PARTS[0], base={"w": "1"}), replace(PARTS[1], base={"w": "2"})])
    broken = {path: dict(slots) for path, slots in PARTS[0].tensors.items()}
    broken["m.a"]["lora_A"] = broken["m.a"]["lora_A"] * float("nan")
    for method in ("exact", "iso_c"):
        with pytest.raises(GossamerError, match="NaN"):
            gs.combine([replace(PARTS[0], tensors=broken), PARTS[1]], method=method)


# Other methods, and models -------------------------------------------------------------------------------------------

METHODS = [gs.LoRA(r=2, start="pissa"), gs.DoRA(r=2), gs.VeRA(r=4), gs.IA3()]


@pytest.mark.parametrize("spec", METHODS, ids=lambda spec: spec.name)
def test_one_with_weight_one_is_itself(spec: TargetedMethod):
    value = trained(tiny("llama"), spec)
    assert gs.combine([value], [1]) is value
    assert gs.combine([value]) == value


@pytest.mark.parametrize("spec", METHODS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_any_change_of_weights_adds_where_the_base_is_given(spec: TargetedMethod, kind: str):
    model = tiny(kind)
    first = trained(model, spec, "first", seed=1)
    gs.detach(model)
    second = trained(model, gs.LoRA(r=2), "second", seed=2)
    gs.detach(model)
    if kind == "gpt2" and spec.name == "ia3":  # its outputs have biases, which are scaled with them
        with pytest.raises(UnsupportedError, match="bias"):
            gs.combine([first, second], [1.0, 1.0], base=model, r="full")
        return
    if spec.name != "lora":
        with pytest.raises(UnsupportedError, match="give the base"):
            gs.combine([first, second], [1.0, 1.0])
    value = gs.combine([first, second], [1.0, 1.0], base=model, r="full")
    gs.attach(model, value, "sum")
    found = model(tokens()).logits
    gs.detach(model)
    weights = {}
    for one in (first, second):
        gs.attach(model, one, "one")
        before = {name: p.detach().clone() for name, p in model.named_parameters() if "gossamer" not in name}
        gs.merge(model)
        for name, parameter in model.named_parameters():
            if name in before:
                weights[name] = weights.get(name, 0) + parameter.detach() - before[name]
        gs.unmerge(model)
        gs.detach(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += weights[name]
    torch.testing.assert_close(found, model(tokens()).logits, rtol=2e-3, atol=2e-3)


def test_a_base_as_plain_tensors_and_bf16():
    model = tiny("llama", dtype=torch.bfloat16)
    value = trained(model, gs.DoRA(r=2))
    gs.detach(model)
    told = gs.combine([value], [1.0], base=dict(model.state_dict()), method="svd", r=4)
    assert 0 < told.provenance["distance"] < 1
    with pytest.raises(UsageError, match="all directions"):
        gs.combine([value], [0.5], base=model)
    with pytest.raises(StateError, match="no plain matrix"):
        gs.combine([value], [0.5], base={}, r=4, method="svd")


def test_learned_weights_find_the_adapter_that_helps():
    model = tiny("llama")
    right = trained(model, gs.LoRA(r=2), "right", seed=1)
    with torch.no_grad():
        wanted = model(tokens()).logits
    gs.detach(model)
    wrong = trained(model, gs.LoRA(r=2), "wrong", seed=2)
    gs.detach(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def loss(model: torch.nn.Module, batch: Tensor) -> Tensor:
        return (model(batch).logits - wanted).square().mean()

    learned = gs.learned_weights(model, [right, wrong], [tokens()], loss=loss, steps=60, lr=0.05, per_module=False)
    assert {round(number, 1) for number in learned[0].values()} == {1.0}
    assert {abs(round(number, 1)) for number in learned[1].values()} == {0.0}
    value = gs.combine([right, wrong], learned)
    gs.attach(model, value)
    with torch.no_grad():
        apart = loss(model, tokens())
    gs.detach(model)
    with torch.no_grad():
        base = loss(model, tokens())
    assert apart < 0.05 * base
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    each = gs.learned_weights(model, [right, wrong], [tokens()], loss=loss, steps=2)
    assert len(set(each[0].values())) > 1
    with pytest.raises(GossamerError, match="no batches"):
        gs.learned_weights(model, [right], [])
