"""attach, use, capture, detach: several adapters on one model, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.errors import StateError, UsageError
from tests.adapters import bits, same_bits, tokens, trained
from tests.conformance.oracle import Toys

IDS = tokens()


def out(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture
def two(toy: Toys) -> Any:
    """A llama with two trained adapters, "b" active."""
    model = toy("llama")
    trained(model, gs.LoRA(r=2), "a", seed=1)
    trained(model, gs.LoRA(r=3, target_modules=("q_proj", "lm_head")), "b", seed=2)
    return model


def test_which_adapters_run(two: Any, toy: Toys):
    base, b = out(toy("llama")), out(two)
    assert gs.attached(two) == ("a", "b")
    assert gs.active(two) == ("b",)
    gs.use(two, None)
    assert gs.active(two) == ()
    assert torch.equal(out(two), base)
    gs.use(two, "a")
    a = out(two)
    gs.use(two, "a", "b")
    both = out(two)
    gs.use(two, "b", "a")
    torch.testing.assert_close(out(two), both, rtol=1e-4, atol=1e-4)
    assert len({float(value.sum()) for value in (base, a, b, both)}) == 4
    gs.use(two, "b")
    assert torch.equal(out(two), b)


def test_using_nests_and_restores(two: Any):
    with gs.using(two, "a"):
        assert gs.active(two) == ("a",)
        with gs.using(two, ["a", None]):
            assert gs.active(two) == [("a",), ()]
            with gs.using(two, None):
                assert gs.active(two) == ()
            assert gs.active(two) == [("a",), ()]
        assert gs.active(two) == ("a",)
        with pytest.raises(ZeroDivisionError), gs.using(two, "b"):
            1 / 0  # noqa: B018
        assert gs.active(two) == ("a",)
    assert gs.active(two) == ("b",)


def test_both_equal_the_sum_of_their_deltas(two: Any, toy: Toys):
    a, b = gs.capture(two, "a"), gs.capture(two, "b")
    with gs.using(two, "a", "b"):
        both = out(two)
    model = toy("llama")
    gs.attach(model, a + b)
    torch.testing.assert_close(out(model), both, rtol=1e-4, atol=1e-4)


def test_rows(two: Any):
    rows = torch.randint(0, 250, (5, 9), generator=torch.Generator().manual_seed(3))
    chosen = ["b", None, "a", "b", "a"]
    with torch.no_grad(), gs.using(two, chosen):
        mixed = two(rows).logits
    for row, name in enumerate(chosen):
        with torch.no_grad(), gs.using(two, name):
            torch.testing.assert_close(mixed[row], two(rows[row : row + 1]).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "bert", "qwen2", "gemma", "mistral"])
def test_rows_on_every_architecture(name: str, toy: Toys):
    """Each row as if alone, or a refusal that names the module; never another row's adapter."""
    model = toy(name)
    trained(model, gs.LoRA(r=2), "a", seed=1)
    trained(model, gs.LoRA(r=2), "b", seed=2)
    with gs.using(model, ["a", "b"]):
        try:
            mixed = out(model)
        except StateError as error:
            refused = error.where
        else:
            refused = ""
    if refused:
        assert refused in gs.capture(model, "a").paths
        return
    for row, entry in enumerate("ab"):
        with gs.using(model, entry):
            torch.testing.assert_close(mixed[row], out(model)[row], rtol=1e-4, atol=1e-4)


def test_rows_that_are_not_as_many_as_the_batch(two: Any):
    with gs.using(two, ["a", "b", None]), pytest.raises(StateError, match="one entry for each row"):
        out(two)


def test_capture_and_attach_round_trip(two: Any, toy: Toys):
    for name in ("a", "b"):
        gs.use(two, name)
        value, model = gs.capture(two, name), toy("llama")
        gs.attach(model, value, "again")
        assert torch.equal(out(model), out(two))
        assert gs.capture(model, "again") == value
        assert not gs.trainable_parameters(model), "a stored adapter is not trained unless asked"
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_captured_value_does_not_move_with_the_model(two: Any):
    value = gs.capture(two, "a")
    digest = value.digest
    for parameter in gs.trainable_parameters(two, "a").values():
        parameter.data.zero_()
    assert gs.Adapter(value.spec, value.tensors).digest == digest
    assert gs.capture(two, "a") != value


def test_an_attached_value_does_not_move_with_the_model(two: Any, toy: Toys):
    value, model = gs.capture(two, "a"), toy("llama")
    before = {name: tensor.clone() for name, tensor in value.named_tensors().items()}
    gs.attach(model, value, trainable=True)
    for parameter in gs.trainable_parameters(model).values():
        parameter.data.zero_()
    assert same_bits(value.named_tensors(), before)


@pytest.mark.parametrize("trainable", [True, False])
def test_trainable_on_request(trainable: bool, two: Any, toy: Toys):
    for what in (gs.LoRA(r=2), gs.capture(two, "a")):
        model = toy("llama")
        report = gs.attach(model, what, trainable=trainable)
        assert bool(gs.trainable_parameters(model)) == trainable == bool(report.trainable)


def test_trainable_parameters_are_named_by_place(two: Any):
    one = gs.trainable_parameters(two, "b")
    assert [*one][:2] == ["lm_head.lora_A", "lm_head.lora_B"]
    assert [*one] == sorted(one)
    every = gs.trainable_parameters(two)
    assert every["b:lm_head.lora_A"] is one["lm_head.lora_A"]
    assert len(every) == len(gs.trainable_parameters(two, "a")) + len(one)


def test_a_deep_copy_is_independent(two: Any):
    twin = copy.deepcopy(two)
    expected = out(two)
    assert torch.equal(out(twin), expected)
    gs.use(twin, "a")
    assert gs.active(two) == ("b",)
    for parameter in gs.trainable_parameters(twin).values():
        parameter.data.zero_()
    twin.get_submodule("model.layers.0.self_attn.q_proj").weight.data.zero_()
    assert torch.equal(out(two), expected)
    gs.detach(two)
    assert gs.attached(twin) == ("a", "b")
    gs.merge(twin, "a")
    gs.detach(twin)


def test_dtype_and_mode_reach_the_layers(two: Any):
    dropped = gs.LoRA(r=2, dropout=0.9)
    gs.attach(two, dropped, "dropped")
    two.train()
    trained_modes = {module.training for module in two.modules()}
    two.eval()
    assert (trained_modes, {module.training for module in two.modules()}) == ({True}, {False})
    two.to(torch.bfloat16)
    assert {value.dtype for value in gs.trainable_parameters(two).values()} == {torch.bfloat16}
    gs.use(two, "a")
    assert out(two).dtype == torch.bfloat16
    two.to("meta")
    assert {value.device.type for value in gs.trainable_parameters(two).values()} == {"meta"}


def test_a_layer_attached_in_training_mode_trains(toy: Toys):
    model = toy("llama").train()
    gs.attach(model, gs.LoRA(r=2, dropout=0.5))
    for parameter in gs.trainable_parameters(model).values():
        parameter.data += 0.1
    assert not torch.equal(out(model), out(model)), "dropout is at work"
    model.eval()
    assert torch.equal(out(model), out(model))


def test_state_dict_keeps_the_base_keys(two: Any, toy: Toys):
    base = [*toy("llama").state_dict()]
    assert [name for name in two.state_dict() if "gossamer" not in name.split(".")] == base
    extra = {name.split(".gossamer.")[1] for name in two.state_dict() if ".gossamer." in name}
    assert extra == {"a.lora_A", "a.lora_B", "b.lora_A", "b.lora_B"}
    gs.detach(two)
    assert [*two.state_dict()] == base


def test_weights_assigned_after_attaching(toy: Toys):
    """`load_state_dict(assign=True)` puts new parameters in place; merging must start from those."""
    model, other = toy("llama"), toy("llama")
    trained(model, gs.LoRA(r=2))
    state = {name: value * 0.5 for name, value in other.state_dict().items()}
    model.load_state_dict(state, assign=True, strict=False)
    beside = out(model)
    gs.merge(model)
    torch.testing.assert_close(out(model), beside, rtol=1e-4, atol=1e-4)
    gs.unmerge(model)
    assert same_bits(bits(model), state)


def test_another_tools_override_is_called_and_put_back(toy: Toys):
    """accelerate and others set `forward` on an instance; it stays in force while we stand there, and after."""
    model, calls = toy("llama"), []
    module = model.get_submodule("model.layers.0.mlp.up_proj")
    original = module.forward

    def counting(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return original(x)

    module.forward = counting
    trained(model, gs.LoRA(r=2))
    out(model)
    gs.merge(model)
    out(model)
    gs.detach(model)
    assert module.forward is counting
    out(model)
    assert len(calls) == 3


def test_detaching_one_leaves_the_other(two: Any, toy: Toys):
    with gs.using(two, "a"):
        a = out(two)
    gs.detach(two, "b")
    assert gs.attached(two) == ("a",)
    assert gs.active(two) == ()
    assert "gossamer" not in dict(two.lm_head.named_children())
    gs.use(two, "a")
    assert torch.equal(out(two), a)
    gs.detach(two, "a")
    assert gs.attached(two) == ()
    assert torch.equal(out(two), out(toy("llama")))
    assert all(parameter.requires_grad for parameter in two.parameters())


def test_detaching_takes_the_name_out_of_the_rows(two: Any):
    gs.use(two, ["a", "b"])
    gs.detach(two, "b")
    assert gs.active(two) == [("a",), ()]


def test_two_adapters_may_not_replace_one_module(toy: Toys):
    model = toy("llama")
    for seed, name in enumerate(("a", "b")):
        trained(model, gs.LoRA(r=2, modules_to_save=("model.norm",)), name, seed=seed)
    before = bits(model)
    with pytest.raises(StateError, match="replace the same parameters"):
        gs.use(model, "a", "b")
    with pytest.raises(StateError, match="replace the same parameters"):
        gs.merge(model, "a", "b")
    assert same_bits(bits(model), before)
    with gs.using(model, ["a", "b"]):
        rows = out(model)
    for row, name in enumerate("ab"):
        with gs.using(model, name):
            torch.testing.assert_close(rows[row], out(model)[row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m: gs.attach(m, gs.LoRA(), "a"), StateError, "already attached"),
        (lambda m: gs.attach(m, gs.LoRA(), ""), UsageError, "not a usable adapter name"),
        (lambda m: gs.attach(m, gs.LoRA(), "a.b"), UsageError, "not a usable adapter name"),
        (lambda m: gs.attach(m, gs.LoRA(), "a\n"), UsageError, "not a usable adapter name"),
        (lambda m: gs.attach(m, gs.LoRA(), "x" * 65), UsageError, "not a usable adapter name"),
        (lambda m: gs.attach(m.model, gs.LoRA(), "c"), StateError, "adapters of its own"),
        (lambda m: gs.attach(nn.Sequential(m), gs.LoRA(), "c"), StateError, "adapters of its own"),
        (lambda m: gs.use(m, "A_"), StateError, "no adapter named 'A_'"),
        (lambda m: gs.use(m, ["a", "bb"]), StateError, "'b'"),
        (lambda m: gs.use(m, "a", ["b"]), UsageError, "called by its name"),
        (lambda m: gs.capture(m), StateError, "no adapter named 'default'"),
        (lambda m: gs.detach(m, "bee"), StateError, "'b'"),
        (lambda m: gs.trainable_parameters(m, "bb"), StateError, "'b'"),
        (lambda m: gs.merge(m, "a", "bb"), StateError, "'b'"),
        (lambda m: gs.unmerge(m), StateError, "nothing is merged"),
    ],
)
def test_refusals_change_nothing(call: Callable[[Any], Any], error: type[Exception], text: str, two: Any):
    before, names = out(two), [*two.state_dict()]
    with pytest.raises(error) as caught:
        call(two)
    assert text in str(caught.value)
    assert (gs.attached(two), gs.active(two), [*two.state_dict()]) == (("a", "b"), ("b",), names)
    assert torch.equal(out(two), before)


@pytest.mark.parametrize(
    "verb",
    [lambda m: gs.use(m, None), gs.capture, gs.detach, gs.merge, gs.unmerge, gs.trainable_parameters],
    ids=["use", "capture", "detach", "merge", "unmerge", "trainable_parameters"],
)
def test_on_a_bare_model_every_verb_says_what_to_do(verb: Callable[[nn.Module], Any], toy: Toys):
    with pytest.raises(StateError, match="attach"):
        verb(toy("llama"))


@pytest.mark.parametrize("name", ["half", "train", "type", "forward", "weight", "0", "-", "keys", "gossamer"])
def test_names_that_mean_something_to_torch(name: str, toy: Toys):
    model = toy("llama")
    value = trained(model, gs.LoRA(r=2), name)
    gs.use(model, None)
    gs.use(model, name)
    assert gs.capture(model, name) == value
    assert torch.equal(model.half().float().get_submodule("lm_head").weight, model.lm_head.weight)
    gs.detach(model, name)
    assert [*model.state_dict()] == [*toy("llama").state_dict()]


def test_a_bare_linear_is_a_model_too(tmp_path: Any):
    """Adapted, saved and loaded, or refused at once; never a folder that cannot be read."""
    model, x = nn.Linear(4, 3), torch.ones(2, 4)
    try:
        value = trained(model, gs.LoRA(r=2))
    except gs.GossamerError:
        return
    beside = model(x)
    gs.detach(model)
    gs.attach(model, gs.Adapter.load(value.save(tmp_path)))
    assert torch.equal(model(x), beside)
