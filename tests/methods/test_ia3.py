"""IA3 against its own equation in float64 and against PEFT, before and behind modules of every kind it fits."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import gossamer as gs
from gossamer.errors import SpecError, TargetError
from gossamer.methods import IA3
from gossamer.models import tiny, tiny_inputs
from tests.adapters import shaken


def one(module: nn.Module, x: Tensor, scales_input: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """A net of one module with a trained vector, that vector in float64, and the net's output."""
    model = nn.ModuleDict({"m": module}).double().eval()
    gs.attach(model, IA3(target_modules=("m",), feedforward_modules=("m",) if scales_input else ()))
    shaken(model, "default", 0.5)
    return model, gs.capture(model).tensors["m"]["ia3_l"].double().flatten(), model["m"](x)


def drawn(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scales_input", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_equation_at_a_linear_module(bias: bool, scales_input: bool):
    module, x = nn.Linear(5, 4, bias=bias), drawn(2, 3, 5)
    model, vector, out = one(module, x, scales_input)
    scaled = torch.einsum("oi,...i->...o", module.weight, x * vector if scales_input else x)
    expected = scaled + (module.bias if bias else 0)
    expected = expected if scales_input else expected * vector
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    gs.merge(model)
    torch.testing.assert_close(model["m"](x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scales_input", [True, False])
def test_the_equation_at_a_transposed_module(scales_input: bool):
    module, x = Conv1D(4, 5), drawn(2, 3, 5)
    model, vector, out = one(module, x, scales_input)
    expected = (x * vector if scales_input else x) @ module.weight + module.bias
    expected = expected if scales_input else expected * vector
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    gs.merge(model)
    torch.testing.assert_close(model["m"](x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scales_input", [True, False])
@pytest.mark.parametrize(
    ("module", "size"),
    [
        (nn.Conv1d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 8)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 8, 8)),
        (nn.Conv2d(4, 6, 3), (4, 8, 8)),  # without a batch
        (nn.Conv3d(4, 6, 2, dilation=2, bias=False), (2, 4, 5, 5, 5)),
    ],
)
def test_the_equation_at_a_convolution(module: nn.Module, size: tuple[int, ...], scales_input: bool):
    module, x, kernel = copy.deepcopy(module), drawn(*size), len(module.kernel_size)  # pyright: ignore[reportArgumentType]
    model, vector, out = one(module, x, scales_input)
    by_channel = vector.reshape(-1, *(1 for _ in range(kernel)))
    with gs.using(model, None):
        expected = module(x * by_channel) if scales_input else module(x) * by_channel
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert gs.capture(model).tensors["m"]["ia3_l"].shape == (1, vector.numel(), *(1 for _ in range(kernel)))
    gs.merge(model)
    torch.testing.assert_close(model["m"](x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scales_input", [True, False])
def test_gradients(scales_input: bool):
    module, x = nn.Linear(5, 4).double(), drawn(3, 5).requires_grad_()
    model, vector, out = one(module, x, scales_input)
    out.square().sum().backward()
    found, again = gs.trainable_parameters(model, "default")["m.ia3_l"].grad, x.detach().requires_grad_()
    leaf = vector.detach().requires_grad_()
    weight, bias = module.weight.detach(), module.bias.detach()
    plain = (again * leaf) @ weight.T + bias if scales_input else leaf * (again @ weight.T + bias)
    plain.square().sum().backward()
    torch.testing.assert_close(found.flatten().double(), leaf.grad, rtol=1e-6, atol=1e-6)  # pyright: ignore[reportOptionalMemberAccess]
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "t5"])
def test_auto_means_what_peft_means(architecture: str):
    ours, theirs, inputs = tiny(architecture), tiny(architecture), tiny_inputs(architecture)
    gs.attach(ours, IA3())
    shaken(ours, "default")
    # PEFT's own suffix for BERT, "output.dense", also names the output of the attention, which the paper leaves alone
    only = r".*(key|value|layer\.\d+\.output\.dense)" if architecture == "bert" else None
    config = peft.IA3Config(target_modules=only, feedforward_modules=only and r".*dense")
    theirs = peft.get_peft_model(theirs, config).eval()
    own = gs.trainable_parameters(ours, "default")
    assert {f"base_model.model.{name}.default" for name in own} == {
        name for name, parameter in theirs.named_parameters() if "ia3_l" in name
    }
    for name, value in own.items():
        target = theirs.get_parameter(f"base_model.model.{name}.default")
        assert target.shape == value.shape
        target.data.copy_(value)
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "t5"])
@torch.no_grad()
def test_real_architectures(architecture: str):
    model, inputs = tiny(architecture), tiny_inputs(architecture)
    before = model(**inputs).logits
    report = gs.attach(model, IA3())
    torch.testing.assert_close(model(**inputs).logits, before, rtol=0, atol=0)
    assert report.trainable == sum(slot.numel() for slot in gs.trainable_parameters(model, "default").values())
    shaken(model, "default")
    out = model(**inputs).logits
    with gs.using(model, ["default", None]):
        rows = model(**inputs).logits
    torch.testing.assert_close(rows, torch.stack([out[0], before[1]]), rtol=1e-5, atol=1e-5)
    gs.merge(model)
    torch.testing.assert_close(model(**inputs).logits, out, rtol=1e-4, atol=1e-4)


def test_the_trainable_count():
    report = gs.attach(tiny("llama"), IA3())
    assert report.trainable == 2 * (32 + 32 + 96)  # two layers: keys and values of two heads of 16, inputs of 96


def test_stacked_on_lora_it_merges_as_it_runs():
    model, x = nn.ModuleDict({"m": nn.Linear(5, 4)}).double().eval(), drawn(3, 5)
    gs.attach(model, gs.LoRA(r=2), "low")
    gs.attach(model, IA3(target_modules=("m",)), "scale")
    shaken(model, "low", 0.5)
    shaken(model, "scale", 0.5)
    for order in (("low", "scale"), ("scale", "low")):
        with gs.using(model, *order):
            out = model["m"](x)
        gs.merge(model, *order)
        torch.testing.assert_close(model["m"](x), out, rtol=1e-6, atol=1e-6)
        gs.unmerge(model)


@pytest.mark.parametrize("pattern", [("nothing",), ("down_proj", "nothing"), r".*nothing"])
def test_a_feedforward_pattern_that_names_no_target_is_refused(pattern: tuple[str, ...] | str):
    model = tiny("llama")
    with pytest.raises(TargetError, match="nothing"):
        gs.attach(model, IA3(feedforward_modules=pattern))
    assert gs.attached(model) == ()
    with pytest.raises(SpecError, match="regular expression"):
        IA3(feedforward_modules="(")
