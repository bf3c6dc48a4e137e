"""The optimiser's parts: schedule, automatic learning rate."""

from __future__ import annotations

import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gossamer.errors import UnsupportedError, UsageError
from gossamer.methods import METHODS
from gossamer.training.optim import (
    EIGHT_BIT,
    auto_lr,
    lr_factor,
    make_optimizer,
    set_lr,
    usable_optimizer,
    warmup_steps,
)


@pytest.mark.parametrize(
    ("family", "hidden", "expected"), [("llama", 4096, 2.9e-4), ("qwen3", 4096, 4.7e-4), ("gpt2", 2000, 5e-4)]
)
def test_the_published_values(family: str, hidden: int, expected: float) -> None:
    lr, line = auto_lr(SimpleNamespace(model_type=family, hidden_size=hidden))
    assert lr == pytest.approx(expected, rel=0.02)
    assert str(hidden) in line
    assert f"{lr:.3g}" in line


@pytest.mark.parametrize("name", METHODS)
def test_every_method_states_its_rate(name: str) -> None:
    """A registered method without a rate of its own fails here."""
    method = METHODS[name]
    assert "lr_over_lora" in vars(method), "states its own, whatever it inherits"
    assert method.lr_over_lora > 0
    lr, line = auto_lr(SimpleNamespace(model_type="llama", hidden_size=2000), method)
    assert lr == pytest.approx(5e-4 * method.lr_over_lora)
    assert (name in line) == (method.lr_over_lora != 1)


def test_lora_s_rate_is_what_it_was_and_full_fine_tuning_s_far_below() -> None:
    assert METHODS["lora"].lr_over_lora == METHODS["dora"].lr_over_lora == 1.0
    assert METHODS["full"].lr_over_lora <= 0.1


def test_the_sizes_of_a_model_that_also_sees() -> None:
    text = SimpleNamespace(model_type="llama", hidden_size=2000)
    config = SimpleNamespace(get_text_config=lambda decoder: text, model_type="seeing")
    assert auto_lr(config)[0] == pytest.approx(5e-4)


def test_no_hidden_size() -> None:
    with pytest.raises(UsageError, match="set lr to a number"):
        auto_lr(SimpleNamespace(model_type="llama"))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_rises_to_one_and_never_wastes_a_step(schedule: str) -> None:
    factors = [lr_factor(step, 100, 10, schedule) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert factors[10] == 1.0
    assert min(factors) > 0
    assert all(earlier >= later for earlier, later in pairwise(factors[10:]))
    assert factors[-1] == 1.0 if schedule == "constant" else factors[-1] < 0.02


def test_linear_without_warm_up_is_the_usual_one() -> None:
    assert [lr_factor(step, 4, 0, "linear") for step in range(4)] == [1.0, 0.75, 0.5, 0.25]


def test_a_share_or_a_number_of_steps() -> None:
    assert [warmup_steps(value, 200) for value in (0.0, 0.03, 1.0, 12.0)] == [0, 6, 1, 12]


def test_lora_plus_gives_the_outer_factor_a_rate_of_its_own() -> None:
    """AdamW's first step moves a parameter by its learning rate, whatever the gradient's size."""
    parameters = {name: nn.Parameter(torch.zeros(2, 2)) for name in ("a.lora_A", "a.lora_B", "norm.weight")}
    optimizer = make_optimizer(parameters, 0.0, ("lora_B",), 16.0)
    for parameter in parameters.values():
        parameter.grad = torch.ones(2, 2)
    set_lr(optimizer, 1e-3)
    optimizer.step()
    moved = {name: -parameter[0, 0].item() for name, parameter in parameters.items()}
    assert moved == pytest.approx({"a.lora_A": 1e-3, "a.lora_B": 16e-3, "norm.weight": 1e-3}, rel=1e-4)


def test_a_ratio_without_factors_is_an_error() -> None:
    with pytest.raises(UsageError, match="lr_ratio"):
        make_optimizer({"a.bias": nn.Parameter(torch.zeros(2))}, 0.0, ("lora_B",), 16.0)


@pytest.mark.parametrize("kind", EIGHT_BIT)
def test_eight_bits_are_for_cuda_and_elsewhere_it_is_said(kind: str) -> None:
    used, said = usable_optimizer(kind, torch.device("cpu"))
    assert used == "adamw"
    assert kind in said
    assert "CUDA" in said
    assert usable_optimizer(kind, torch.device("cuda:1")) == (kind, "")
    assert usable_optimizer("adamw", torch.device("cpu")) == ("adamw", "")


def with_bitsandbytes(monkeypatch: pytest.MonkeyPatch, library: object) -> None:
    monkeypatch.setitem(sys.modules, "gossamer.quant", SimpleNamespace(bitsandbytes=lambda: library))


def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    with_bitsandbytes(monkeypatch, None)
    with pytest.raises(UnsupportedError, match=r"pip install 'gossamer\[quant\]'"):
        make_optimizer({"a.bias": nn.Parameter(torch.zeros(2))}, 0.0, kind="adamw8bit")


@pytest.mark.parametrize(("kind", "name"), EIGHT_BIT.items())
def test_bitsandbytes_gets_the_groups(monkeypatch: pytest.MonkeyPatch, kind: str, name: str) -> None:
    with_bitsandbytes(monkeypatch, SimpleNamespace(optim=SimpleNamespace(**{name: torch.optim.AdamW})))
    parameters = {name: nn.Parameter(torch.zeros(2, 2)) for name in ("a.lora_A", "a.lora_B")}
    optimizer = make_optimizer(parameters, 0.1, ("lora_B",), 16.0, kind)
    set_lr(optimizer, 1e-3)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(1e-3, 0.1), (16e-3, 0.1)]
