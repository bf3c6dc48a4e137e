"""Folding in and giving back: all or nothing, and bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.errors import NonFiniteError, StateError
from gossamer.methods import Replacement
from gossamer.methods.lora_layers import MatrixLoRA
from tests.adapters import bits, same_bits, tokens, trained
from tests.conformance.oracle import Toys

IDS = tokens()
SPECS = {
    "factors": gs.LoRA(r=2),
    "biases": gs.LoRA(r=2, bias="all"),
    "own biases": gs.LoRA(r=2, bias="lora_only"),
}


def out(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert", "gemma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_ten_cycles(name: str, kind: str, dtype: torch.dtype, toy: Toys):
    model = toy(name).to(dtype)
    before, base = bits(model), out(model)
    trained(model, SPECS[kind])
    beside = out(model)
    for _ in range(10):
        gs.merge(model)
        merged = out(model)
        gs.unmerge(model)
        assert same_bits(bits(model), before)
    bound = 1e-4 if dtype == torch.float32 else 0.06 * beside.abs().max().item()
    assert (merged - beside).abs().max().item() <= bound
    assert torch.equal(out(model), beside)
    gs.detach(model)
    assert same_bits(bits(model), before)
    assert torch.equal(out(model), base)


def test_merged_weights_are_rounded_once(toy: Toys):
    """W' is the nearest bfloat16 to the float32 sum: no second rounding, whatever the number of adapters."""
    model = toy("llama").to(torch.bfloat16)
    path = "model.layers.0.self_attn.q_proj"
    a, b = (trained(model, gs.LoRA(r=2, target_modules=("q_proj",)), name, seed=seed) for seed, name in enumerate("ab"))
    weight = model.get_submodule(path).weight
    exact = weight.float() + a.delta(path) + b.delta(path)
    gs.merge(model, "a", "b")
    assert torch.equal(weight, exact.to(torch.bfloat16))


def test_a_merged_model_has_no_trace_in_its_calls(toy: Toys):
    model = toy("llama")
    trained(model, gs.LoRA(r=2))
    gs.merge(model)
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("active", ["a", ("a", "b"), None])
def test_merging_names_what_it_folds(active: Any, toy: Toys):
    model = toy("llama")
    for seed, name in enumerate("ab"):
        trained(model, gs.LoRA(r=2), name, seed=seed)
    names = active if isinstance(active, tuple) else (active,)
    with gs.using(model, *names):
        expected = out(model)
    if active is None:
        with gs.using(model, None), pytest.raises(StateError, match="nothing to merge"):
            gs.merge(model)
        return
    gs.merge(model, *names)
    torch.testing.assert_close(out(model), expected, rtol=1e-4, atol=1e-4)
    gs.unmerge(model)
    assert gs.active(model) == ("b",)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38])
def test_a_merge_that_would_not_be_finite(value: float, toy: Toys):
    model = toy("llama").to(torch.float16)
    trained(model, gs.LoRA(r=2, target_modules=("q_proj", "down_proj")))
    before, names = bits(model), [*model.state_dict()]
    parameter = [*gs.trainable_parameters(model).values()][-1]
    parameter.data.view(-1)[-1] = value
    with pytest.raises(NonFiniteError, match="nothing was merged"):
        gs.merge(model)
    assert same_bits(bits(model), before)
    assert [*model.state_dict()] == names
    with pytest.raises(StateError, match="nothing is merged"):
        gs.unmerge(model)


@pytest.mark.parametrize(
    "call",
    [
        lambda m: gs.merge(m),
        lambda m: gs.attach(m, gs.LoRA(), "other"),
        lambda m: gs.use(m, None),
        lambda m: gs.use(m, ["default"]),
        lambda m: gs.detach(m, "default"),
    ],
    ids=["merge", "attach", "use", "use rows", "detach one"],
)
def test_while_merged(call: Any, toy: Toys):
    model = toy("llama")
    before = bits(model)
    value = trained(model, gs.LoRA(r=2))
    gs.merge(model)
    merged = bits(model)
    with pytest.raises(StateError, match="merged into the weights"):
        call(model)
    assert same_bits(bits(model), merged)
    assert gs.capture(model) == value
    gs.unmerge(model)
    assert same_bits(bits(model), before)


def test_detaching_all_unmerges_first(toy: Toys):
    model = toy("llama")
    before = bits(model)
    trained(model, gs.LoRA(r=2))
    gs.merge(model)
    gs.detach(model)
    assert same_bits(bits(model), before)
    assert gs.attached(model) == ()


def test_rows_have_no_one_merge(toy: Toys):
    model = toy("llama")
    trained(model, gs.LoRA(r=2))
    with gs.using(model, ["default", None]), pytest.raises(StateError, match="no one merge"):
        gs.merge(model)


def test_moved_while_merged(toy: Toys):
    """Unmerging after a change of dtype gives the original, rounded to the dtype the model has now."""
    model = toy("llama")
    before = bits(model)
    trained(model, gs.LoRA(r=2))
    gs.merge(model)
    model.to(torch.bfloat16)
    gs.unmerge(model)
    assert same_bits(bits(model), {name: value.to(torch.bfloat16) for name, value in before.items()})


@pytest.mark.parametrize("names", [("whole", "factors"), ("factors", "whole")])
def test_a_module_that_one_adapter_replaces_and_another_adapts(names: tuple[str, str]):
    """The replacement first, the factors and the shift of the bias on top, in whichever order they are named."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), torch.randn(5, 4)
    whole = trained(model, gs.LoRA(r=2, target_modules=("0",), modules_to_save=("1",)), "whole", seed=1)
    factors = trained(model, gs.LoRA(r=2, target_modules=("1",), bias="lora_only"), "factors", seed=2)
    shift = factors.tensors["1"]["bias"] - model[1].bias.detach()
    with gs.using(model, "whole"):
        inner = model[0](x)
    weight = whole.tensors["1"]["weight"] + factors.delta("1")
    expected = inner @ weight.T + whole.tensors["1"]["bias"] + shift
    with gs.using(model, *names):
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    gs.merge(model, *names)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_only_what_a_layer_changes_is_widened():
    """A merge makes float32 copies of the matrices that change, and looks at no other parameter of the module."""
    layer = MatrixLoRA({"up.lora_A": torch.ones(2, 4), "up.lora_B": torch.ones(3, 2)}, {"up": 1.0}, False)
    weight = torch.zeros(1, 3, 4, dtype=torch.bfloat16)
    assert layer.merged({"up": weight}, {})["up"].dtype == torch.float32
    kept = Replacement({"bias": torch.ones(3)})
    assert kept.merged({}, {})["bias"].data_ptr() == kept.get_parameter("bias").data_ptr()
