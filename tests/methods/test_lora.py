"""LoRA by itself: how it starts, scales, drops, and computes in each dtype."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gossamer as gs
from gossamer.attachment.frozen import Frozen
from gossamer.errors import AdapterFileError
from gossamer.methods import LoRA, Shape
from gossamer.methods.slots import check_slots
from gossamer.methods.targeted import matches_end
from tests.adapters import trained

WIDE = Shape("layers.0.q_proj", "linear", "Linear", 300, 400, {"weight": torch.empty(300, 400)})


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (LoRA(r=8, alpha=16), 2.0),
        (LoRA(r=16, alpha=16.0, scaling="rslora"), 4.0),
        (LoRA(r=8, alpha=16, rank_pattern={"q_proj": 2}), 8.0),
        (LoRA(r=8, alpha=16, rank_pattern={"q_proj": 4}, scaling="rslora"), 8.0),
        (LoRA(r=8, alpha=16, alpha_pattern={r"layers\.\d+\.q_proj": 4, "q_proj": 1}), 0.5),
        (LoRA(r=8, alpha=16, alpha_pattern={"proj": 4}), 2.0),
    ],
)
def test_scaling(spec: LoRA, expected: float):
    assert spec.scaling_at("model.layers.0.q_proj") == expected


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("q_proj", "layers.0.q_proj", True),
        ("q_proj", "q_proj", True),
        ("proj", "layers.0.q_proj", False),
        ("layers.0", "layers.0.q_proj", False),
        ("^q_proj", "layers.0.q_proj", False),
        ("^layers.*", "layers.0.q_proj", True),
        (r"0\.(q|k)_proj", "layers.0.q_proj", True),
    ],
)
def test_patterns_cover_the_end_of_a_path(pattern: str, path: str, expected: bool):
    assert matches_end(pattern, path) is expected


@pytest.mark.parametrize("start", ["gaussian", "kaiming"])
def test_a_new_layer(start: str):
    base = Frozen(WIDE, nn.Linear(400, 300, bias=False))
    slots = LoRA(r=64, start=start).initial(base, torch.Generator().manual_seed(0))  # pyright: ignore[reportArgumentType]
    assert (slots["lora_A"].shape, slots["lora_B"].shape) == ((64, 400), (300, 64))
    assert slots["lora_A"].dtype == slots["lora_B"].dtype == torch.float32
    assert not slots["lora_B"].any()
    assert slots["lora_A"].std().item() == pytest.approx((3 * 400) ** -0.5, rel=0.02)
    bounded = slots["lora_A"].abs().max() <= 400**-0.5
    assert bounded == (start == "kaiming"), "uniform within +-1/sqrt(in), or normal beyond it"
    kurtosis = (slots["lora_A"] ** 4).mean() / (slots["lora_A"] ** 2).mean() ** 2
    assert kurtosis.item() == pytest.approx(3.0 if start == "gaussian" else 1.8, rel=0.05)


def test_seeds_and_paths_decide_the_start():
    def start(seed: int, **fields: object) -> gs.Adapter:
        model = nn.ModuleDict({name: nn.Linear(6, 6) for name in ("one", "two")})
        gs.attach(model, LoRA(r=2, **fields), seed=seed)  # pyright: ignore[reportArgumentType]
        return gs.capture(model)

    assert start(0) == start(0)
    assert start(0) != start(1)
    adapter = start(0)
    assert not torch.equal(adapter.tensors["one"]["lora_A"], adapter.tensors["two"]["lora_A"])
    alone = start(0, target_modules=("two",))
    assert torch.equal(alone.tensors["two"]["lora_A"], adapter.tensors["two"]["lora_A"])


def test_the_global_generator_is_left_alone():
    model, state = nn.Sequential(nn.Linear(4, 4)), torch.get_rng_state()
    gs.attach(model, LoRA())
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_acts_on_the_input_of_a_and_only_in_training():
    model = nn.Sequential(nn.Linear(1000, 1))
    trained(model, LoRA(r=1, dropout=0.25))
    x, base = torch.ones(64, 1000), model[0].forward
    with gs.using(model, None):
        frozen = model(x)
    slots = gs.capture(model).tensors["0"]
    assert base is not None
    torch.manual_seed(0)
    model.train()
    got = (model(x) - frozen).flatten()
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.25)
    expected = (dropped @ slots["lora_A"].T @ slots["lora_B"].T).flatten() * 16
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert got.std() > 0
    model.eval()
    assert (model(x) - frozen).flatten().std() < 1e-4


@given(
    r=st.integers(1, 5),
    alpha=st.floats(-8, 8, width=16),
    seed=st.integers(0, 99),
    scaling=st.sampled_from(["standard", "rslora"]),
)
def test_delta_is_the_equation(r: int, alpha: float, seed: int, scaling: str):
    generator = torch.Generator().manual_seed(seed)
    slots = {"lora_A": torch.randn(r, 7, generator=generator), "lora_B": torch.randn(5, r, generator=generator)}
    adapter = gs.Adapter(LoRA(r=r, alpha=alpha, scaling=scaling), {"fc": slots})  # pyright: ignore[reportArgumentType]
    divisor = math.sqrt(r) if scaling == "rslora" else r
    exact = alpha / divisor * torch.einsum("or,ri->oi", slots["lora_B"].double(), slots["lora_A"].double())
    got = adapter.delta("fc")
    assert got.dtype == torch.float32
    assert (got.double() - exact).norm() <= 1e-6 * max(1.0, exact.norm().item())


def test_a_low_precision_base_keeps_float32_factors():
    model = nn.Sequential(nn.Linear(8, 8)).to(torch.bfloat16)
    gs.attach(model, LoRA(r=2))
    assert {parameter.dtype for parameter in gs.trainable_parameters(model).values()} == {torch.float32}
    out = model(torch.randn(2, 8, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert {value.grad.dtype for value in gs.trainable_parameters(model).values() if value.grad is not None} == {
        torch.float32
    }


@pytest.mark.parametrize(
    "slots",
    [
        {"lora_A": (2, 400), "lora_B": (300, 3)},
        {"lora_A": (2, 300), "lora_B": (400, 2)},
        {"lora_A": (2, 400)},
        {"lora_A": (2, 400), "lora_B": (300, 2), "bias": (300,)},
        {"lora_A": (2, 400), "lora_B": (300, 2), "lora_C": (1,)},
        {},
    ],
)
def test_stored_tensors_must_fit(slots: dict[str, tuple[int, ...]]):
    with pytest.raises(AdapterFileError, match=r"layers\.0\.q_proj"):
        check_slots(WIDE.path, {name: torch.zeros(shape) for name, shape in slots.items()}, LoRA(r=2).expected(WIDE))
