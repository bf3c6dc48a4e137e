"""What a layer says that it changes of a linear map, for rows of a batch, is what it does when it runs alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gossamer.attachment.frozen import Frozen
from gossamer.attachment.layers import stored_layers
from gossamer.kernels.routed import Routed, reference
from gossamer.kernels.routing import Routing, Stack
from gossamer.methods import METHODS
from gossamer.methods.base import LINEAR_KINDS
from tests.adapters import trained
from tests.laws.nets import TOLERANCE, cases
from tests.laws.specs import SPECS

SHARED = {"lora", "dora", "vera", "ia3", "bitfit", "full"}
"""Methods that a row of a batch can have its own of, at linear maps."""


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_change_of_rows_is_what_the_layer_does(method: str, data: st.DataObject) -> None:
    case = data.draw(cases(method))
    net, fresh = case.net(), case.net()
    _, layers = stored_layers(fresh, trained(net, data.draw(SPECS[method])))
    modules = dict(fresh.named_modules())
    linear = [(shape, layer) for shape, layer in layers.values() if shape.kind in LINEAR_KINDS]
    assert not any(layer.linear_change(Frozen(shape, modules[shape.path])) for shape, layer in layers.values()
                   if shape.kind not in LINEAR_KINDS)  # fmt: skip
    for shape, layer in linear:
        base = Frozen(shape, modules[shape.path])
        change = layer.linear_change(base)
        assert (change is not None) == (method in SHARED or shape.path.endswith("norm") or _whole(layer))
        if change is None:
            continue
        x = torch.randn(3, shape.in_features, generator=torch.Generator().manual_seed(case.seed)).to(case.dtype)
        with torch.no_grad():
            right = layer(base, x)
            stacks = {0: Stack.of([change], [shape.out_features], x)}
            routing = Routing((((0, 1.0),),), (3,))
            plain = reference(
                x.double(), [_wide(base)], {0: Stack.of([change], [shape.out_features], x.double())}, routing
            )
            routed = Routed(stacks, routing)
            out = base(routed.before(x))
            routed.after(x, [out])
        tolerance = max(TOLERANCE[case.dtype], 1e-5)
        torch.testing.assert_close(right.double(), plain[0], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(out, right, rtol=tolerance, atol=tolerance)


def _whole(layer: object) -> bool:
    return type(layer).__name__ == "Replacement"


def _wide(base: Frozen) -> tuple[torch.Tensor, torch.Tensor | None]:
    weight, bias = base.affine()
    return weight.double(), None if bias is None else bias.double()
