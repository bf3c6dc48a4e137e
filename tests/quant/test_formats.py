"""The reference is bitsandbytes, bit for bit: codes, scales, and the numbers that they stand for."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

import gossamer as gs
from gossamer.quant import FORMATS, backend, bitsandbytes, packed_bytes, reference
from gossamer.quant.formats import dynamic_table, table

CPU = torch.device("cpu")
SHAPES = [(64, 64), (48, 96), (130, 50), (7, 9), (33, 64), (256, 576), (1, 3), (192, 320), (5, 64), (64, 1)]
FOUR_BITS = [name for name, form in FORMATS.items() if form.table != "int8"]


def weight(number: int) -> Tensor:
    """One of 20 weights: whole and broken blocks, every dtype, every size, some with zeros and outliers."""
    generator = torch.Generator().manual_seed(number)
    drawn = torch.randn(SHAPES[number % len(SHAPES)], generator=generator) * [0.02, 1.0, 3e4][number % 3]
    if number % 4 == 0:
        drawn[0] = 0
    if number % 5 == 0:
        drawn.view(-1)[::37] *= 50
    return drawn.clamp(-6e4, 6e4).to([torch.float32, torch.bfloat16, torch.float16][number // 7])


def same_as_bitsandbytes(original: Tensor, quant: str) -> None:
    form, functional = FORMATS[quant], bitsandbytes().functional
    codes, state = functional.quantize_4bit(
        original, blocksize=64, quant_type=form.table, compress_statistics=form.double
    )
    packed = reference.quantize(original, form)
    assert torch.equal(packed.codes, codes)
    assert torch.equal(packed.absmax, state.absmax)
    if form.double:
        assert torch.equal(packed.nested_absmax, state.state2.absmax)
        assert torch.equal(packed.offset, state.offset)
    state.shape = torch.Size((1, original.numel()))  # its AVX512 kernel is wrong where a block spans two rows
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        state.dtype = dtype
        with torch.compiler.set_stance("force_eager"):  # of odd counts it would compile its plain way for each shape
            expected = functional.dequantize_4bit(codes, state).view(original.shape)
        same_numbers(reference.dequantize(packed, dtype), expected)
        same_numbers(backend.dequantize(packed, dtype), expected)


def same_numbers(mine: Tensor, theirs: Tensor) -> None:
    """Bit for bit; in bfloat16 but for subnormal ones, which a CPU that rounds to it by itself makes zero."""
    assert mine.dtype == theirs.dtype
    smallest = torch.finfo(mine.dtype).tiny if mine.dtype == torch.bfloat16 else 0.0
    differ = mine != theirs
    assert not differ.any() or mine[differ].abs().max() <= smallest
    assert not differ.any() or theirs[differ].abs().max() <= smallest


@pytest.mark.parametrize("quant", FOUR_BITS)
@pytest.mark.parametrize("number", range(20))
def test_four_bits_are_bitsandbytes(number: int, quant: str):
    same_as_bitsandbytes(weight(number), quant)


@pytest.mark.parametrize("quant", FOUR_BITS)
@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-38, 1e-30, 1e30])
@pytest.mark.parametrize("shape", [(64, 64), (33, 65), (130, 50), (1, 129)])
def test_tiny_and_huge_weights_are_bitsandbytes(shape: tuple[int, int], scale: float, quant: str):
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale
    for dtype in (torch.float32, torch.bfloat16):
        same_as_bitsandbytes(drawn.to(dtype), quant)


@pytest.mark.slow
@pytest.mark.parametrize("quant", FOUR_BITS)
def test_four_bits_of_a_real_model_are_bitsandbytes(quant: str):
    gs.fetch("smollm2-135m")
    model, _ = gs.load_base("smollm2-135m", dtype="float32")
    weights = [module.weight.detach() for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(weights) > 200
    for number, original in enumerate(weights[:: len(weights) // 20][:20]):
        same_as_bitsandbytes(original.bfloat16() if number % 2 else original, quant)


@pytest.mark.parametrize("number", range(20))
def test_int8_is_bitsandbytes(number: int):
    original = weight(number)
    original[0] = 1  # bitsandbytes divides by a row's maximum, whatever it is
    codes, scales, _ = bitsandbytes().functional.int8_vectorwise_quant(original.clone())
    packed = reference.quantize(original, FORMATS["int8"])
    assert torch.equal(packed.codes, codes)
    assert torch.equal(packed.absmax, scales)


def test_the_tables_are_bitsandbytes():
    functional = bitsandbytes().functional
    for name in ("nf4", "fp4"):
        assert torch.equal(table(name, CPU), functional.get_4bit_type(name, device=CPU))
    assert torch.equal(dynamic_table(CPU), functional.create_dynamic_map())


def test_nf4_is_made_of_quantiles_of_the_normal_distribution():
    """Appendix E of the paper: eight quantiles above zero, seven below, zero itself, over the largest."""
    from statistics import NormalDist

    quantile, edge = NormalDist().inv_cdf, 0.9677083
    upper = [quantile(edge + (0.5 - edge) * step / 8) for step in range(8)]
    lower = [-quantile(edge + (0.5 - edge) * step / 7) for step in range(7)]
    expected = torch.tensor(sorted([*upper, 0.0, *lower])) / max(upper)
    torch.testing.assert_close(table("nf4", CPU), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("quant", "error"), [("nf4-single", 0.0920), ("nf4", 0.0920), ("fp4", 0.1219), ("int8", 0.0079)]
)
def test_the_error_of_normal_weights(quant: str, error: float):
    original = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    packed = reference.quantize(original, FORMATS[quant])
    lost = (reference.dequantize(packed, torch.float32) - original).norm() / original.norm()
    assert lost.item() == pytest.approx(error, rel=0.005)


def test_quantising_the_scales_again_costs_almost_nothing():
    original = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    single, double = (
        (reference.dequantize(reference.quantize(original, FORMATS[quant]), torch.float32) - original).norm()
        for quant in ("nf4-single", "nf4")
    )
    assert 1 < double / single < 1.001


def test_bits_of_a_parameter():
    bits = {quant: 8 * packed_bytes(form, 4096, 4096) / 4096**2 for quant, form in FORMATS.items()}
    assert bits["nf4-single"] == bits["fp4-single"] == 4.5
    assert bits["nf4"] == bits["fp4"] == pytest.approx(4.127, abs=5e-4)
    assert bits["int8"] == pytest.approx(8.008, abs=1e-3)


@pytest.mark.parametrize("quant", FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), *SHAPES, (129, 130)])
def test_what_a_weight_takes_is_known_before(shape: tuple[int, int], quant: str):
    form = FORMATS[quant]
    assert reference.quantize(torch.randn(shape), form).nbytes == packed_bytes(form, *shape)


@pytest.mark.parametrize("quant", FORMATS)
def test_without_bitsandbytes_nothing_changes(quant: str, monkeypatch: pytest.MonkeyPatch):
    original = weight(5)
    packed = backend.quantize(original, FORMATS[quant])
    found = backend.dequantize(packed, torch.bfloat16)
    monkeypatch.setattr(backend, "bitsandbytes", lambda: None)
    assert torch.equal(backend.dequantize(backend.quantize(original, FORMATS[quant]), torch.bfloat16), found)


@pytest.mark.parametrize("before", ["absent", "imported", "blocked"])
def test_bitsandbytes_is_kept_from_downloading_kernels(before: str, monkeypatch: pytest.MonkeyPatch):
    """transformers imports `kernels` wherever it is installed, long before bitsandbytes is asked for."""
    seen: list[Any] = []
    package = {"imported": types.ModuleType("kernels"), "blocked": None}.get(before, "absent")
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    if before != "absent":
        monkeypatch.setitem(sys.modules, "kernels", package)

    def importing(name: str) -> types.ModuleType:
        seen.append((name, sys.modules.get("kernels", "absent")))  # None there makes `import kernels` fail
        return types.ModuleType(name)

    monkeypatch.setattr(backend.importlib, "import_module", importing)
    backend.bitsandbytes.__wrapped__()
    assert seen == [("bitsandbytes", None)]
    assert sys.modules.get("kernels", "absent") is package
