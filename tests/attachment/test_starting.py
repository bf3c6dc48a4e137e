"""EVA and LoftQ return values; the model they looked at is as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig
from peft.tuners.lora.eva import get_eva_state_dict
from torch import Tensor, nn

import gossamer as gs
from gossamer.errors import NonFiniteError, StateError, TargetError, UnsupportedError, UsageError
from tests.adapters import bits, same_bits, tokens, trained

Toys = Callable[[str], Any]


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    return [{"input_ids": tokens(4, 9) + number} for number in range(count)]


def state(model: nn.Module) -> list[tuple[Any, ...]]:
    """What a run could leave behind: hooks, overrides, modes, gradients."""
    return [
        (
            len(module._forward_pre_hooks),
            len(module._forward_hooks),
            sorted(module.__dict__),
            module.training,
            [(parameter.requires_grad, parameter.grad is None) for parameter in module.parameters(recurse=False)],
        )
        for module in model.modules()
    ]


def spectrum(shares: list[float], rows: int = 400, seed: int = 0) -> Tensor:
    """Rows, off centre, whose principal components explain these shares of their variance."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rows, len(shares), generator=generator, dtype=torch.float64)
    white = torch.linalg.svd(drawn - drawn.mean(dim=0), full_matrices=False).U
    turned = torch.linalg.qr(torch.randn(len(shares), len(shares), generator=generator, dtype=torch.float64)).Q
    return (white * torch.tensor(shares).sqrt() @ turned + 2.0).float()


class Branches(nn.Module):
    """One linear module for each input; one of them gets its input by keyword."""

    def __init__(self, **widths: int) -> None:
        super().__init__()
        self.branch = nn.ModuleDict({name: nn.Linear(width, 5) for name, width in widths.items()})

    def forward(self, attention_mask: Tensor | None = None, **inputs: Tensor) -> list[Tensor]:
        names = [*inputs]
        return [self.branch[names[0]](input=inputs[names[0]]), *(self.branch[name](inputs[name]) for name in names[1:])]


SHARES = {
    "steep": [0.9, 0.05, 0.03, 0.02],
    "flat": [0.3, 0.28, 0.22, 0.2],
    "wide": [1 / 40 + i / 1e4 for i in range(40)],
}


def branches() -> tuple[Branches, dict[str, Tensor]]:
    torch.manual_seed(0)
    inputs = {name: spectrum(shares, seed=number) for number, (name, shares) in enumerate(SHARES.items())}
    return Branches(**{name: len(shares) for name, shares in SHARES.items()}), inputs


@pytest.mark.parametrize("rho", [1.0, 1.5, 2.0])
def test_eva_is_peft_s(rho: float):
    net, inputs = branches()
    config = LoraConfig(r=2, target_modules=[*inputs], init_lora_weights="eva", eva_config=EvaConfig(rho=rho))
    options: Any = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None, "show_progress_bar": False}
    # PEFT's hooks see no input that comes by keyword
    called = lambda model, batch: [model.branch[name](batch[name]) for name in batch]  # noqa: E731
    theirs = get_eva_state_dict(net, [inputs], config, forward_fn=called, **options)
    adapter = gs.eva(net, gs.LoRA(r=2, target_modules=tuple(inputs)), [inputs], rho=rho)
    assert adapter.provenance == {"start": "eva", "rho": rho, "tokens": 400}
    for path, wanted in theirs.items():
        ours = adapter.tensors[path]["lora_A"] if path in adapter.tensors else torch.zeros(0, wanted.shape[1])
        assert ours.shape == wanted.shape
        if path != "branch.wide":  # too flat for PEFT's randomised SVD
            torch.testing.assert_close((ours @ wanted.float().T).abs(), torch.eye(len(ours)), rtol=0, atol=1e-3)


def test_eva_spends_ranks_where_the_variance_is_and_drops_the_rest():
    net, inputs = branches()
    spec = gs.LoRA(r=2, alpha=6.0, target_modules="branch.*", rank_pattern={"steep": 1})
    adapter = gs.eva(net, spec, [inputs], rho=3.0)
    assert {path: slots["lora_A"].shape for path, slots in adapter.tensors.items()} == {
        "branch.steep": (1, 4),
        "branch.flat": (4, 4),
    }
    found: Any = adapter.spec
    assert found.rank_pattern == {r"^branch\.flat": 4, r"^branch\.steep": 1}
    assert found.scaling_at("branch.flat") == 3.0
    assert found.scaling_at("branch.steep") == 6.0
    report = gs.attach(net, adapter, trainable=True)
    assert report.trainable == adapter.num_parameters
    wanted = torch.linalg.svd(inputs["steep"] - inputs["steep"].mean(dim=0)).Vh[:1]
    assert (adapter.tensors["branch.steep"]["lora_A"] @ wanted.T).abs().item() == pytest.approx(1.0, abs=1e-5)


def test_eva_spans_inputs_of_low_rank_whatever_the_batches():
    rows = torch.randn(120, 3, generator=torch.Generator().manual_seed(0)) @ torch.randn(3, 12) + torch.arange(12)
    net = Branches(one=12)
    one = gs.eva(net, gs.LoRA(r=3, target_modules=("one",)), [{"one": rows}], rho=1.0)
    other = gs.eva(net, gs.LoRA(r=3, target_modules=("one",)), ({"one": part} for part in rows.split(11)), rho=1.0)
    for adapter in (one, other):
        directions = adapter.tensors["branch.one"]["lora_A"]
        varying = rows - rows.mean(dim=0)
        torch.testing.assert_close(varying @ directions.T @ directions, varying, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(directions @ directions.T, torch.eye(3))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_model_is_as_it_was_and_the_start_changes_nothing(name: str, toy: Toys, tmp_path: Path):
    model = toy(name)
    model.train()
    next(iter(model.children())).eval()
    next(model.parameters()).requires_grad_(False)
    before, left, generator = bits(model), state(model), torch.random.get_rng_state()
    spec = gs.LoRA(r=3, alpha=12.0, scaling="rslora", start="pissa")
    adapter = gs.eva(model, spec, batches())
    _, weights = gs.loftq(model, spec, half)
    assert same_bits(bits(model), before)
    assert state(model) == left
    assert torch.equal(torch.random.get_rng_state(), generator)
    ranks = {path: slots["lora_A"].shape[0] for path, slots in adapter.tensors.items()}
    assert sum(ranks.values()) == 3 * len(weights)
    assert len(set(ranks.values())) > 1
    assert max(ranks.values()) <= 6
    found: Any = adapter.spec
    for path in ranks:
        assert found.scaling_at(path) == pytest.approx(spec.scaling_at(path))
    assert gs.Adapter.load(adapter.save(tmp_path / "start")) == adapter
    model.eval()
    out = model(**batches(1)[0]).logits
    gs.attach(model, adapter, trainable=True)
    assert torch.equal(model(**batches(1)[0]).logits, out)


def test_statistics_stand_still_and_dropout_is_off():
    net = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 4))
    net.train()
    before, rows = bits(net), torch.randn(40, 6) * torch.arange(1, 7)
    graphs: list[bool] = []
    net[2].register_forward_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    adapter = gs.eva(net, gs.LoRA(r=1, target_modules="2"), [{"input": rows}])
    assert graphs == [False]
    assert same_bits(bits(net), before)
    assert all(module.training for module in net.modules())
    wanted = torch.linalg.svd(rows - rows.mean(dim=0), full_matrices=False).Vh[:1]
    assert (adapter.tensors["2"]["lora_A"] @ wanted.T).abs().item() == pytest.approx(1.0, abs=1e-4)


def test_padding_does_not_count(toy: Toys):
    ids = tokens(2, 8)
    padded = torch.nn.functional.pad(ids, (0, 5), value=256)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 5))
    spec = gs.LoRA(r=2, target_modules=("v_proj",))
    one = gs.eva(toy("llama"), spec, [{"input_ids": ids}])
    other = gs.eva(toy("llama"), spec, [{"input_ids": padded, "attention_mask": mask}])
    counted = gs.eva(toy("llama"), spec, [{"input_ids": padded}])
    assert [adapter.provenance["tokens"] for adapter in (one, other, counted)] == [16, 16, 26]
    for path in one.paths:
        overlap = torch.linalg.svdvals(one.tensors[path]["lora_A"] @ other.tensors[path]["lora_A"].T)
        torch.testing.assert_close(overlap, torch.ones_like(overlap), rtol=1e-3, atol=1e-3)


def test_adapters_that_are_attached_do_not_count_but_merged_ones_are_refused(toy: Toys):
    model, spec = toy("llama"), gs.LoRA(r=2, target_modules=("up_proj",))
    wanted, plain = gs.eva(model, spec, batches()), gs.loftq(model, spec, half)
    trained(model, gs.LoRA(r=4), "other")
    assert gs.eva(model, spec, batches()) == wanted
    assert gs.eva(model, spec, batches()).base == wanted.base == gs.base_fingerprint(toy("llama"))
    assert gs.loftq(model, spec, half)[0] == plain[0]
    assert gs.active(model) == ("other",)
    gs.merge(model)
    with pytest.raises(StateError, match="merged"):
        gs.eva(model, spec, batches())
    with pytest.raises(StateError, match="merged"):
        gs.loftq(model, spec, half)


def broken() -> Iterator[Any]:
    yield batches(1)[0]
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ([{"no_such_input": tokens()}], ValueError, "input_ids"),
        (broken(), OSError, "the disk is gone"),
        ([tokens()], UsageError, "mapping"),
        ([], StateError, "needs inputs"),
        ([{"input_ids": tokens(), "attention_mask": torch.zeros(2, 9)}], StateError, "needs inputs"),
    ],
)
def test_eva_cleans_up_after_a_fault(given: Any, error: type[Exception], words: str, toy: Toys):
    model = toy("llama").train()
    before, left = bits(model), state(model)
    with pytest.raises(error, match=words):
        gs.eva(model, gs.LoRA(r=2), given)
    assert same_bits(bits(model), before)
    assert state(model) == left


def test_inputs_that_are_not_finite_are_named():
    net, inputs = branches()
    left = state(net)
    with pytest.raises(NonFiniteError, match=r"branch\.flat"):
        gs.eva(net, gs.LoRA(r=1, target_modules="branch.*"), [inputs | {"flat": inputs["flat"] / 0}])
    assert state(net) == left
    with pytest.raises(UsageError, match="rho"):
        gs.eva(net, gs.LoRA(r=1, target_modules="branch.*"), [inputs], rho=0.5)


def half(weight: Tensor) -> Tensor:
    return weight.to(torch.float8_e4m3fn).to(weight.dtype)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_loftq_brings_the_quantised_model_back_towards_the_base(name: str, toy: Toys):
    model, twin, ids = toy(name), toy(name), tokens()
    wanted = model(ids).logits
    adapter, weights = gs.loftq(model, gs.LoRA(r=16), half, iterations=2)
    assert adapter.provenance == {"start": "loftq", "iterations": 2}
    assert adapter.base is None
    with torch.no_grad():
        for path, weight in weights.items():
            twin.get_submodule(path).weight.copy_(weight)
        lost = (twin(ids).logits - wanted).norm()
        gs.attach(twin, adapter, trainable=True)
        assert (twin(ids).logits - wanted).norm() < 0.8 * lost


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_loftq_by_the_name_of_a_format_starts_nearer_to_the_base_than_its_codes_alone(name: str, toy: Toys):
    model, ids = toy(name), tokens()
    wanted = model(ids).logits
    adapter, weights = gs.loftq(model, gs.LoRA(r=16), "nf4")
    twin = gs.quantize_model(toy(name), "nf4", skip=["lm_head"])
    for path, stored in weights.items():
        held = twin.get_submodule(path).weight
        assert torch.equal(held if name == "llama" else held.T, stored)
    with torch.no_grad():
        lost = (twin(ids).logits - wanted).norm()
        gs.attach(twin, adapter, trainable=True)
        assert (twin(ids).logits - wanted).norm() < 0.8 * lost


def fine(weight: Tensor) -> Tensor:
    """Steps so small that bfloat16 rounds what is between them."""
    step = weight.abs().amax(dim=1, keepdim=True) / 100
    return (weight / step).round() * step


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_round_of_loftq_leaves_what_any_quantised_base_holds(dtype: torch.dtype, name: str, toy: Toys):
    model, rank = toy(name).to(dtype), 4
    adapter, weights = gs.loftq(model, gs.LoRA(r=rank), fine)
    assert adapter.paths == tuple(sorted(weights))
    for path, stored in weights.items():
        assert stored.dtype == dtype
        assert stored.shape == model.get_submodule(path).weight.shape
        weight, stored = (one.T if name == "gpt2" else one for one in (model.get_submodule(path).weight, stored))
        assert torch.equal(stored, fine(weight.float()).to(dtype))
        lost = weight.float() - stored.float()
        best = torch.linalg.svdvals(lost)[rank:].norm()
        torch.testing.assert_close((lost - adapter.delta(path)).norm(), best, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "where"),
    [
        (gs.LoRA(r=1, target_modules=("0",)), "0"),
        (gs.LoRA(r=1, target_modules=("2",), bias="lora_only"), "2"),
        (gs.LoRA(r=1, target_modules=("2",), bias="all"), "2"),
        (gs.LoRA(r=1, target_modules=("2",), modules_to_save=("3",)), "3"),
        (gs.DoRA(r=1, target_modules=("2",)), "2"),
    ],
)
def test_only_factors_of_linear_modules(spec: Any, where: str):
    net = nn.Sequential(nn.Conv1d(3, 4, 2), nn.Flatten(), nn.Linear(4, 4), nn.LayerNorm(4))
    for start in (lambda: gs.loftq(net, spec, half), lambda: gs.eva(net, spec, [{"input": torch.zeros(2, 3, 2)}])):
        with pytest.raises(UnsupportedError, match="linear modules alone") as caught:
            start()
        assert caught.value.where == where


def test_loftq_refuses_a_rank_that_the_weight_has_not():
    with pytest.raises(TargetError, match="at most the rank"):
        gs.loftq(nn.Sequential(nn.Linear(4, 6)), gs.LoRA(r=5, target_modules="0"), half)
