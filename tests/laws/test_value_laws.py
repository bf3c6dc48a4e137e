"""Adapters form a vector space: sums, multiples and truncations against float64 matrices, over random adapters."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gossamer as gs

PATHS = ("m.0.q", "m.0.k", "m.1.q", "head")
WIDTHS = {"m.0.q": (7, 5), "m.0.k": (3, 8), "m.1.q": (7, 5), "head": (11, 4)}
law = settings(deadline=None, max_examples=40, derandomize=True)


@st.composite
def adapters(draw: st.DrawFn) -> gs.Adapter:
    """Random targets, ranks, patterns, alphas, scalings and dtypes."""
    paths = draw(st.lists(st.sampled_from(PATHS), min_size=1, max_size=4, unique=True))
    ranks = draw(st.sampled_from([{}, {r"m\.0.*": 4}, {"^m.1(.q)*": 1, ".*k": 3}]))
    spec = gs.LoRA(
        r=draw(st.integers(1, 6)),
        alpha=draw(st.floats(0.25, 64, width=16)),
        rank_pattern=ranks,
        alpha_pattern=draw(st.sampled_from([{}, {"q": 7.0}, {"head": 0.5, r"m.*": 3.0}])),
        scaling=draw(st.sampled_from(["standard", "rslora"])),
        target_modules=tuple(paths),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float64]))
    tensors = {
        path: {
            "lora_A": torch.randn(spec.rank_at(path), WIDTHS[path][1], generator=generator).to(dtype),
            "lora_B": torch.randn(WIDTHS[path][0], spec.rank_at(path), generator=generator).to(dtype),
        }
        for path in paths
    }
    return gs.Adapter(spec, tensors)


def exact(value: gs.Adapter, path: str) -> Tensor:
    """The change in float64, by the definition; zero where there is none."""
    if path not in value.paths:
        return torch.zeros(WIDTHS[path], dtype=torch.float64)
    spec, slots = value.spec, value.tensors[path]
    assert isinstance(spec, gs.LoRA)
    return spec.scaling_at(path) * slots["lora_B"].double() @ slots["lora_A"].double()


def agree(value: gs.Adapter, wanted: dict[str, Tensor], parts: list[gs.Adapter], tolerance: float = 1e-6) -> None:
    """By the library's own delta, within a share of the largest part, so that what vanishes is judged too."""
    for path in PATHS:
        size = max(exact(part, path).norm() for part in parts)
        found = value.delta(path).double() if path in value.paths else torch.zeros(WIDTHS[path], dtype=torch.float64)
        assert (found - wanted[path]).norm() <= tolerance * size


@law
@given(a=adapters(), b=adapters(), c=adapters(), weight=st.floats(-4, 4))
def test_a_vector_space(a: gs.Adapter, b: gs.Adapter, c: gs.Adapter, weight: float):
    def each(function):
        return {path: function(*(exact(one, path) for one in (a, b, c))) for path in PATHS}

    agree(a + b, each(lambda a, b, c: a + b), [a, b])
    agree(b + a, each(lambda a, b, c: a + b), [a, b])
    agree(a - a, each(lambda a, b, c: 0 * a), [a])
    agree(-a, each(lambda a, b, c: -a), [a])
    agree(a - b + c, each(lambda a, b, c: a - b + c), [a, b, c])
    agree(sum([a, b, c]), each(lambda a, b, c: a + b + c), [a, b, c])  # pyright: ignore[reportArgumentType]
    scaled = weight * a
    agree(scaled, each(lambda a, b, c: weight * a), [scaled, a])
    assert gs.combine([a], [1]) == a
    agree(gs.combine([a, b], [weight, 0.5]), each(lambda a, b, c: weight * a + 0.5 * b), [a, b, scaled])


@law
@given(a=adapters(), b=adapters(), r=st.integers(1, 9))
def test_the_best_of_a_rank(a: gs.Adapter, b: gs.Adapter, r: int):
    total = a + b
    value = total.resize(r)
    for path in total.paths:
        whole = exact(a, path) + exact(b, path)
        values = torch.linalg.svdvals(whole)
        best, found = values[r:].norm(), (value.delta(path).double() - whole).norm()
        assert abs(found - best) <= 1e-4 * best + 2e-6 * (exact(a, path).norm() + exact(b, path).norm())


@law
@given(a=adapters(), energy=st.floats(0.1, 1))
def test_its_file_says_the_same(tmp_path_factory, a: gs.Adapter, energy: float):
    """Patterns of ranks and alphas survive the trip through PEFT's layout."""
    value = (a + a).resize(energy=energy)
    read = gs.Adapter.load(value.save(tmp_path_factory.mktemp("law") / "adapter"))
    assert read == value
    assert read.provenance == value.provenance
