"""Frozen maps on a CPU: every way gives what the module gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gossamer.kernels.frozen_maps import Prepacked, can_prepack, maps_of, prepacked_bytes, turned_round


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 2, 8, 64, 65, 300])
def test_every_way_is_the_same(rows: int, bias: bool, dtype: torch.dtype) -> None:
    module = nn.Linear(24, 40, bias=bias, dtype=dtype).requires_grad_(False)
    x = torch.randn(rows, 48, generator=torch.Generator().manual_seed(rows)).to(dtype)[
        :, ::2
    ]  # strides, as slices have
    exact = nn.functional.linear(x.double(), module.weight.double(), module.bias.double() if bias else None)
    for way in (True, False):
        (out,) = maps_of([module], way)(x).each
        assert (out.is_contiguous(), out.dtype, tuple(out.shape)) == (True, dtype, (rows, 40))
        slack = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out.double(), exact, rtol=slack, atol=slack)
        out.add_(1)  # the adapters' terms are added in place


def test_maps_of_one_input_are_one_product_where_they_are_prepacked() -> None:
    sizes, draw = ((40, True), (6, False), (24, True)), torch.Generator().manual_seed(0)
    modules = [nn.Linear(24, out, bias=bias).requires_grad_(False) for out, bias in sizes]
    x = torch.randn(5, 24, generator=draw)
    packed, plain = (maps_of(modules, way)(x) for way in (True, False))
    assert plain.whole is None
    assert packed.whole is not None
    for out, other in zip(packed.each, plain.each, strict=True):
        torch.testing.assert_close(out, other)
    packed.whole.add_(1)  # the outputs are its columns
    for out, other in zip(packed.each, plain.each, strict=True):
        torch.testing.assert_close(out, other + 1)


def test_what_is_prepacked() -> None:
    plain, odd, elsewhere = nn.Linear(8, 6), nn.Linear(8, 6).double(), nn.Linear(8, 6, device="meta")
    assert [can_prepack(one) for one in (plain, odd, elsewhere, nn.ReLU())] == [True, False, False, False]
    assert isinstance(maps_of([plain], True), Prepacked)
    assert not isinstance(maps_of([plain, odd], True), Prepacked)
    assert maps_of([odd], True)(torch.ones(3, 8).double()).each[0].dtype == torch.float64
    assert prepacked_bytes([plain, odd, nn.ReLU()]) == 8 * 6 * 4


def test_only_few_rows_of_float32_are_turned_round(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *given: seen.append(given[1].shape[1]) or real(*given))
    for rows in (1, 2, 64, 65):
        turned_round(nn.Linear(8, 6), torch.ones(rows, 8))
    turned_round(nn.Linear(8, 6).bfloat16(), torch.ones(8, 8).bfloat16())
    assert seen == [2, 64]
