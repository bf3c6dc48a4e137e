"""merge(x) = forward(x), or a typed refusal that changes nothing: which of the two, specs.py says."""

from __future__ import annotations

import pytest
from torch import nn

import gossamer as gs
from gossamer.errors import UnsupportedError
from gossamer.methods import METHODS, TargetedMethod
from tests.adapters import bits, same_bits
from tests.laws.specs import REFUSE_TO_MERGE


def merged_or_refused(net: nn.Module, method: str) -> bool:
    """Merge and say True; of a method that cannot, hold it to its refusal and say False."""
    if method not in REFUSE_TO_MERGE:
        gs.merge(net)
        return True
    before, active = bits(net), gs.active(net)
    with pytest.raises(UnsupportedError):
        gs.merge(net)
    assert same_bits(bits(net), before)
    assert gs.active(net) == active
    gs.use(net, *active)  # would be refused if the model counted as merged
    return False


def anywhere(method: str) -> TargetedMethod:
    """A spec with every default but one: not bound to the names of a transformer's parts."""
    return METHODS[method](target_modules="all-linear") if METHODS[method].roles else METHODS[method]()
