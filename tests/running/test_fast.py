"""The fast way is the plain way: for every method, packed and fused, in a batch, a step and a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import gossamer as gs
from gossamer.attachment import using_spans
from gossamer.data import batches
from gossamer.data.batches import collate, joined, plan_batches
from gossamer.data.masks import Example
from gossamer.errors import StateError
from gossamer.methods import METHODS
from gossamer.models import tiny
from gossamer.running.fast import drops_out, fast_path
from gossamer.training.loss import supervised_nll

SPECS: dict[str, Any] = {
    "lora": gs.LoRA(r=3),
    "dora": gs.DoRA(r=2),
    "vera": gs.VeRA(r=4),
    "ia3": gs.IA3(),
    "bitfit": gs.BitFit(),
    "norm": gs.NormTuning(),
    "houlsby": gs.Houlsby(bottleneck=4),
    "lin": gs.Lin(bottleneck=4),
    "prefix": gs.PrefixTuning(num_virtual_tokens=3),
    "prompt": gs.PromptTuning(num_virtual_tokens=3),
    "full": gs.FullTuning(),
}


def examples(lengths: list[int], prefix: int = 0, seed: int = 0) -> list[Example]:
    draw = torch.Generator().manual_seed(seed)
    before = torch.randint(0, 250, (prefix,), generator=draw).tolist()
    rows = []
    for number, length in enumerate(lengths):
        ids = before + torch.randint(0, 250, (length,), generator=draw).tolist()
        learned = (torch.rand(len(ids), generator=draw) < 0.5).tolist()
        rows.append(Example(ids, [*learned[:-1], True], f"rows:{number}"))
    return rows


def adapted(family: str, spec: Any) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    model: Any = tiny(family)
    gs.attach(model, spec)
    torch.manual_seed(1)
    parameters = gs.trainable_parameters(model, "default")
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.train(), parameters


def outcome(model: Any, parameters: dict[str, Any], rows: list[Example], **options: bool) -> list[Tensor]:
    nll = supervised_nll(model, collate(rows, 0, **options))
    return [nll, *torch.autograd.grad(nll.sum() / len(nll), [*parameters.values()])]


def close(got: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert (one - other).norm() <= 2e-5 * other.norm() + 1e-7


def test_every_method_is_here() -> None:
    assert SPECS.keys() == METHODS.keys()


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(lengths=st.lists(st.integers(2, 14), min_size=1, max_size=5), prefix=st.sampled_from([0, 5, 20]))
def test_packed_and_fused_equal_padded_and_plain(method: str, lengths: list[int], prefix: int) -> None:
    model, parameters = adapted("qwen2", SPECS[method])
    rows = examples(lengths, prefix)
    plain = outcome(model, parameters, rows)
    with fast_path(model) as fast:
        assert fast.packed == (method not in ("prefix", "prompt"))
        assert fast.fused == 2
        close(outcome(model, parameters, rows, **fast.options()), plain)
    close(outcome(model, parameters, rows), plain)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma", "gpt2", "gpt_neox", "opt", "phi", "mixtral"])
def test_every_family_that_packs(family: str) -> None:
    model, parameters = adapted(family, gs.LoRA(r=3))
    rows = examples([5, 11, 8], 18)
    plain = outcome(model, parameters, rows)
    with fast_path(model) as fast:
        assert fast.packed
        close(outcome(model, parameters, rows, **fast.options()), plain)


def test_a_family_that_does_not_pack_pads_and_says_so() -> None:
    model, parameters = adapted("falcon", gs.LoRA(r=3))
    rows = examples([5, 11, 8])
    plain = outcome(model, parameters, rows)
    with fast_path(model) as fast:
        assert not fast.packed
        assert "packing: off, packing is not proven for FalconForCausalLM; 0 layers" in fast.rule
        close(outcome(model, parameters, rows, **fast.options()), plain)


def test_packing_can_be_switched_off_and_so_can_fusing() -> None:
    model, parameters = adapted("llama", gs.LoRA(r=3))
    rows = examples([5, 11])
    plain = outcome(model, parameters, rows)
    with fast_path(model, packing=False, fused=False) as fast:
        assert (fast.packed, fast.fused) == (False, 0)
        got = outcome(model, parameters, rows, **fast.options())
    assert all(torch.equal(one, other) for one, other in zip(got, plain, strict=True))


def test_what_rows_share_is_computed_once_unless_something_is_dropped_out() -> None:
    rows = examples([4, 6, 5], 20)
    once = collate(rows, 0, packed=True)
    assert once.input_ids.shape == (1, 20 + 15)
    assert collate(rows, 0, packed=True, shared=False).input_ids.shape == (1, 75)
    assert once.tokens == 75
    model, _ = adapted("llama", gs.LoRA(r=3, dropout=0.1))
    assert drops_out(model, ["default"])
    assert not drops_out(model, ["another"])
    with fast_path(model) as fast:
        assert fast.packed
        assert not fast.shared


def test_a_short_common_beginning_is_not_worth_it() -> None:
    rows = examples([4, 6], batches.SHARED - 1)
    assert collate(rows, 0, packed=True).input_ids.shape == (1, sum(map(len, rows)))


def test_a_row_that_another_one_continues() -> None:
    model, parameters = adapted("llama", gs.LoRA(r=3))
    (whole,) = examples([30])
    part = Example(whole.ids[:20], [False] * 19 + [True], "part")
    rows = [whole, part]
    plain = outcome(model, parameters, rows)
    with fast_path(model) as fast:
        assert collate(rows, 0, **fast.options()).input_ids.shape == (1, 19 + 11 + 1)
        close(outcome(model, parameters, rows, **fast.options()), plain)


def test_no_row_sees_another_one() -> None:
    """Whatever stands in the other rows of a batch, the loss of a row is the same to the bit."""
    model, _ = adapted("llama", gs.LoRA(r=3))
    first, *others = examples([9, 9, 9])
    with fast_path(model) as fast, torch.no_grad():
        losses = [supervised_nll(model, collate([other, first], 0, **fast.options())) for other in others]
    count = sum(first.supervised[1:])
    assert torch.equal(losses[0][-count:], losses[1][-count:])


def test_batches_filled_by_tokens() -> None:
    lengths = [5, 90, 10, 20, 30, 40, 7, 3, 60, 100, 200]
    planned = plan_batches(lengths, 2, seed=0, epoch=0, tokens=100)
    assert sorted(index for batch in planned for index in batch) == [*range(len(lengths))]
    assert all(sum(lengths[index] for index in batch) <= 100 or len(batch) == 1 for batch in planned)
    assert max(map(len, planned)) > 2
    assert planned == plan_batches(lengths, 7, seed=0, epoch=0, tokens=100)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_row_that_several_adapters_share_equals_each_alone(family: str, fused: bool) -> None:
    """Blocks and the plain way; each adapter's rows share their own beginning, and no gradient strays."""
    model: Any = tiny(family)
    specs = {"one": gs.LoRA(r=3), "two": gs.LoRA(r=5, target_modules=r".*(q_proj|c_attn)"), "three": gs.IA3()}
    rows = {"one": examples([5, 9], 18, 1), "two": examples([4, 11, 6], 20, 2), "three": examples([7], 0, 3)}
    for number, (name, spec) in enumerate(specs.items()):
        gs.attach(model, spec, name=name, seed=number)
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in gs.trainable_parameters(model, name).values():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.train()
    alone = {}
    for name in specs:
        with gs.using(model, name):
            alone[name] = outcome(model, gs.trainable_parameters(model, name), rows[name])
    with fast_path(model, fused=fused) as fast:
        parts = {name: collate(rows[name], 0, **fast.options()) for name in specs}
        batch, spans, start = joined([*parts.values()]), [], 0
        for name, part in parts.items():
            spans.append(((name,), start, start := start + part.input_ids.shape[1]))
        with using_spans(model, spans):
            nll = supervised_nll(model, batch)
            each = nll.split([part.supervised for part in parts.values()])
            total = torch.stack([one.mean() for one in each]).sum()
            total.backward()
    for (name, expected), one in zip(alone.items(), each, strict=True):
        got = [parameter.grad for parameter in gs.trainable_parameters(model, name).values()]
        close([one.detach(), *got], [expected[0].detach(), *expected[1:]])


def test_spans_leave_no_gap_and_name_what_is_there() -> None:
    model, _ = adapted("llama", gs.LoRA(r=3))
    for spans in (
        [],
        [(["default"], 1, 4)],
        [(["default"], 0, 4), ([], 5, 6)],
        [(["default"], 0, 0)],
        [(["nobody"], 0, 4)],
    ):
        with pytest.raises(StateError), using_spans(model, spans):
            pass
