"""Which modules a spec names, and what is said about a pattern that names none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.errors import AdapterFileError, BaseMismatchError, TargetError
from tests.adapters import trained
from tests.conformance.oracle import Toys

ALL_LINEAR = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "mistral": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "gemma": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "qwen2": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "llama_classifier": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    "gpt_neox": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "bert": {"query", "key", "value", "dense"},
}
LLAMA_SITES = 14


def taken(model: nn.Module, **fields: Any) -> list[str]:
    """The canonical paths a LoRA spec adapts."""
    return [row.path for row in gs.attach(model, gs.LoRA(**fields)).sites]


@pytest.mark.parametrize("name", ALL_LINEAR)
def test_all_linear_is_every_linear_module_but_the_head(name: str, toy: Toys):
    model = toy(name)
    paths = taken(model)
    assert {path.rsplit(".", 1)[-1] for path in paths} == ALL_LINEAR[name]
    body = {id(module) for module in model.base_model.modules()}
    assert all(id(model.get_submodule(path)) in body for path in paths), "nothing outside the body: no head"
    linear = [
        path for path, module in model.base_model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")
    ]
    assert len(paths) == len([path for path in linear if "gossamer" not in path])


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"target_modules": ("q_proj",)}, 2),
        ({"target_modules": ("self_attn.q_proj", "model.layers.1.mlp.up_proj")}, 3),
        ({"target_modules": r".*\.(q|k)_proj"}, 4),
        ({"target_modules": "lm_head"}, 1),
        ({"exclude_modules": ("q_proj", "layers.0.mlp.up_proj")}, LLAMA_SITES - 3),
        ({"exclude_modules": r".*mlp.*"}, 8),
        ({"layers_to_transform": 1}, 7),
        ({"layers_to_transform": (0, 1), "target_modules": ("q_proj",)}, 2),
        ({"modules_to_save": ("self_attn",)}, LLAMA_SITES),  # 8 of them whole
    ],
)
def test_patterns(fields: dict[str, Any], count: int, toy: Toys):
    assert len(taken(toy("llama"), **fields)) == count


def test_a_suffix_begins_at_a_dot(toy: Toys):
    with pytest.raises(TargetError):
        taken(toy("llama"), target_modules=("proj",))


@pytest.mark.parametrize(
    ("fields", "field", "hint"),
    [
        ({"target_modules": ("q_proj", "v_porj")}, "target_modules: 'v_porj'", "'v_proj'"),
        ({"target_modules": r".*\.query"}, "target expression", "q_proj"),
        ({"target_modules": ("norm",)}, "names a LlamaRMSNorm", "modules_to_save"),
        ({"target_modules": ("mlp",)}, "names a LlamaMLP", "gate_proj"),
        ({"trainable_tokens": {"embed": (1,)}}, "trainable_tokens: 'embed'", "embed_tokens"),
        ({"trainable_tokens": (1, 320)}, "different rows of the embedding", "resize_token_embeddings"),
        ({"target_parameters": ("experts.gate_up_proj",)}, "no stacked matrix", "target_modules"),
        ({"exclude_modules": ("down_porj",)}, "exclude_modules: 'down_porj'", "'down_proj'"),
        ({"exclude_modules": r".*lm_haed"}, "exclude_modules", "q_proj"),
        ({"exclude_modules": ("lm_head",)}, "exclude_modules: 'lm_head'", ""),
        ({"modules_to_save": ("lm_heda",)}, "modules_to_save: 'lm_heda'", "'lm_head'"),
        ({"layers_to_transform": (0, 2)}, "layers_to_transform", "0..1"),
        ({"layers_to_transform": -1}, "layers_to_transform", "0..1"),
        ({"rank_pattern": {"q_porj": 3}}, "rank_pattern", "'q_proj'"),
        ({"alpha_pattern": {"layers.7.mlp.up_proj": 3.0}}, "alpha_pattern", "'up_proj'"),
        ({"rank_pattern": {"o_proj": 3}, "target_modules": ("q_proj",)}, "rank_pattern", "'q_proj'"),
        ({"target_modules": ("q_proj",), "exclude_modules": ("q_proj",)}, "no module is left", ""),
        ({"target_modules": ("lm_head",), "modules_to_save": ("lm_head",)}, "names a Linear", ""),
    ],
)
def test_a_pattern_that_names_nothing(fields: dict[str, Any], field: str, hint: str, toy: Toys):
    model = toy("llama")
    with pytest.raises(TargetError) as caught:
        gs.attach(model, gs.LoRA(**fields))
    assert field in caught.value.what
    assert hint in str(caught.value)
    assert gs.attached(model) == ()
    assert all(parameter.requires_grad for parameter in model.parameters()), "nothing was frozen either"


def test_a_pattern_with_flags(toy: Toys):
    """Compiles alone, and must be usable where patterns are matched; or be refused as a spec."""
    with pytest.raises(gs.GossamerError):
        gs.attach(toy("llama"), gs.LoRA(rank_pattern={"(?i)Q_PROJ": 3}))


def test_more_than_one_rank(toy: Toys):
    spec = gs.LoRA(r=4, rank_pattern={"q_proj": 2, r"layers\.0\..*": 3}, alpha_pattern={"self_attn.q_proj": 1.0})
    rows = {row.path: row.rank for row in gs.attach(toy("llama"), spec).sites}
    assert rows["model.layers.0.self_attn.q_proj"] == 2, "the first pattern that matches"
    assert rows["model.layers.0.mlp.up_proj"] == 3
    assert rows["model.layers.1.mlp.up_proj"] == 4
    assert spec.scaling_at("model.layers.1.self_attn.q_proj") == 1 / 2


def test_the_report(toy: Toys):
    model = toy("llama")
    report = gs.attach(model, gs.LoRA(r=2, target_modules=("q_proj", "k_proj"), modules_to_save=("model.norm",)))
    own = 2 * 2 * (64 + 64) + 2 * 2 * (64 + 32) + 64
    assert report.trainable == own == sum(p.numel() for p in gs.trainable_parameters(model).values())
    assert report.total == sum(parameter.numel() for parameter in model.parameters())
    assert report.share == own / report.total
    assert report.nbytes == 4 * own
    text = str(report)
    assert all(piece in text for piece in ("q_proj", "x 2", "64 x 64", "32 x 64", "whole", f"{own:,} trainable"))
    described = report.to_dict()
    assert described["sites"][0] == {
        "path": "model.layers.0.self_attn.q_proj",
        "kind": "Linear",
        "shape": "64 x 64",
        "rank": 2,
        "parameters": 256,
    }
    frozen = toy("llama")
    assert gs.attach(frozen, gs.capture(model)).trainable == 0


def test_an_adapter_for_another_base(toy: Toys):
    from gossamer.models import tiny

    adapter = trained(toy("llama"), gs.LoRA(r=2))
    other, ids = tiny("llama", seed=1), torch.tensor([[1, 2, 3]])
    before = other(ids).logits
    with pytest.raises(BaseMismatchError, match="weights differ"):
        gs.attach(other, adapter)
    assert gs.attached(other) == ()
    assert torch.equal(other(ids).logits, before)
    gs.attach(other, adapter, force_base=True)
    assert not torch.equal(other(ids).logits, before)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"intermediate_size": 80}, AdapterFileError, "model.layers.0.mlp.gate_proj"),
        ({"num_hidden_layers": 1}, AdapterFileError, "model.layers.1.mlp.down_proj"),
        ({"num_hidden_layers": 3}, AdapterFileError, "model.layers.2."),
    ],
)
def test_an_adapter_of_another_shape(change: dict[str, int], error: type[Exception], text: str, toy: Toys):
    from gossamer.models import tiny

    adapter, other = trained(toy("llama"), gs.LoRA(r=2)), tiny("llama", **change)
    with pytest.raises(BaseMismatchError, match="shapes"):
        gs.attach(other, adapter)
    with pytest.raises(error, match=text):
        gs.attach(other, adapter, force_base=True)
    assert gs.attached(other) == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_copy_in_another_dtype_is_the_same_base(dtype: torch.dtype, toy: Toys):
    adapter = trained(toy("llama"), gs.LoRA(r=2))
    gs.attach(toy("llama").to(dtype), adapter)


class SelfAttention(nn.Module):
    """torch's own attention, of one input with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize("make", [SelfAttention, lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)])
def test_modules_whose_forward_is_not_called(make: Callable[[], nn.Module]):
    """torch's own attention and encoder layers use weights without calling the modules that own them."""
    model, x = make().eval(), torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    try:
        trained(model, gs.LoRA(r=2))
    except gs.GossamerError:
        return  # refused by name: right as well
    beside = model(x)
    gs.merge(model)
    torch.testing.assert_close(model(x), beside)


@pytest.mark.parametrize(
    "module",
    [
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
        nn.LazyLinear(4),
        nn.Linear(3, 4, device="meta"),
    ],
    ids=["parametrised", "lazy", "meta"],
)
def test_a_weight_that_is_not_there(module: nn.Module):
    """Refused with one of our errors, or adapted; never a bare one."""
    model = nn.Sequential(module)
    try:
        gs.attach(model, gs.LoRA(r=2))
    except gs.GossamerError:
        assert gs.attached(model) == ()
