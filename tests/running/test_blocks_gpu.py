"""The fast path on a real GPU: packed rows through fused layers equal padded rows through transformers' own."""

from __future__ import annotations

import pytest
import torch

import gossamer as gs
from gossamer.data.batches import collate
from gossamer.data.masks import Example
from gossamer.models import tiny
from gossamer.running.fast import fast_path
from gossamer.training.loss import supervised_nll

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("dtype", "slack"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma", "gpt2"])
def test_the_fast_path_equals_the_plain_one(family: str, dtype: torch.dtype, slack: float) -> None:
    model = tiny(family, dtype=dtype).to("cuda").train()  # pyright: ignore[reportArgumentType]
    gs.attach(model, gs.LoRA(r=4), seed=0)
    parameters = [*gs.trainable_parameters(model, "default").values()]
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    head, rows = [*range(20, 40)], []
    for count in (7, 14, 28):
        rows.append(Example([*head, *range(60, 60 + count)], [False] * 22 + [True] * (count - 2), ""))
    found = []
    for fast in (False, True):
        with fast_path(model, packing=fast, fused=fast) as path:
            nll = supervised_nll(model, collate(rows, 0, "cuda", **path.options()))
            found.append(torch.cat([one.flatten() for one in torch.autograd.grad(nll.mean(), parameters)]))
    plain, quick = found
    assert plain.norm() > 0
    assert (quick - plain).norm() <= slack * plain.norm()
