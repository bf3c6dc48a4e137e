"""The module that holds codes: what it computes, what it keeps, what it writes and refuses to read."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import gossamer as gs
from gossamer.errors import NonFiniteError, UsageError
from gossamer.planning.fake import LiveBytes
from gossamer.quant import FORMATS, QuantizedLinear, format_of, linear, quantize_model, quantized

every_format = pytest.mark.parametrize("quant", FORMATS)


def plain(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(48, 32, bias=bias, dtype=dtype)


def twin(module: QuantizedLinear) -> nn.Linear:
    """The dense module of the numbers that the codes stand for."""
    dense = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, dtype=module.dtype)
    dense.weight.data.copy_(module.weight)
    if module.bias is not None:
        dense.bias.data.copy_(module.bias)
    return dense


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of the weights that were rebuilt."""
    calls: list[tuple[int, ...]] = []
    real = linear.dequantize
    monkeypatch.setattr(
        linear, "dequantize", lambda packed, dtype: (calls.append(packed.shape), real(packed, dtype))[1]
    )
    yield calls


@every_format
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_what_its_dense_twin_computes(quant: str, bias: bool, dtype: torch.dtype):
    module = quantized(plain(bias, dtype), quant)
    dense, x = twin(module), torch.randn(2, 3, 48).to(dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, expected = module(ours), dense(theirs)
    assert torch.equal(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad)
    if bias:
        assert module.bias is not None
        torch.testing.assert_close(module.bias.grad, dense.bias.grad)


def test_gradients_in_float64():
    module = quantized(plain(dtype=torch.float64), "nf4")
    x = torch.randn(2, 48, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,))
    assert torch.autograd.gradgradcheck(module, (x,))


def test_the_backward_keeps_neither_the_weight_nor_the_input():
    module, kept = quantized(plain(), "nf4"), []
    x = torch.randn(5, 48, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tuple(tensor.shape)), lambda _: None):
        module(x)
    assert kept == []


def test_one_weight_is_rebuilt_for_each_pass(monkeypatch: pytest.MonkeyPatch):
    net = quantize_model(nn.Sequential(plain(), nn.Linear(32, 48)), "nf4")
    x = torch.randn(5, 48, requires_grad=True)
    with counted(monkeypatch) as calls:
        out = net(x).sum()
        assert len(calls) == 2
        out.backward()
        assert len(calls) == 4


@pytest.mark.parametrize("spec", [gs.BitFit(), gs.LoRA(r=2, target_modules=["0"], bias="lora_only")])
def test_training_a_bias_rebuilds_no_weight_of_its_own(spec: gs.LoRA, monkeypatch: pytest.MonkeyPatch):
    net = quantize_model(nn.Sequential(plain(), nn.Linear(32, 48)), "nf4")
    with counted(monkeypatch) as calls:
        gs.attach(net, spec)
        assert calls == []
        out = net(torch.randn(5, 48)).sum()
        assert len(calls) == 2
        out.backward()
        assert len(calls) == 3  # the second module's, for the gradient of what reaches it


@every_format
def test_one_rebuilt_weight_lives_at_a_time(quant: str):
    net = quantize_model(nn.Sequential(*(nn.Linear(256, 256) for _ in range(4))), quant).requires_grad_(False)
    x, whole = torch.randn(2, 256, requires_grad=True), 256 * 256 * 4
    net(x).sum().backward()  # tables are made once
    assert x.grad is not None
    with LiveBytes([*net.buffers(), *net.parameters(), x, x.grad]) as live:
        before = live.now
        out = net(x).sum()
        assert whole <= live.peak - before < 1.1 * whole
        assert live.now - before < 0.1 * whole
        live.peak = before = live.now
        out.backward()
        assert whole <= live.peak - before < 1.1 * whole


def test_what_can_be_trained_is_the_bias():
    module = quantized(plain(), "nf4")
    assert [name for name, _ in module.named_parameters()] == ["bias"]
    module.requires_grad_(False)
    x = torch.randn(5, 48)
    assert not module(x).requires_grad
    module(x.requires_grad_()).sum().backward()
    assert x.grad is not None
    assert module.bias is not None
    assert module.bias.grad is None
    bare = quantized(plain(bias=False), "nf4")
    assert not [*bare.parameters()]


def test_moving_to_another_dtype_leaves_the_scales():
    module = quantized(plain(), "nf4")
    before = {name: value.clone() for name, value in module.named_buffers()}
    module.to(torch.bfloat16)
    assert module.bias is not None
    assert (module.dtype, module.weight.dtype, module.bias.dtype) == (torch.bfloat16,) * 3
    assert all(torch.equal(value, before[name]) for name, value in module.named_buffers())
    assert all(value.dtype == before[name].dtype for name, value in module.named_buffers())
    module.double()
    assert torch.equal(module.weight, twin(quantized(plain(), "nf4")).weight.double())


def test_its_outline_takes_no_memory_and_holds_no_numbers():
    outline = quantized(plain(), "nf4").outline
    assert (outline.shape, outline.dtype, outline.untyped_storage().nbytes()) == ((32, 48), torch.float32, 4)
    assert outline.isnan().all()


@every_format
def test_what_it_saves_it_reads(quant: str):
    module = quantized(plain(), quant)
    state = module.state_dict()
    other = quantized(nn.Linear(48, 32), quant)
    other.load_state_dict(state)
    assert torch.equal(other.weight, module.weight)
    assert torch.equal(other(torch.ones(1, 48)), module(torch.ones(1, 48)))
    assert torch.equal(copy.deepcopy(module).weight, module.weight)


def broken() -> dict[str, tuple[str, dict[str, Tensor | None]]]:
    """What may be wrong with a stored weight: name -> (what the error says, changed parts; None takes one away)."""
    state = "weight.quant_state.bitsandbytes__nf4"

    def told(**fields: object) -> Tensor:
        import json

        known: dict[str, object] = {"quant_type": "nf4", "blocksize": 64, "shape": [32, 48], "nested_blocksize": 256}
        known["nested_offset"] = 0.05
        return torch.tensor([*json.dumps(known | fields).encode()], dtype=torch.uint8)

    return {
        "no state": ("without its quantisation state", {state: None}),
        "no codes": ("without its codes", {"weight": None}),
        "no offset": ("without their offset", {state: told(nested_offset=None)}),
        "an offset in words": ("without their offset", {state: told(nested_offset="0.1")}),
        "an endless offset": ("not finite", {state: told(nested_offset=float("inf"))}),
        "scales of scales that are NaN": ("not finite", {"weight.nested_absmax": torch.full((1,), torch.nan)}),
        "too many scales of scales": ("do not fit", {"weight.nested_absmax": torch.zeros(2)}),
        "scales of another kind": ("do not fit", {"weight.absmax": torch.zeros(24)}),
        "deep JSON": ("not JSON", {state: torch.tensor([*b"[" * 100_000], dtype=torch.uint8)}),
        "no scales": ("not read", {"weight.absmax": None}),
        "short codes": ("do not fit", {"weight": torch.zeros(7, 1, dtype=torch.uint8)}),
        "short scales": ("do not fit", {"weight.absmax": torch.zeros(3, dtype=torch.uint8)}),
        "another shape": ("not read", {state: told(shape=[48, 32])}),
        "another block": ("not read", {state: told(blocksize=128)}),
        "no JSON": ("not JSON", {state: torch.tensor([1, 2, 3], dtype=torch.uint8)}),
        "no mapping": ("no mapping", {state: torch.tensor([*b"[1]"], dtype=torch.uint8)}),
        "another table": ("table of codes", {"weight.quant_map": torch.zeros(16)}),
    }


def refused(quant: str, says: str, parts: dict[str, Tensor | None]) -> None:
    """A net whose second module's state has these parts changed is not loaded, and the error names that module."""
    net = quantize_model(nn.Sequential(nn.ReLU(), plain()), quant)
    module = net[1]
    before, changed = module.weight, {f"1.{name}": value for name, value in parts.items()}
    state = {name: value for name, value in (net.state_dict() | changed).items() if value is not None}
    with pytest.raises(RuntimeError, match=says) as caught:
        net.load_state_dict(state)
    assert re.search(r"where: +1(\.weight\.\w+)?$|\b1\.bias\b", str(caught.value), re.MULTILINE)
    assert torch.equal(module.weight, before)


@pytest.mark.parametrize(("says", "parts"), broken().values(), ids=broken())
def test_broken_parts_are_named(says: str, parts: dict[str, Tensor | None]):
    refused("nf4", says, parts)


@pytest.mark.parametrize(
    ("says", "parts"),
    [
        ("without its codes", {"weight": None}),
        ("without its quantisation state", {"SCB": None}),
        ("do not fit", {"weight": torch.zeros(48, 32, dtype=torch.int8)}),  # as many, turned round
        ("do not fit", {"SCB": torch.ones(48)}),
        ("not finite", {"SCB": torch.full((32,), torch.nan)}),
        ("size mismatch", {"bias": torch.ones(1)}),  # it would be spread over all rows
    ],
)
def test_broken_parts_of_int8_are_named(says: str, parts: dict[str, Tensor | None]):
    refused("int8", says, parts)


def test_a_bias_that_the_module_lacks_is_refused():
    module = quantized(plain(bias=False), "nf4")
    with pytest.raises(RuntimeError, match="bias"):
        module.load_state_dict(quantized(plain(), "nf4").state_dict())


def test_a_weight_that_is_not_finite_is_refused():
    module = plain()
    module.weight.data[3, 4] = torch.nan
    with pytest.raises(NonFiniteError) as caught:
        quantize_model(nn.Sequential(plain(), module), "nf4")
    assert caught.value.where == "1"


class Tied(nn.Module):
    """Two modules with one weight, one with two names, one that is skipped."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.named, self.head = plain(), plain(), plain(), plain()
        self.other.weight = self.one.weight
        self.again = self.named


def test_which_modules_are_quantised():
    net = Tied()
    quantize_model(net, "nf4", skip=["head"])
    kinds = {name: type(module).__name__ for name, module in net.named_modules(remove_duplicate=False) if name}
    assert kinds == dict.fromkeys(("one", "other", "head"), "Linear") | dict.fromkeys(
        ("named", "again"), "QuantizedLinear"
    )
    assert net.named is net.again


def test_a_conv1d_becomes_a_linear_module():
    conv = Conv1D(32, 48)
    net = nn.Sequential(copy.deepcopy(conv))
    quantize_model(net, "int8")
    x = torch.randn(3, 48)
    torch.testing.assert_close(net(x), conv(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("net", "quant"), [(nn.Sequential(plain()), "nf5"), (nn.ReLU(), "nf4"), (plain(), "nf4")])
def test_what_cannot_be_quantised(net: nn.Module, quant: str):
    with pytest.raises(UsageError):
        quantize_model(net, quant)


@pytest.mark.parametrize("word", ["4bit", "int4", "q4_0", "bnb-4bit", "4", "nf4-double", "8bit", "q8_0", "llm.int8"])
def test_another_tools_word_is_led_to_as_many_bits(word: str):
    with pytest.raises(UsageError) as caught:
        format_of(word)
    named = [name for name in FORMATS if repr(name) in caught.value.hint]
    assert named
    assert all(("4" in name) == ("4" in word) for name in named)
