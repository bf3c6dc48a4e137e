"""PEFT beside Gossamer on every case of the matrix: each reads the other's file, and both compute the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gossamer as gs
from gossamer.errors import GossamerError, SharedWeightError, UnsupportedError
from gossamer.methods import METHODS
from tests.adapters import shaken
from tests.conformance.matrix import ARCHITECTURES, CASES, CONFIGS, REFUSED, SLICE, Case
from tests.conformance.oracle import (
    NOISE,
    Toys,
    aged,
    attached_by_peft,
    config_of,
    loaded_by_peft,
    our_spec,
    said,
    same_tensors,
    tensors_of,
)

SHARED = {"base_model.vera_A", "base_model.vera_B"}
CLOSE = {"float32": 1e-5, "bfloat16": 2**-5}
"""Distances at which outputs are the same. In bfloat16, sixteen roundings in a row, of 2^-9 each, cost as much."""
MERGED = {"float32": 1e-4, "bfloat16": 2**-5}
CHANGED = {"float32": 1e-3, "bfloat16": 2**-4}
"""Distances from the base that an adapter has at least."""


def distance(one: Tensor, other: Tensor, case: Case) -> float:
    """The largest difference, of max(1, largest output); in bfloat16, where single outputs scatter, of the norms."""
    if case.dtype == "float32":
        return ((one - other).abs().max() / max(1.0, other.abs().max().item())).item()
    return ((one - other).norm() / other.norm()).item()


def twin(case: Case, toy: Toys) -> nn.Module:
    """A fresh toy, bit-equal to every other one of the case."""
    return toy(case.architecture).to(getattr(torch, case.dtype))


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=() if case in SLICE else pytest.mark.slow) for case in CASES]
)
def test_a_case(case: Case, toy: Toys, tmp_path: Path):
    theirs, ours, fresh = tmp_path / "theirs", tmp_path / "ours", tmp_path / "fresh"
    model = twin(case, toy)
    base = said(model, case)

    # PEFT's file here: the same outputs
    wrapped = attached_by_peft(twin(case, toy), case)
    wrapped.save_pretrained(str(theirs), save_embedding_layers=False)
    if case.config == "old file":
        aged(theirs)
    expected = said(wrapped, case)
    adapter = gs.Adapter.load(theirs)
    gs.attach(model, adapter)
    attached = said(model, case)

    assert distance(attached, expected, case) <= CLOSE[case.dtype]
    assert distance(expected, base, case) >= CHANGED[case.dtype], "the adapter must do something"

    # back to a file: nothing is lost
    gs.capture(model).save(ours)
    if case.config == "drawn":
        assert tensors_of(ours).keys() >= SHARED, "a model holds the projections, so what it gives does too"
        adapter.save(ours)
    assert same_tensors(theirs, ours)
    assert config_of(theirs) == config_of(ours)

    # our file in PEFT: the same outputs
    other = twin(case, toy)
    gs.attach(other, our_spec(case), seed=5)
    shaken(other, "default", NOISE.get(case.method, 0.3), seed=5)
    made = gs.capture(other)
    if case.config == "drawn":
        made = replace(made, tensors={path: slots for path, slots in made.tensors.items() if path})
    made.save(fresh)
    if case.config == "old file":
        aged(fresh)
    own = said(other, case)
    again = said(loaded_by_peft(twin(case, toy), fresh), case)
    assert distance(own, again, case) <= CLOSE[case.dtype]
    assert distance(own, base, case) >= CHANGED[case.dtype]

    # merged: what PEFT computes unmerged, or a refusal that changes nothing
    if case.merges:
        gs.merge(model)
        assert distance(said(model, case), expected, case) <= MERGED[case.dtype]
    else:
        with pytest.raises(SharedWeightError if case.config == "embedding" else UnsupportedError):
            gs.merge(model)
        assert torch.equal(said(model, case), attached)


@pytest.mark.parametrize(("name", "method"), REFUSED)
def test_what_is_no_case_is_refused(name: str, method: str, toy: Toys):
    with pytest.raises(GossamerError, match=REFUSED[name, method]):
        gs.attach(toy(name), METHODS[method]())


@pytest.mark.parametrize("cases", [CASES, SLICE], ids=["all", "slice"])
def test_everything_occurs(cases: list[Case]):
    assert {case.architecture for case in cases} == {*ARCHITECTURES}
    assert {case.dtype for case in cases} == {"float32", "bfloat16"}
    every = {(method, config) for method, configs in CONFIGS.items() for config in configs}
    assert {(case.method, case.config) for case in cases} == every


def test_the_table_is_long():
    assert len(CASES) == len({*CASES}) >= 500
