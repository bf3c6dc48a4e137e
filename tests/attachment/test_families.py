"""The law over architectures: what an adapter says beside the weights, it says in them, module by module; or it is
refused by name, or left out with a note. And no module that "all-linear" takes is without effect."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from torch import Tensor, nn

import gossamer as gs
from gossamer.errors import GossamerError, TargetError
from gossamer.methods import TargetedMethod
from tests.adapters import bits, same_bits, shaken
from tests.attachment.families import FAMILIES, QUICK, answer, family

each_family = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)

WITHOUT_LINEAR = ("BitForImageClassification",)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / one.abs().max())


def effect(name: str, model: nn.Module, spec: TargetedMethod, base: Tensor) -> float | None:
    """How far an adapter moves the output; None where it is refused. Asserts that merging it moves it as far."""
    before = bits(model)
    try:
        gs.attach(model, spec)
    except GossamerError:
        return None
    try:
        shaken(model, "default", 0.3)
        beside = answer(name, model)
        try:
            gs.merge(model)
        except GossamerError:  # tied weights, groups: beside the weights only
            return apart(base, beside)
        assert apart(beside, answer(name, model)) < 2e-3, spec.target_modules
        gs.unmerge(model)
        return apart(base, beside)
    finally:
        gs.detach(model)
        assert same_bits(bits(model), before)


def kinds(model: nn.Module) -> Iterator[str]:
    """One path for each kind of module: its class, its name and that of the module it is in."""
    seen = set()
    for path, module in model.named_modules():
        words = [word for word in path.split(".") if not word.isdigit()]
        key = (type(module), *words[-2:])
        if path and [*module.parameters(recurse=False)] and key not in seen:
            seen.add(key)
            yield path


@each_family
def test_each_kind_of_module_by_its_name(name: str):
    model = family(name)
    base = answer(name, model)
    for path in kinds(model):
        effect(name, model, gs.LoRA(r=2, target_modules=re.escape(path)), base)


@each_family
def test_all_linear(name: str):
    model = family(name)
    if name in WITHOUT_LINEAR:
        with pytest.raises(TargetError, match="no module is left"):
            gs.attach(model, gs.LoRA(r=2))
        return
    base, taken = answer(name, model), {site.path for site in gs.attach(model, gs.LoRA(r=2)).sites}
    gs.detach(model)
    for path in kinds(model):
        if path in taken:
            moved = effect(name, model, gs.LoRA(r=2, target_modules=re.escape(path)), base)
            assert moved is not None, path
            assert moved > 1e-6, f"{path} is adapted without effect"
    assert effect(name, model, gs.LoRA(r=2), base)


@each_family
@pytest.mark.parametrize(
    "spec", [gs.LoRA(r=2, bias="all"), gs.BitFit(), gs.FullTuning()], ids=["lora", "bitfit", "full"]
)
def test_parameters_that_are_trained_whole(name: str, spec: TargetedMethod):
    model = family(name)
    effect(name, model, spec, answer(name, model))
