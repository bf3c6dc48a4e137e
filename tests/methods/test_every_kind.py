"""Every method at every kind of module torch has: the laws hold, or it is refused by name. Nothing crashes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gossamer as gs
from gossamer.errors import SharedWeightError, TargetError, UnsupportedError
from gossamer.methods import METHODS, TargetedMethod
from tests.adapters import bits, same_bits, shaken

Args = tuple[Tensor, ...]
Kind = tuple[Callable[[], nn.Module], Callable[[], Args]]

_DRAW = torch.Generator()


def drawn(*size: int) -> Tensor:
    return torch.randn(size, generator=_DRAW.manual_seed(0))


def row() -> Args:
    return (drawn(3, 4),)


def sound() -> Args:
    return (drawn(2, 4, 11),)


def image() -> Args:
    return (drawn(2, 4, 9, 8),)


def ids() -> Args:
    return (torch.tensor([[1, 3, 9]]),)


def steps() -> Args:
    return (drawn(2, 3, 8),)


def two() -> Args:
    return drawn(2, 3, 8), drawn(2, 5, 8)


_LAYER: dict[str, Any] = {"d_model": 8, "nhead": 2, "dim_feedforward": 16, "batch_first": True}
KINDS: dict[str, Kind] = {
    "linear": (lambda: nn.Linear(4, 6), row),
    "linear of a vector": (lambda: nn.Linear(4, 6), lambda: (drawn(4),)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), sound),
    "conv2d grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2), image),
    "conv2d by channels": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), image),
    "conv2d dilated": (lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2), image),
    "conv2d reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), image),
    "conv2d of one image": (lambda: nn.Conv2d(4, 6, 3), lambda: (drawn(4, 9, 8),)),
    "conv1d grouped circular": (lambda: nn.Conv1d(4, 8, 3, groups=2, padding=2, padding_mode="circular"), sound),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), lambda: (drawn(2, 4, 3, 3, 3),)),
    "transposed conv": (lambda: nn.ConvTranspose1d(4, 6, 3), sound),
    "embedding padded": (lambda: nn.Embedding(10, 6, padding_idx=3), ids),
    "embedding clipped": (lambda: nn.Embedding(10, 6, max_norm=1.0), ids),
    "embedding by frequency": (lambda: nn.Embedding(10, 6, scale_grad_by_freq=True), ids),
    "embedding sparse": (lambda: nn.Embedding(10, 6, sparse=True), ids),
    "bag": (lambda: nn.EmbeddingBag(10, 6), ids),
    "bilinear": (lambda: nn.Bilinear(4, 4, 3), lambda: (drawn(3, 4), drawn(3, 4))),
    "layer norm": (lambda: nn.LayerNorm(4), row),
    "rms norm": (lambda: nn.RMSNorm(4), row),
    "batch norm": (lambda: nn.BatchNorm2d(4), image),
    "group norm": (lambda: nn.GroupNorm(2, 4), image),
    "prelu": (lambda: nn.PReLU(4), row),
    "attention": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), lambda: steps() * 3),
    "lstm": (lambda: nn.LSTM(4, 4), lambda: (drawn(2, 3, 4),)),
    "gru cell": (lambda: nn.GRUCell(4, 4), row),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(**_LAYER), steps),
    "encoder": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(**_LAYER), 2), steps),
    "decoder layer": (lambda: nn.TransformerDecoderLayer(**_LAYER), two),
    "transformer": (lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True), two),
    "softmax in parts": (
        lambda: nn.AdaptiveLogSoftmaxWithLoss(4, 10, [4]),
        lambda: (drawn(3, 4), torch.tensor([0, 5, 9])),
    ),
}
FEW = {"r": 4, "bottleneck": 4, "num_virtual_tokens": 2}
SPECS = [
    *(cls(**{name: few for name, few in FEW.items() if name in cls.model_fields}) for cls in METHODS.values()),
    gs.LoRA(r=2, start="pissa"),
    gs.LoRA(r=2, start="olora"),
    gs.DoRA(r=2, start="pissa_fast"),
    gs.LoRA(r=4, bias="all", dropout=0.5),
]


def output(net: nn.Module, args: Args) -> Tensor:
    out = net(*args)
    return out if isinstance(out, Tensor) else out[0]


def keeps_the_laws(net: nn.Module, args: Args, spec: TargetedMethod) -> None:
    start = output(net, args)  # which may itself cut the rows of an embedding
    before = bits(net)
    gs.attach(net, spec)
    torch.testing.assert_close(output(net, args), start, rtol=1e-4, atol=1e-5)
    shaken(net, "default", 0.3)
    beside = output(net, args)
    beside.sum().backward()
    assert all(parameter.grad is not None for parameter in gs.trainable_parameters(net).values())
    try:
        gs.merge(net)
        torch.testing.assert_close(output(net, args), beside, rtol=1e-3, atol=1e-4)
        gs.unmerge(net)
    finally:
        gs.detach(net)
        assert same_bits(bits(net), before)


@pytest.mark.parametrize("kind", KINDS)
def test_laws_or_a_refusal(kind: str):
    build, args = KINDS[kind]
    for spec in SPECS:
        for named in (spec, spec.replace(target_modules=".*")):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                net = build().eval()
            wrapped = nn.Sequential(net) if len(args()) == 1 else net
            try:
                keeps_the_laws(wrapped, args(), named)
            except (TargetError, UnsupportedError, SharedWeightError):
                continue
            except Exception as error:
                error.add_note(f"{named.name} at {kind}: {named}")
                raise


def test_dora_names_the_convolution_it_refuses():
    net = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    with pytest.raises(UnsupportedError, match="convolution with groups"):
        gs.attach(net, gs.DoRA(r=4, target_modules=("0",)))
