"""The decoder without weights: it says what it foretells, and an engine on it says the same whoever is beside."""

from __future__ import annotations

import random

import pytest
import torch

from gossamer.running.steps import Chunk, Decoder, StepInput
from gossamer.serving import Engine, Limits, Sampling, Sequence
from gossamer.testing import FakeDecoder, tiny, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def test_a_step_foretells_the_next_token_of_each_row() -> None:
    decoder: Decoder = FakeDecoder(50)
    cache = decoder.cache()
    step = StepInput(torch.tensor([3, 1, 4, 1, 5]), (Chunk(0, 0, 3), Chunk(1, 0, 2)), (0, 1))
    first = decoder(step, cache).argmax(1).tolist()
    assert first == [FakeDecoder(50).next_token([3, 1, 4]), FakeDecoder(50).next_token([1, 5])]
    second = decoder(StepInput(torch.tensor(first), (Chunk(0, 3, 1), Chunk(1, 2, 1)), (0, 1)), cache)
    assert tuple(zip(first, second.argmax(1).tolist(), strict=True)) == (
        FakeDecoder(50).answer([3, 1, 4], 2),
        FakeDecoder(50).answer([1, 5], 2),
    )


@pytest.mark.parametrize("seed", range(3))
def test_an_engine_puts_every_token_where_it_belongs(seed: int) -> None:
    """Many requests of a few beginnings through few rows: rows move, beginnings are copied, kept and given back."""
    fake, draw = FakeDecoder(len(TOKENIZER)), random.Random(seed)
    engine = Engine((tiny("llama"), TOKENIZER), limits=Limits(rows=3, tokens=24, cache=3 * 200))
    engine.decoder, engine.cache = fake, fake.cache()
    begins = [[draw.randrange(256) for _ in range(draw.randint(1, 90))] for _ in range(4)]
    prompts = [(*draw.choice(begins), draw.randrange(256)) for _ in range(25)]
    requests = [(one, draw.randint(1, 12)) for one in prompts]
    sequences = [
        engine.submit(Sequence(one, {}, Sampling(max_tokens=count, ignore_eos=True))) for one, count in requests
    ]
    while engine.busy:
        engine.step()
    for (prompt, count), sequence in zip(requests, sequences, strict=True):
        assert sequence.reply
        assert sequence.reply.tokens == fake.answer(prompt, count)
    engine.close()
    assert max(len(step.chunks) for step in fake.steps) == 3
