"""Adapters are loaded, replaced and forgotten while requests run: every token is what its digest says, alone."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

import gossamer as gs
from gossamer.adapter import Adapter
from gossamer.models import tiny, tiny_tokenizer
from gossamer.serving import Engine, Limits, Sampling, Sequence
from tests.adapters import trained

REQUESTS = 2000
PROMPTS = [tuple(range(1 + one, 20 + 3 * one)) for one in range(4)] + [(9,), (5, 6, 7), tuple(range(1, 60))]
HOW = (
    Sampling(max_tokens=6, ignore_eos=True),
    Sampling(max_tokens=4, temperature=1.0, seed=1, ignore_eos=True),
    Sampling(max_tokens=9, temperature=0.7, top_p=0.9, seed=2, ignore_eos=True),
)
SPECS = (gs.LoRA(r=4), gs.LoRA(r=2, target_modules=["q_proj", "v_proj"]), gs.DoRA(r=2), gs.IA3(), gs.BitFit())


@pytest.fixture(scope="module")
def base() -> tuple[Any, Any]:
    return tiny("qwen2"), tiny_tokenizer()


@pytest.fixture(scope="module")
def adapters(base: tuple[Any, Any]) -> dict[str, Adapter]:
    """Twelve, by digest, of several methods."""
    found = {}
    for number in range(12):
        adapter = trained(base[0], SPECS[number % len(SPECS)], seed=number)
        gs.detach(base[0])
        found[adapter.digest] = adapter
    return found


class Alone:
    """What a prompt gives when nobody else is there."""

    def __init__(self, base: tuple[Any, Any], adapters: Mapping[str, Adapter]) -> None:
        limits = Limits(rows=1)
        self.engine = Engine(base, {digest[:16]: one for digest, one in adapters.items()}, limits=limits, prefixes=0)
        self.known: dict[Any, tuple[int, ...]] = {}

    def __call__(self, request: Sequence, digests: Mapping[str, str]) -> tuple[int, ...]:
        mix: dict[str, float] = {}
        for name, digest in digests.items():  # two names may mean one adapter
            mix[digest[:16]] = mix.get(digest[:16], 0.0) + request.adapters[name]
        key = request.prompt, request.sampling, tuple(mix.items())
        if key not in self.known:
            sequence = self.engine.submit(Sequence(request.prompt, mix, request.sampling))
            while not sequence.done:
                self.engine.step()
            assert sequence.reply
            self.known[key] = sequence.reply.tokens
        return self.known[key]


def test_two_thousand_requests_while_adapters_come_and_go(base: tuple[Any, Any], adapters: dict[str, Adapter]) -> None:
    chance, alone = random.Random(0), Alone(base, adapters)
    values = [*adapters.values()]
    engine = Engine(base, {f"a{one}": values[one] for one in range(6)}, limits=Limits(12, 40), memory=20_000)
    sums = {f"a{one}" for one in range(6)}
    running: list[tuple[Sequence, Any, Mapping[str, str]]] = []
    asked = cancelled = replaced = 0
    while asked < REQUESTS or running:
        for _ in range(chance.randint(0, 4) if asked < REQUESTS else 0):
            names = chance.sample(sorted(engine.store.names()), k=chance.choice([0, 1, 1, 1, 2]))
            plain = all(type(engine.store.versions[name].source.spec) is gs.LoRA for name in names)  # type: ignore[union-attr]
            mix = {name: chance.choice([1.0, 0.5]) if plain else 1.0 for name in (names if plain else names[:1])}
            request = Sequence(chance.choice(PROMPTS), mix, chance.choice(HOW), tenant=chance.choice("xyz"))
            expected = {name: engine.store.versions[name].source.digest for name in mix}  # type: ignore[union-attr]
            for _ in range(chance.choice([1, 1, 1, 3])):  # several answers to one question
                running.append((request, engine.submit(replace(request)), expected))
                asked += 1
        if chance.random() < 0.3:
            name = chance.choice(sorted(sums))
            if chance.random() < 0.3 and len(engine.store.names()) > 2 and name in engine.store.names():
                engine.store.unregister(name)
            else:
                engine.store.register(name, chance.choice(values))
                replaced += 1
        if running and chance.random() < 0.05:
            engine.cancel(running[chance.randrange(len(running))][1])
            cancelled += 1
        engine.step()
        for request, sequence, expected in [one for one in running if one[1].done]:
            if sequence.fault is None:
                assert sequence.reply.digests == expected  # those that it began with
                assert sequence.reply.tokens == alone(request, expected)
            else:
                assert "cancelled" in str(sequence.fault)
        running = [one for one in running if not one[1].done]
    assert replaced > 50
    assert cancelled > 10
    assert not engine.scheduler.running
    assert all(not version.holders for version in engine.store.versions.values())
    assert all(version in engine.store.versions.values() for version in engine.store.resident)


def test_rows_of_the_base_are_the_same_to_the_bit_whoever_else_is_there(
    base: tuple[Any, Any], adapters: dict[str, Adapter]
) -> None:
    values = [*adapters.values()]
    sampling = Sampling(max_tokens=12, ignore_eos=True)

    def logprobs(names: list[str | None]) -> list[list[float]]:
        known = {f"a{one}": values[one] for one in range(5)} if any(names) else {}
        engine = Engine(base, known, prefixes=0)
        sequences = [
            engine.submit(Sequence(prompt, {name: 1.0} if name else {}, sampling))
            for prompt, name in zip(PROMPTS[:6], names, strict=True)
        ]
        while engine.busy:
            engine.step()
        return [sequence.logprobs for sequence in sequences]

    without, among = logprobs([None] * 6), logprobs(["a0", None, "a2", "a3", None, "a4"])
    assert among[1] == without[1]
    assert among[4] == without[4]
    assert all(among[one] != without[one] for one in (0, 2, 3, 5))


def test_an_adapter_of_the_same_name_never_gets_the_old_ones_prefix(
    base: tuple[Any, Any], adapters: dict[str, Adapter]
) -> None:
    values, alone = [*adapters.values()], Alone(base, adapters)
    request = Sequence(PROMPTS[-1], {"a": 1.0}, HOW[0])
    engine = Engine(base, {"a": values[0]})
    for turn in range(100):
        engine.store.register("a", values[turn % 3])
        sequences = [engine.submit(replace(request)) for _ in range(2)]
        while engine.busy:
            engine.step()
        for sequence in sequences:
            assert sequence.reply
            assert sequence.reply.digests == {"a": values[turn % 3].digest}
            assert sequence.reply.tokens == alone(request, sequence.reply.digests)
        assert sequences[1].reused == len(request.prompt) - 1
    assert engine.prefixes.hits > 90


def test_tenants_share_no_prefix(base: tuple[Any, Any]) -> None:
    engine = Engine(base)
    for tenant, reused in (("one", 0), ("other", 0), ("one", len(PROMPTS[-1]) - 1)):
        sequence = engine.submit(Sequence(PROMPTS[-1], {}, HOW[0], tenant))
        while engine.busy:
            engine.step()
        assert sequence.reused == reused


def test_a_token_more_or_less_does_not_move_the_others(base: tuple[Any, Any]) -> None:
    """The numbers of a sequence do not depend on who shares its batch, beyond rounding."""
    engine, lonely = Engine(base, prefixes=0), Engine(base, limits=Limits(rows=1), prefixes=0)
    sequences = [engine.submit(Sequence(prompt, {}, HOW[0])) for prompt in PROMPTS]
    singles = [lonely.submit(Sequence(prompt, {}, HOW[0])) for prompt in PROMPTS]
    while engine.busy or lonely.busy:
        engine.step(), lonely.step()
    for one, other in zip(sequences, singles, strict=True):
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), rtol=1e-4, atol=1e-4)
