"""Adapters at a lower rank: the optimum, its stated error, and where the ranks go."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import gossamer as gs
from gossamer.errors import NonFiniteError, UnsupportedError, UsageError
from gossamer.methods import TargetedMethod
from gossamer.models import tiny
from tests.adapters import tokens, trained


def adapter(modules: dict[str, tuple[int, int, int]], seed: int = 0, **fields: Any) -> gs.Adapter:
    """Modules as path -> (out, in, rank)."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        path: {
            "lora_A": torch.randn(rank, inner, generator=generator),
            "lora_B": torch.randn(outer, rank, generator=generator) * 0.5 ** torch.arange(rank),
        }
        for path, (outer, inner, rank) in modules.items()
    }
    patterns = {f"^{path}": rank for path, (*_, rank) in modules.items()}
    return gs.Adapter(gs.LoRA(r=2, alpha=3.0, rank_pattern=patterns, target_modules=tuple(tensors), **fields), tensors)


def exact(value: gs.Adapter, path: str) -> Tensor:
    spec, slots = value.spec, value.tensors[path]
    assert isinstance(spec, gs.LoRA)
    return spec.scaling_at(path) * slots["lora_B"].double() @ slots["lora_A"].double()


def ranks(value: gs.Adapter) -> dict[str, int]:
    return {path: slots["lora_A"].shape[0] for path, slots in value.tensors.items()}


WIDE = adapter({"m.a": (9, 12, 6), "m.b": (20, 7, 5), "m.c": (6, 6, 2)}, scaling="rslora")


@pytest.mark.parametrize("r", [1, 2, 3, 4])
def test_the_error_is_eckart_and_youngs(r: int):
    value = WIDE.resize(r)
    lost = total = 0.0
    for path in WIDE.paths:
        whole = exact(WIDE, path)
        values = torch.linalg.svdvals(whole)
        best, found = values[r:].norm().item(), (whole - exact(value, path)).norm().item()
        assert found == pytest.approx(best, rel=1e-4, abs=2e-6 * values.norm().item())
        assert value.provenance["errors"][path] == pytest.approx(best / values.norm().item(), rel=1e-4, abs=1e-6)
        lost, total = lost + best**2, total + values.square().sum().item()
    assert value.provenance["error"] == pytest.approx((lost / total) ** 0.5, rel=1e-4)
    assert ranks(value) == {"m.a": r, "m.b": r, "m.c": min(r, 2)}


def test_nothing_to_drop_is_the_adapter_itself():
    value = WIDE.resize(16)
    assert value == WIDE
    assert value.provenance["error"] == 0
    assert WIDE.resize(energy=1.0) == WIDE


def test_a_sum_with_itself_shrinks_without_loss():
    value = (WIDE + WIDE).resize(6)
    assert value.provenance["error"] < 1e-6
    for path in WIDE.paths:
        torch.testing.assert_close(exact(value, path), 2 * exact(WIDE, path), rtol=0, atol=1e-5)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_energy_gives_each_module_the_fewest_ranks_that_hold_it(energy: float):
    value = WIDE.resize(energy=energy)
    for path, rank in ranks(value).items():
        squares = torch.linalg.svdvals(exact(WIDE, path)).square()
        share = squares.cumsum(0) / squares.sum()
        assert share[rank - 1] >= energy - 1e-6
        assert rank == 1 or share[rank - 2] < energy
    assert value.provenance["error"] ** 2 <= 1 - energy + 1e-6
    assert isinstance(value.spec, gs.LoRA)
    assert value.spec.rank_at("m.a") == ranks(value)["m.a"]


def test_pooled_ranks_go_where_the_energy_is():
    modules = {"m.big": (9, 9, 6), "m.small": (9, 9, 6)}
    value = adapter(modules)
    scaled = {path: {"lora_A": slots["lora_A"], "lora_B": slots["lora_B"] * (100 if path == "m.big" else 1)}
              for path, slots in value.tensors.items()}  # fmt: skip
    value = replace(value, tensors=scaled)
    assert ranks(value.resize(3, pooled=True)) == {"m.big": 5, "m.small": 1}
    assert value.resize(3, pooled=True).provenance["error"] < value.resize(3).provenance["error"]
    pooled = value.resize(energy=0.99, pooled=True)
    assert ranks(pooled)["m.small"] == 1
    assert pooled.provenance["error"] ** 2 <= 0.01
    assert sum(ranks(pooled).values()) <= sum(ranks(value.resize(energy=0.99)).values())
    everything = value.resize(6, pooled=True)
    assert everything == value


@pytest.mark.parametrize("path", ["m.a", "m.b"])
def test_pooled_is_the_best_split_of_its_budget(path: str):
    value = adapter({"m.a": (8, 8, 4), "m.b": (8, 8, 4)}, seed=3)
    squares = [torch.linalg.svdvals(exact(value, name)).square() for name in ("m.a", "m.b")]
    lost = [squares[0][one:].sum() + squares[1][4 - one :].sum() for one in (1, 2, 3)]
    total = sum(one.sum() for one in squares)
    best = (torch.stack(lost).min() / total).sqrt().item()
    assert value.resize(2, pooled=True).provenance["error"] == pytest.approx(best, rel=1e-4)


def test_memory_is_that_of_the_factors():
    value = adapter({"m.a": (4096, 4096, 64)})
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        value.resize(8)
    largest = max(event.cpu_memory_usage for event in record.events() or ())
    assert 0 < largest < 4 * 4096 * 64 * 4  # the whole matrix is sixteen times


@pytest.mark.parametrize(
    "arguments",
    [{}, {"r": 2, "energy": 0.5}, {"r": 0}, {"r": 2.0}, {"r": True}, {"energy": 0}, {"energy": 1.1}],
    ids=str,
)
def test_what_cannot_be_asked(arguments: dict[str, Any]):
    with pytest.raises(UsageError):
        WIDE.resize(**arguments)


def test_refusals():
    with pytest.raises(UnsupportedError, match=r"norm\.weight"):
        replace(WIDE, tensors=dict(WIDE.tensors) | {"norm": {"weight": torch.ones(3)}}).resize(1)
    broken = dict(WIDE.tensors) | {"m.c": {slot: value / 0 for slot, value in WIDE.tensors["m.c"].items()}}
    with pytest.raises(NonFiniteError):
        replace(WIDE, tensors=broken).resize(1)
    model = tiny("llama")
    with pytest.raises(UnsupportedError, match="dora"):
        trained(model, gs.DoRA(r=2)).resize(1)


LAYOUTS = [
    ("llama", gs.LoRA(r=3, target_modules=("embed_tokens", "q_proj", "down_proj"))),
    ("llama", gs.LoRA(r=3, start="pissa")),
    ("gpt2", gs.LoRA(r=3, scaling="rslora")),
    ("mixtral", gs.LoRA(r=3, target_modules=("q_proj",), target_parameters=("experts.gate_up_proj",))),
    ("mixtral", gs.LoRA(r=2, target_modules=(), target_parameters=("experts.gate_up_proj", "experts.down_proj"))),
]


@pytest.mark.parametrize(("kind", "spec"), LAYOUTS, ids=[f"{kind}-{index}" for index, (kind, _) in enumerate(LAYOUTS)])
def test_sums_and_sizes_of_every_layout_on_a_model(kind: str, spec: TargetedMethod):
    model = tiny(kind)
    first = trained(model, spec, "first", seed=1)
    gs.detach(model)
    second = trained(model, spec.replace(r=2, alpha=5.0), "second", seed=2)
    first_logits = shown(model, first)
    total = first + second
    stacked = shown(model, first, second)
    torch.testing.assert_close(shown(model, total), stacked, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(shown(model, gs.combine([first, second], [1.0, 1.0])), stacked, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(shown(model, total - second), first_logits, rtol=1e-3, atol=1e-3)
    whole = (total - second).resize(6 if getattr(spec, "start", "") == "pissa" else 3)
    assert whole.provenance["error"] < 1e-5
    torch.testing.assert_close(shown(model, whole), first_logits, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def shown(model: torch.nn.Module, *adapters: gs.Adapter) -> Tensor:
    """Logits with these adapters and no others."""
    for name in gs.attached(model):
        gs.detach(model, name)
    for index, one in enumerate(adapters):
        gs.attach(model, one, f"a{index}")
    gs.use(model, *gs.attached(model))
    return model(tokens()).logits
