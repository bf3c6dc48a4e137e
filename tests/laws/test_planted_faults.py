"""A law that cannot fail proves nothing: for each of them a fault is planted, and the law must notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gossamer as gs
from gossamer.adapter import Adapter
from gossamer.attachment import host, layers, site, verbs
from gossamer.linalg import LowRankPair
from gossamer.methods import LoRA
from gossamer.methods.lora_layers import LoRALayer
from tests.laws import test_laws as laws
from tests.laws import test_starting_laws as starting
from tests.laws.nets import TowerCase

CASE = TowerCase((4, 5, 6), (True, True), (False, True), 1, torch.float32, 0)
SPEC = LoRA(r=2, bias="lora_only", modules_to_save=("norm",))
PLAIN = LoRA(r=2)

Plant = Callable[[pytest.MonkeyPatch], None]


class Drawn:
    """What a law draws, one after the other, given beforehand."""

    def __init__(self, *values: Any) -> None:
        self.values = [CASE, *values]

    def draw(self, strategy: Any) -> Any:
        return self.values.pop(0)


def start_off(patch: pytest.MonkeyPatch) -> None:
    initial = LoRA.initial
    patch.setattr(LoRA, "initial", lambda *given: {name: slot + 1e-3 for name, slot in initial(*given).items()})


def thaw(patch: pytest.MonkeyPatch) -> None:
    add = host.Host.add

    def adding(self: host.Host, *given: Any) -> None:
        add(self, *given)
        next(self.model.parameters()).requires_grad_(True)

    patch.setattr(host.Host, "add", adding)


def merge_too_much(patch: pytest.MonkeyPatch) -> None:
    added_to = LoRALayer.added_to
    patch.setattr(LoRALayer, "added_to", lambda self, *given: added_to(self, *given) + 1e-3)


def unmerge_by_subtracting(patch: pytest.MonkeyPatch) -> None:
    def subtracting(net: nn.Module) -> None:
        adapter, merged = gs.capture(net), {name: value.clone() for name, value in net.named_parameters()}
        whole(net)
        for path in adapter.paths:
            if "lora_A" in adapter.tensors[path]:
                weight, delta = net.get_submodule(path).weight, adapter.delta(path)
                turned = delta if weight.shape == delta.shape else delta.T
                weight.data.copy_(merged[f"{path}.weight"] - turned)

    whole = gs.unmerge
    patch.setattr(gs, "unmerge", subtracting)


def leave_a_flag(patch: pytest.MonkeyPatch) -> None:
    remove = host.Host.remove

    def removing(self: host.Host, *names: str) -> None:
        remove(self, *names)
        for parameter in self.model.parameters():
            parameter.requires_grad_(True)

    patch.setattr(host.Host, "remove", removing)


def leave_a_container(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(site.Site, "remove", site.Site.disable)


def seed_by_order(patch: pytest.MonkeyPatch) -> None:
    new, count = layers.new_layers, iter(range(99))
    patch.setattr(verbs, "new_layers", lambda model, spec, selection, seed: new(model, spec, selection, next(count)))


def wrap_names(patch: pytest.MonkeyPatch) -> None:
    capture = gs.capture

    def capturing(*given: Any) -> Adapter:
        adapter = capture(*given)
        wrapped = {f"base_layer.{path}": slots for path, slots in adapter.tensors.items()}
        return Adapter(adapter.spec, wrapped, adapter.base)

    patch.setattr(gs, "capture", capturing)


def load_in_half(patch: pytest.MonkeyPatch) -> None:
    load = Adapter.load

    def loading(folder: Any) -> Adapter:
        adapter = load(folder)
        rounded = {
            path: {name: slot.bfloat16().float() for name, slot in slots.items()}
            for path, slots in adapter.tensors.items()
        }
        return Adapter(adapter.spec, rounded, adapter.base, adapter.provenance, adapter.foreign)

    patch.setattr(gs.Adapter, "load", loading)


def swap_rows(patch: pytest.MonkeyPatch) -> None:
    joined = site._joined
    patch.setattr(site, "_joined", lambda outs, order, where: joined(outs, order.flip(0), where))


def run_all_rows(patch: pytest.MonkeyPatch) -> None:
    stacked = site.Site._stacked
    patch.setattr(site.Site, "_stacked", lambda self, active: stacked(self, tuple(self.layers)))


def write_before_checking(patch: pytest.MonkeyPatch) -> None:
    merged = site.Site.merged

    def merging(self: site.Site, *given: Any) -> dict[str, Tensor]:
        found = merged(self, *given)
        for name, value in found.items():
            self.stored(name).data.copy_(value)
        return found

    patch.setattr(site.Site, "merged", merging)


def sum_a_little_off(patch: pytest.MonkeyPatch) -> None:
    summed = LoRA.summed

    def summing(*given: Any) -> Any:
        spec, tensors = summed(*given)
        off = {path: {name: slot * 1.001 for name, slot in slots.items()} for path, slots in tensors.items()}
        return spec, off

    patch.setattr(LoRA, "summed", summing)


def copy_in_single(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(layers, "wide", lambda tensor: tensor.float())


def cut_a_gradient(patch: pytest.MonkeyPatch) -> None:
    cut = lambda self: LowRankPair(self.pair.lora_A.detach(), self.pair.lora_B, self.scaling)  # noqa: E731
    patch.setattr(LoRALayer, "plain_pair", cut)


def always_drop(patch: pytest.MonkeyPatch) -> None:
    drop = nn.functional.dropout
    patch.setattr(nn.functional, "dropout", lambda x, p, training: drop(x, p, True))


def guess_rows(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(site.Site, "_rows_share", lambda self, rows, args, kwargs: args[0].shape[0] // rows)


def take_keywords_away(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(site.Site, "run", lambda self, *args, **kwargs: self.frozen(*args, **kwargs))


FAULTS: list[tuple[Any, Plant, tuple[Any, ...]]] = [
    (laws.test_at_the_start_the_output_is_unchanged, start_off, (SPEC,)),
    (laws.test_only_its_parameters_get_gradients_and_all_of_them, thaw, (SPEC,)),
    (laws.test_merged_equals_unmerged_and_unmerge_gives_the_bits_back, merge_too_much, (SPEC,)),
    (laws.test_merged_equals_unmerged_and_unmerge_gives_the_bits_back, unmerge_by_subtracting, (PLAIN,)),
    (laws.test_detach_leaves_the_model_as_it_was_found, leave_a_flag, (SPEC, False)),
    (laws.test_detach_leaves_the_model_as_it_was_found, leave_a_container, (SPEC, True)),
    (laws.test_names_hold_no_wrapper_and_do_not_depend_on_order, seed_by_order, (PLAIN, PLAIN)),
    (laws.test_names_hold_no_wrapper_and_do_not_depend_on_order, wrap_names, (PLAIN, PLAIN)),
    (laws.test_saving_and_loading_is_bit_exact, load_in_half, (SPEC,)),
    (laws.test_a_row_of_a_mixed_batch_equals_that_row_alone, swap_rows, (PLAIN, PLAIN, ["a", "b", None, "a"])),
    (laws.test_a_refused_merge_changes_nothing, write_before_checking, (SPEC,)),
    (laws.test_adapters_are_a_vector_space, sum_a_little_off, (PLAIN, PLAIN, 0.5)),
    (starting.test_numbers_that_float32_does_not_hold_stay_as_they_are, copy_in_single, (SPEC,)),
    (starting.test_by_the_second_step_every_parameter_has_moved, cut_a_gradient, (PLAIN,)),
    (starting.test_dropout_acts_in_training_only_and_not_on_what_is_merged, always_drop, (SPEC,)),
    (starting.test_gradients_of_a_row_reach_only_its_adapter, run_all_rows, (PLAIN, PLAIN)),
]
names = [f"{law.__name__.removeprefix('test_')}: {plant.__name__}" for law, plant, _ in FAULTS]


@pytest.mark.parametrize(("law", "plant", "drawn"), FAULTS, ids=names)
def test_the_law_holds_and_notices(law: Any, plant: Plant, drawn: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch):
    law.hypothesis.inner_test(method="lora", data=Drawn(*drawn))
    plant(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception, gs.GossamerError)):
        law.hypothesis.inner_test(method="lora", data=Drawn(*drawn))


def test_rows_guessed_are_noticed(monkeypatch: pytest.MonkeyPatch):
    starting.test_rows_that_cannot_be_told_apart_are_refused("lora")
    guess_rows(monkeypatch)
    with pytest.raises(pytest.fail.Exception):
        starting.test_rows_that_cannot_be_told_apart_are_refused("lora")


def test_lost_keywords_are_noticed(monkeypatch: pytest.MonkeyPatch):
    starting.test_rows_of_a_module_called_by_keyword("lora")
    take_keywords_away(monkeypatch)
    with pytest.raises(AssertionError):
        starting.test_rows_of_a_module_called_by_keyword("lora")


def test_every_law_has_a_planted_fault():
    """Of those that draw; what is tested without drawing stands above."""
    drawn = {name for module in (laws, starting) for name, one in vars(module).items() if hasattr(one, "hypothesis")}
    assert drawn - {law.__name__ for law, _, _ in FAULTS} == {"test_adapters_without_sums_say_so"}  # asserts an error
