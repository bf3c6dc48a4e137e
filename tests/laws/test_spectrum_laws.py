"""A spectrum that is drawn is that of the change: of the merged weight minus the base's, or nothing is drawn."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gossamer as gs
from gossamer.methods.spectra import spectra
from tests.adapters import shaken
from tests.laws.nets import cases
from tests.laws.specs import REFUSE_TO_MERGE, SPECS
from tests.laws.test_laws import every_method, law


@every_method
@settings(parent=law, max_examples=8)
@given(data=st.data(), moved=st.booleans())
def test_a_spectrum_is_that_of_the_change(method: str, data: st.DataObject, moved: bool):
    case = data.draw(cases(method).filter(lambda one: one.dtype != torch.bfloat16))
    net = case.net()
    before = {name: value.double().clone() for name, value in net.state_dict().items()}
    gs.attach(net, data.draw(SPECS[method]))
    if moved:
        shaken(net, "default")
    drawn = spectra(gs.capture(net, "default"))
    if method in REFUSE_TO_MERGE:
        assert not drawn
        return
    gs.merge(net)
    after = {name: value.double() for name, value in net.state_dict().items()}
    for path, values in drawn.items():
        change = after[f"{path}.weight"] - before[f"{path}.weight"]
        expected = torch.linalg.svdvals(change)
        size = before[f"{path}.weight"].norm() + expected.sum()
        shortest = min(len(values), len(expected))
        assert torch.allclose(values.double()[:shortest], expected[:shortest], rtol=1e-4, atol=float(1e-5 * size))
        assert not values[shortest:].any()
        if not moved:
            assert not values.any(), "nothing was changed yet"
