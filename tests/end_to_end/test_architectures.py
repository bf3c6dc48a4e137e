"""Twenty architectures, one life each: attach, train, save, load, merge, unmerge, detach; no exception goes unnamed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gossamer as gs
from gossamer.models import tiny
from gossamer.testing.toys import tiny_inputs
from tests.adapters import bits, same_bits

HEADS = {
    "llama": ["lm_head"],
    "mistral": ["lm_head"],
    "mixtral": ["lm_head"],
    "qwen2": ["lm_head"],
    "qwen3_moe": ["lm_head"],
    "gemma3": ["lm_head"],
    "phi": ["lm_head"],
    "gpt2": ["lm_head"],
    "gpt_neox": ["lm_head"],
    "opt": ["lm_head"],
    "falcon": ["lm_head"],
    "bloom": ["lm_head"],
    "t5": ["lm_head"],
    "bart": ["lm_head"],
    "bert": ["classifier"],
    "roberta": ["classifier.dense", "classifier.out_proj"],
    "deberta_v2": ["pooler.dense", "classifier"],
    "vit": ["classifier"],
    "clip": [],
    "whisper": ["proj_out"],
}
"""Architecture -> its linear modules that are the head, which "all-linear" leaves as they are."""

ALL_LINEAR = gs.LoRA(r=2)
EXPERTS = gs.LoRA(r=2, target_parameters=("experts.gate_up_proj", "experts.down_proj"))
MIXTURES = ("mixtral", "qwen3_moe")
CASES = [pytest.param(name, ALL_LINEAR, id=name) for name in HEADS] + [
    pytest.param(name, EXPERTS, id=f"{name} with experts") for name in MIXTURES
]


def said(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The main tensor of a model's output, without gradients."""
    with torch.no_grad():
        out = model(**inputs)
    return out.logits_per_image if "logits_per_image" in out else out.logits


def insides(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Everything that hangs on every module: plain attributes, parameters, buffers, children, hooks; one level deep."""
    found: dict[str, dict[str, Any]] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            found[f"{path}:{name}"] = dict(value) if isinstance(value, dict) else {"": value}
    return found


def same_insides(one: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]]) -> bool:
    """Whether the very same objects hang under the same names, in the same order."""
    return [*one] == [*other] and all(
        [*one[place]] == [*other[place]] and all(value is other[place][name] for name, value in one[place].items())
        for place in one
    )


def two_steps(model: nn.Module, inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Train on the model's own loss without weight decay, so that only a gradient moves a parameter.

    Returns the gradients of both steps.
    """
    trainable, gradients = gs.trainable_parameters(model, "default"), []
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2, weight_decay=0.0)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in trainable.items()})
        optimizer.step()
        gradients[-1] = {name: grad.clone() for name, grad in gradients[-1].items() if grad is not None}
    model.eval()
    return gradients


def values(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything that is trained."""
    return {name: value.detach().clone() for name, value in gs.trainable_parameters(model, "default").items()}


@pytest.mark.parametrize(("name", "spec"), CASES)
def test_a_whole_life(name: str, spec: gs.LoRA, toy: Callable[[str], nn.Module], tmp_path: Path):
    model, inputs = toy(name), tiny_inputs(name)
    plain, before, hanging = said(model, inputs), bits(model), insides(model)
    wanted = [parameter.requires_grad for parameter in model.parameters()]

    gs.attach(model, spec)
    assert torch.equal(said(model, inputs), plain), "a new adapter changes nothing"
    started = values(model)
    first, second = two_steps(model, inputs)
    assert first.keys() == second.keys() == started.keys(), "every parameter gets a gradient at once"
    assert all(gradient.isfinite().all() for gradient in (*first.values(), *second.values()))
    assert {key for key, gradient in first.items() if gradient.any()} == {key for key in started if "lora_B" in key}
    assert [key for key, value in values(model).items() if torch.equal(value, started[key])] == []
    assert all(
        parameter.grad is None for key, parameter in model.named_parameters() if "gossamer" not in key.split(".")
    )

    beside = said(model, inputs)
    assert not torch.allclose(beside, plain, rtol=0, atol=1e-2 * plain.abs().max().item()), "it has learned something"
    adapter = gs.capture(model)
    adapter.save(tmp_path / "adapter")
    other = toy(name)
    gs.attach(other, gs.Adapter.load(tmp_path / "adapter"))
    assert torch.equal(said(other, inputs), beside)

    gs.merge(model)
    torch.testing.assert_close(said(model, inputs), beside, rtol=0, atol=1e-4 * beside.abs().max().item())
    changed = {key for key, value in bits(model).items() if not torch.equal(value, before[key])}
    adapted = {
        f"{path}.{slot.rpartition('.')[0] or 'weight'}" for path in adapter.paths for slot in adapter.tensors[path]
    }
    assert changed == adapted, "every adapted weight and no other"
    gs.unmerge(model)
    assert same_bits(bits(model), before)
    assert torch.equal(said(model, inputs), beside)

    gs.detach(model)
    assert same_bits(dict(model.state_dict()), before)
    assert same_insides(insides(model), hanging)
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert torch.equal(said(model, inputs), plain)


@pytest.mark.parametrize("name", HEADS)
def test_all_linear_is_every_linear_module_but_the_head(name: str, toy: Callable[[str], nn.Module]):
    model = toy(name)
    linear = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    ]
    assert set(HEADS[name]) <= set(linear)
    gs.attach(model, ALL_LINEAR)
    assert set(gs.capture(model).paths) == {*linear} - {*HEADS[name]}


@pytest.mark.parametrize("name", MIXTURES)
def test_only_the_experts_that_were_chosen_learn(name: str):
    """Two tokens that are asked for their successor reach at most four of eight experts; the others keep their bits.

    B learns in the first step, so all that either step chose have moved. A learns where B is no longer zero, so only
    what both steps chose has.
    """
    model = tiny(name, num_local_experts=8)
    inputs = {key: value[:1, :3] for key, value in tiny_inputs(name).items()}
    gs.attach(model, EXPERTS)
    started = values(model)
    chosen: dict[str, list[set[int]]] = {}
    for path in (f"model.layers.{layer}.mlp" for layer in range(2)):
        steps = chosen.setdefault(f"{path}.experts", [])
        router = model.get_submodule(f"{path}.gate")
        router.register_forward_hook(lambda *call, steps=steps: steps.append({*call[-1][-1][:2].flatten().tolist()}))
    two_steps(model, inputs)

    for path, steps in chosen.items():
        first, second = steps
        assert 2 <= len(first) <= 4
        for matrix in ("gate_up_proj", "down_proj"):
            inner, outer = f"{path}.{matrix}.lora_A", f"{path}.{matrix}.lora_B"
            now = values(model)
            by_expert = (now[inner] != started[inner]).unflatten(0, (8, 2))  # stored expert by expert
            assert {expert for expert in range(8) if by_expert[expert].any()} == first & second, inner
            by_expert = (now[outer] != started[outer]).unflatten(1, (2, 8))  # stored rank by rank
            assert {expert for expert in range(8) if by_expert[..., expert].any()} == first | second, outer
