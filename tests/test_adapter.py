"""The Adapter value: its views, its digest, its arithmetic."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import gossamer as gs
from gossamer.errors import GossamerError, StateError, UnsupportedError

Pair = tuple[int, int, int]
"""in, out, rank of one module."""


def adapter(modules: dict[str, Pair], seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any) -> gs.Adapter:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tensors = {
        path: {"lora_B": drawn(out, rank), "lora_A": drawn(rank, into)} for path, (into, out, rank) in modules.items()
    }
    patterns = {f"^{path}": rank for path, (*_, rank) in modules.items() if rank != 2}
    return gs.Adapter(gs.LoRA(r=2, alpha=3.0, rank_pattern=patterns, **fields), tensors)


def exact(value: gs.Adapter, path: str) -> Tensor:
    """delta in float64, independent of the library's own."""
    slots, spec = value.tensors[path], value.spec
    assert isinstance(spec, gs.LoRA)
    return spec.scaling_at(path) * torch.einsum("or,ri->oi", slots["lora_B"].double(), slots["lora_A"].double())


A = adapter({"fc1": (4, 5, 2), "fc2": (5, 3, 4)}, seed=1)
B = adapter({"fc2": (5, 3, 2), "fc3": (2, 2, 1)}, seed=2, scaling="rslora")


def test_views():
    assert A.paths == ("fc1", "fc2")
    assert [*A.named_tensors()] == ["fc1.lora_A", "fc1.lora_B", "fc2.lora_A", "fc2.lora_B"]
    assert A.num_parameters == 2 * 9 + 4 * 8
    assert A.nbytes == 4 * A.num_parameters
    assert adapter({"fc": (4, 5, 2)}, dtype=torch.bfloat16).nbytes == 2 * 18
    assert "2 modules, 50 parameters" in repr(A)
    assert A.digest[:12] in repr(A)


def test_it_is_a_value():
    with pytest.raises(FrozenInstanceError):
        A.base = None  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        A.tensors["fc1"] = {}  # pyright: ignore[reportIndexIssue]
    with pytest.raises(TypeError):
        A.tensors["fc1"]["lora_A"] = torch.zeros(1)  # pyright: ignore[reportIndexIssue]
    twin = gs.Adapter(A.spec, {path: dict([*A.tensors[path].items()][::-1]) for path in A.paths[::-1]})
    assert twin == A
    assert hash(twin) == hash(A)
    assert A != "A"


def changed(path: str = "fc1", slot: str = "lora_A", **change: Any) -> gs.Adapter:
    tensors = {name: dict(slots) for name, slots in A.tensors.items()}
    value = tensors[path][slot].clone()
    if "bit" in change:
        value.view(-1).view(torch.int32)[0] ^= 1
    if "dtype" in change:
        value = value.to(change["dtype"])
    if "shape" in change:
        value = value.reshape(change["shape"])
    tensors[path][slot] = value
    return replace(A, tensors=tensors)


@pytest.mark.parametrize(
    "other",
    [
        changed(bit=True),
        changed(dtype=torch.float64),
        changed(shape=(4, 2)),
        replace(A, spec=gs.LoRA(r=2, alpha=3.5, rank_pattern={"^fc2": 4})),
        replace(A, tensors={"fc1": A.tensors["fc1"]}),
        replace(A, tensors={"fc1": A.tensors["fc1"], "fc3": A.tensors["fc2"]}),
    ],
    ids=["bit", "dtype", "shape", "spec", "dropped", "renamed"],
)
def test_the_digest_sees_everything_that_acts(other: gs.Adapter):
    assert other.digest != A.digest
    assert other != A


def test_the_digest_sees_nothing_else():
    assert replace(A, base={"architecture": "x"}, provenance={"by": "me"}, foreign={"r": 2}).digest == A.digest


@pytest.mark.parametrize("weight", [2.0, -0.25, 0, 3, 1e-3])
def test_scaling(weight: float):
    scaled = weight * A
    for path in A.paths:
        expected = weight * exact(A, path)
        assert (scaled.delta(path).double() - expected).norm() <= 1e-6 * exact(A, path).norm()
        assert torch.equal(scaled.delta(path), (A * weight).delta(path))


def test_one_and_minus():
    assert 1 * A is A
    assert 1.0 * A == A
    minus = -A
    assert -minus == A
    assert torch.equal(minus.delta("fc1"), -A.delta("fc1"))


def test_sums_differences_and_their_ranks():
    total, difference = A + B, A - B
    assert total.paths == ("fc1", "fc2", "fc3")
    for path in total.paths:
        parts = [exact(value, path) if path in value.paths else None for value in (A, B)]
        for value, sign in ((total, 1), (difference, -1)):
            expected = sum(part * factor for part, factor in zip(parts, (1, sign), strict=True) if part is not None)
            assert isinstance(expected, Tensor)
            assert (value.delta(path).double() - expected).norm() <= 1e-6 * max(
                p.norm() for p in parts if p is not None
            )
    assert total.tensors["fc2"]["lora_A"].shape[0] == 6
    nothing = A - A
    assert all(nothing.delta(path).norm() <= 1e-6 * exact(A, path).norm() for path in A.paths)
    assert total.provenance == {"operation": "sum", "of": [A.digest, B.digest]}


def test_sums_are_exact_in_low_precision_too():
    low = [adapter({"fc": (6, 6, 2)}, seed=seed, dtype=torch.bfloat16) for seed in (1, 2)]
    expected = exact(low[0], "fc") + exact(low[1], "fc")
    assert ((low[0] + low[1]).delta("fc").double() - expected).norm() <= 1e-6 * expected.norm()
    assert ((0.3 * low[0]).delta("fc").double() - 0.3 * exact(low[0], "fc")).norm() <= 1e-6 * expected.norm()


def test_long_sums_stay_exact():
    parts = [adapter({"fc": (9, 9, 2), "other": (3, 3, 1)}, seed=seed) for seed in range(8)]
    total = sum(parts[1:], parts[0])
    expected = torch.stack([exact(part, "fc") for part in parts]).sum(0)
    assert (total.delta("fc").double() - expected).norm() <= 1e-6 * sum(exact(part, "fc").norm() for part in parts)


def test_what_has_no_sum():
    whole = replace(A, tensors=dict(A.tensors) | {"norm": {"weight": torch.ones(3)}})
    for operation in (lambda: whole + A, lambda: A + whole, lambda: 2 * whole, lambda: A - whole):
        with pytest.raises(UnsupportedError, match=r"norm\.weight"):
            operation()
    with pytest.raises(UnsupportedError, match="needs the base"):
        whole.delta("norm")
    with pytest.raises(StateError, match="different bases"):
        replace(A, base={"weights": "a"}) + replace(B, base={"weights": "b"})
    with pytest.raises(TypeError):
        A + 1  # pyright: ignore[reportOperatorIssue]
    with pytest.raises(TypeError):
        A * "2"  # pyright: ignore[reportOperatorIssue]


def test_modules_of_other_shapes_have_no_sum():
    with pytest.raises(GossamerError, match="fc1"):
        A + adapter({"fc1": (6, 5, 2)})


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_that_is_not_a_number(weight: float):
    with pytest.raises(GossamerError):
        weight * A


def test_an_unknown_path_is_named_with_the_nearest():
    with pytest.raises(StateError, match="did you mean 'fc1'"):
        A.delta("fc11")


def test_bases_are_carried_along():
    based = replace(A, base={"weights": "a"})
    assert (based + B).base == (B + based).base == (2 * based).base == {"weights": "a"}
