"""Fused decoder layers: the same numbers as transformers' own, and given back as they were found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3Config

import gossamer as gs
from gossamer.models import tiny
from gossamer.running.blocks import Block, blocks

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma"]


def made(family: str, **changes: Any) -> Any:
    """A seeded toy in float32, with wide weights so that mistakes show."""
    if family != "qwen3":
        return tiny(family, **changes)
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 320}
    config = Qwen3Config(**sizes, intermediate_size=96, num_hidden_layers=2, pad_token_id=0, **changes)
    return AutoModelForCausalLM.from_config(config)


def adapted(model: nn.Module, spec: Any = None) -> dict[str, nn.Parameter]:
    gs.attach(model, spec or gs.LoRA(r=3))
    torch.manual_seed(1)
    parameters = gs.trainable_parameters(model, "default")
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.train()
    return parameters


def outcome(model: Any, parameters: dict[str, nn.Parameter], **inputs: Any) -> list[Tensor]:
    """Logits and gradients."""
    torch.manual_seed(2)
    ids = torch.randint(1, 250, (2, 9))
    logits = model(input_ids=ids, use_cache=False, **inputs).logits
    return [logits, *torch.autograd.grad(logits.float().square().mean(), [*parameters.values()])]


def close(got: list[Tensor], expected: list[Tensor], slack: float) -> None:
    for one, other in zip(got, expected, strict=True):
        assert (one - other).norm() <= slack * other.norm()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [False, True])
def test_logits_and_gradients_equal_those_of_transformers_layers(family: str, padded: bool) -> None:
    model = made(family)
    parameters = adapted(model)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, 6:] = 0
    inputs = {"attention_mask": mask} if padded else {}
    before = outcome(model, parameters, **inputs)
    with blocks(model) as count:
        assert count == 2
        close(outcome(model, parameters, **inputs), before, 1e-5)
    assert not any("forward" in vars(layer) for layer in model.model.layers)
    assert all(torch.equal(one, other) for one, other in zip(outcome(model, parameters, **inputs), before, strict=True))


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_in_bfloat16_as_near_to_the_exact_result_as_transformers_is(family: str) -> None:
    wide, narrow = made(family), made(family).to(torch.bfloat16)
    wide.load_state_dict({name: value.float() for name, value in narrow.state_dict().items()})
    exact, own = (outcome(model, adapted(model)) for model in (wide, narrow))
    with blocks(narrow):
        fused = outcome(narrow, gs.trainable_parameters(narrow, "default"))
    off = [
        sum(((one - right).norm() / right.norm()).item() for one, right in zip(each, exact, strict=True))
        for each in (fused, own)
    ]
    assert off[0] < 1.2 * off[1]
    assert off[1] < 0.05 * len(exact)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("down_proj",), ("gate_proj", "o_proj")])
def test_where_only_some_modules_are_adapted(targets: tuple[str, ...]) -> None:
    model = made("llama")
    parameters = adapted(model, gs.LoRA(r=2, target_modules=targets))
    before = outcome(model, parameters)
    with blocks(model):
        close(outcome(model, parameters), before, 1e-5)


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_on_quantised_weights(quant: str) -> None:
    from gossamer.quant.linear import quantize_model

    model = made("llama")
    quantize_model(model, quant, skip=("lm_head",))
    parameters = adapted(model)
    before = outcome(model, parameters)
    with blocks(model):
        close(outcome(model, parameters), before, 1e-5)


def test_with_gradient_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    from gossamer.training.memory import checkpointing

    model = made("llama")
    parameters = adapted(model)
    before = outcome(model, parameters)
    runs: list[None] = []
    monkeypatch.setattr(Block, "_run", lambda *given, kept=Block._run: (runs.append(None), kept(*given))[1])
    with blocks(model), checkpointing(model, True):
        close(outcome(model, parameters), before, 1e-5)
    assert len(runs) == 4  # each of two layers, and once more in the backward


@pytest.mark.parametrize(
    "spec",
    [
        gs.DoRA(r=2),
        gs.IA3(),
        gs.Houlsby(bottleneck=4),
        gs.LoRA(r=2, bias="all"),
        gs.LoRA(r=2, start="olora"),
        gs.NormTuning(),
        gs.LoRA(r=2, modules_to_save=("mlp.up_proj",), target_modules=("q_proj",)),
    ],
    ids=lambda spec: f"{spec.name}-{spec.to_dict().get('bias')}-{spec.to_dict().get('start')}",
)
def test_what_is_more_than_low_rank_terms_runs_as_ever(spec: Any) -> None:
    model = made("qwen2")
    parameters = adapted(model, spec)
    before = outcome(model, parameters)
    with blocks(model):
        assert all(torch.equal(one, other) for one, other in zip(outcome(model, parameters), before, strict=True))


def test_dropout_falls_on_the_same_numbers() -> None:
    model = made("llama")
    parameters = adapted(model, gs.LoRA(r=2, dropout=0.5))
    torch.manual_seed(3)
    before = outcome(model, parameters)
    with blocks(model):
        torch.manual_seed(3)
        assert all(torch.equal(one, other) for one, other in zip(outcome(model, parameters), before, strict=True))


def test_two_active_adapters_and_none() -> None:
    model = made("llama")
    adapted(model)
    gs.attach(model, gs.LoRA(r=2), name="second", seed=5)
    shaken = gs.trainable_parameters(model, "second")
    with torch.no_grad():
        for parameter in shaken.values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    gs.use(model, "default", "second")
    before = outcome(model, shaken)
    with blocks(model):
        close(outcome(model, shaken), before, 1e-5)
        with gs.using(model, None), torch.no_grad():
            bare = model(input_ids=torch.arange(1, 9)[None]).logits
    gs.detach(model)
    torch.testing.assert_close(bare, model(input_ids=torch.arange(1, 9)[None]).logits, rtol=1e-5, atol=1e-5)


def test_rows_with_different_adapters_and_generation_run_as_ever() -> None:
    model = made("llama")
    adapted(model)
    ids = torch.arange(1, 9).repeat(2, 1)
    with gs.using(model, ["default", None]):
        rows = model(input_ids=ids).logits
    text = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    with blocks(model):
        with gs.using(model, ["default", None]):
            assert torch.equal(model(input_ids=ids).logits, rows)
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None), text)


def test_layers_that_somebody_looks_into_are_left_alone() -> None:
    model = made("llama")
    adapted(model)
    seen = []
    hook = model.model.layers[0].mlp.register_forward_hook(lambda *called: seen.append(called[-1]))
    with blocks(model) as count:
        assert count == 1
        model(input_ids=torch.arange(1, 9)[None])
    assert len(seen) == 1
    hook.remove()
    model.model.layers[1].forward = model.model.layers[1].forward  # somebody's own
    with blocks(model) as count:
        assert count == 1


def test_an_activation_that_is_not_known_keeps_its_layers() -> None:
    model = made("llama", hidden_act="relu")
    adapted(model)
    with blocks(model) as count:
        assert count == 0


def test_less_is_kept_for_the_backward() -> None:
    model = made("llama")
    adapted(model)

    def kept() -> int:
        stores: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            stores[storage.data_ptr()] = storage.nbytes()
            return tensor

        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(input_ids=torch.randint(0, 250, (4, 64)), use_cache=False)
        return sum(size for place, size in stores.items() if place not in own)

    plain = kept()
    with blocks(model):
        assert kept() < 0.7 * plain  # the toy's head and embeddings are in both
