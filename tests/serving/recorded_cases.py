"""Checks of recorded steps, on any device: everybody gets what he gets unrecorded, and no switch records anything."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import gossamer as gs
from gossamer.adapter import Adapter
from gossamer.models import tiny, tiny_tokenizer
from gossamer.running.cached import CachedDecoder
from gossamer.running.graphs import StepGraphs
from gossamer.serving import Engine, Limits, Sampling, Sequence
from tests.adapters import trained

SPECS = (gs.LoRA(r=4), gs.LoRA(r=2, target_modules=["q_proj", "v_proj"]), gs.LoRA(r=3), gs.LoRA(r=4), gs.DoRA(r=2))
WAVES: tuple[tuple[Mapping[str, float], ...], ...] = (
    ({"a0": 1.0}, {"a1": 1.0}, {}, {"a2": 0.5}),
    ({"a3": 1.0}, {"a1": 1.0}, {"a0": 1.0}, {"a2": 0.5}),  # others, in other rows
    ({}, {}, {}, {}),
    ({"a3": 1.0, "a0": -1.0}, {"a2": 1.0}, {}, {"a1": 1.0}),  # a mix, whose rank is larger
    ({"a4": 1.0}, {"a1": 1.0}, {}, {"a2": 1.0}),  # DoRA, whose steps are not recorded
    ({"a0": 1.0}, {"a1": 1.0}, {}, {"a2": 1.0}),
)


def engine(device: str, family: str, made: Mapping[str, Adapter], record: Any) -> Engine:
    """With steps that `record` records, or none."""
    made_of = (tiny(family).to(device), tiny_tokenizer())  # pyright: ignore[reportArgumentType]
    found = Engine(made_of, made, limits=Limits(rows=6, tokens=64, cache=6 * 384))
    decoder = found.decoder
    assert isinstance(decoder, CachedDecoder)
    rotary, like = decoder.inner.rotary_emb, decoder.like
    decoder.graphs = (
        None if record is None else StepGraphs(decoder.run, rotary, like, *([record] if callable(record) else []))
    )
    return found


def served(one: Engine, wave: tuple[Mapping[str, float], ...]) -> list[tuple[int, ...]]:
    """Answers of uneven length, so that rows come free, move, and are taken again."""

    def asked(number: int, mix: Mapping[str, float], more: int) -> Any:
        prompt = tuple(range(5 * number + 1, 7 * number + 9))
        return one.submit(Sequence(prompt, dict(mix), Sampling(max_tokens=more, ignore_eos=True)))

    sequences = [asked(number, mix, 4 + 3 * number) for number, mix in enumerate(wave)]
    for _ in range(6):
        one.step()
    sequences += [asked(number + 4, mix, 5) for number, mix in enumerate(wave)]
    while one.busy:
        one.step()
    assert all(sequence.reply for sequence in sequences), [sequence.fault for sequence in sequences]
    return [sequence.reply.tokens for sequence in sequences]


def check(record: Callable[[Callable[[], Tensor]], Callable[[], Tensor]] | bool, device: str = "cpu") -> None:
    """Waves of requests through an engine that records steps and one that does not."""
    for family in ("llama", "mistral"):
        model = tiny(family)
        made = {}
        for number, spec in enumerate(SPECS):
            made[f"a{number}"] = trained(model, spec, seed=number)
            gs.detach(model)
        recorded, plain = engine(device, family, made, record), engine(device, family, made, None)
        graphs: Any = recorded.decoder.graphs  # pyright: ignore[reportAttributeAccessIssue]
        counts = []
        for wave in WAVES:
            assert served(recorded, wave) == served(plain, wave), family
            counts.append(len(graphs.made))
        assert 0 < counts[0] == counts[1], "another adapter in a row records nothing"
        assert len({key[2] for key in graphs.made}) <= 2, "what is used no more is let go"
        longer = Sequence(tuple(range(1, 200)), {"a0": 1.0}, Sampling(max_tokens=80, ignore_eos=True))
        answers = []
        for one in (recorded, plain):
            sequences = [one.submit(replace(longer)) for _ in range(2)]
            while one.busy:
                one.step()
            answers.append([sequence.reply and sequence.reply.tokens for sequence in sequences])
        assert answers[0] == answers[1]
        assert max(key[1] for key in graphs.made) == 384, "longer sequences look further"
        for one in (recorded, plain):
            one.close()


def again(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """In place of a recording: run it again."""
    run()
    return run


class PlainKernels:
    """In place of `triton_routed`, where there is no GPU: the equations over whole tensors."""

    @staticmethod
    def shrink(x: Tensor, inner: Tensor, slots: Tensor) -> Tensor:
        """`A[slot_n] x_n`, (N, 1, R)."""
        down = torch.einsum("nri,ni->nr", inner[slots.clamp(min=0)], x.to(inner))
        return torch.where(slots[:, None] >= 0, down, 0.0).unsqueeze(1)

    @staticmethod
    def expand_(out: Tensor, down: Tensor, outer: Tensor, slots: Tensor, start: int) -> None:
        """`out_n += B[slot_n] down_n`."""
        part = down[:, 0, start : start + outer.shape[1]]
        out.add_(torch.einsum("nro,nr->no", outer[slots.clamp(min=0)], part))


def unread(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A recording that is planted to be wrong: it gives what it gave at first."""
    first = run().clone()
    return itertools.repeat(first).__next__
