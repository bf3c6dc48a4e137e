"""How fast are many uneven requests answered: static batches, transformers' continuous batching, or Gossamer's engine?

Prompts of 16 to 256 tokens ask for 8 to 128 more, all at once; 16 are answered at a time. A static batch, as
`model.generate` takes it, is padded on the left and runs until its longest answer is there; the other two let the next
request in as soon as a row is free. Transformers' manager is made anew in every round,
because its thread would use the processor while the others are timed; that costs it about half a second of each.
Before the clock starts, all three give the same tokens, greedily and in float32.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

import gossamer as gs
from bench.common import Row, interleaved, report
from gossamer.serving import Engine, Limits, Sampling, Sequence

BASE = "smollm2-135m"
REQUESTS, ROWS, TOKENS = 24, 16, 512
"""TOKENS: at most so many in a step of those that count them."""
ROUNDS = 2
PAGE = 32


class Asked(NamedTuple):
    """A prompt, and how many tokens to add to it."""

    prompt: list[int]
    more: int


def measure() -> list[Row]:
    """On the real model."""
    gs.fetch(BASE)
    return compared(*gs.load_base(BASE, dtype=torch.float32), workload(REQUESTS))


def workload(count: int, longest: int = 256, most: int = 128) -> list[Asked]:
    """Uneven requests, the same every time; tokens that every vocabulary holds."""
    draw = random.Random(0)
    sizes = [(draw.randint(16, longest), draw.randint(8, most)) for _ in range(count)]
    return [Asked([draw.randrange(2, 250) for _ in range(length)], more) for length, more in sizes]


def compared(model: Any, tokenizer: Any, asked: list[Asked], rounds: int = ROUNDS) -> list[Row]:
    """The three on one workload."""
    with Engine((model, tokenizer), limits=Limits(ROWS, TOKENS), prefixes=0) as engine:
        contenders = {
            "transformers, static batches": lambda: static(model, asked),
            "transformers, continuous": lambda: continuous(model, asked),
            "Gossamer": lambda: ours(engine, asked),
        }
        answers = {name: call() for name, call in contenders.items()}
        (first, *others) = answers
        for name in others:
            wrong = [number for number, pair in enumerate(zip(answers[first], answers[name], strict=True))
                     if pair[0] != pair[1]]  # fmt: skip
            assert not wrong, f"{name} answers requests {wrong} otherwise than {first}"
        times = interleaved(contenders, rounds=rounds, warmup=0)
    total = sum(one.more for one in asked)
    plain = times["transformers, static batches"].median
    return [
        {
            "requests": len(asked),
            "at a time": ROWS,
            "contender": name,
            **time.row("s"),
            "new tokens/s": round(total / time.median),
            "times static": round(plain / time.median, 2),
        }
        for name, time in times.items()
    ]


@torch.inference_mode()
def static(model: Any, asked: list[Asked]) -> list[list[int]]:
    """ROWS at a time in the order that they came, until the longest answer is there."""
    found: list[list[int]] = []
    for start in range(0, len(asked), ROWS):
        batch = asked[start : start + ROWS]
        longest = max(len(one.prompt) for one in batch)
        ids = torch.tensor([[0] * (longest - len(one.prompt)) + one.prompt for one in batch])
        there = torch.tensor([[0] * (longest - len(one.prompt)) + [1] * len(one.prompt) for one in batch])
        most = max(one.more for one in batch)
        out = model.generate(
            ids.to(model.device),
            attention_mask=there.to(model.device),
            generation_config=_greedy(most),
        )
        found += [row[longest : longest + one.more].tolist() for row, one in zip(out, batch, strict=True)]
    return found


def continuous(model: Any, asked: list[Asked]) -> list[list[int]]:
    """Through transformers' own manager."""
    pages = ROWS * -(-max(len(one.prompt) + one.more for one in asked) // PAGE) + ROWS
    config = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=pages,
        max_batch_tokens=TOKENS,
        max_requests_per_batch=ROWS,
        use_async_batching=False,
    )
    most = max(one.more for one in asked)
    found: dict[str, list[int]] = {}
    with model.continuous_batching_context_manager(
        generation_config=_greedy(most), continuous_batching_config=config, warmup=False
    ) as manager:
        names = [manager.add_request(one.prompt, max_new_tokens=one.more) for one in asked]
        while len(found) < len(names):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                assert result.error is None, result.error
                found[result.request_id] = [*result.generated_tokens]
            assert result is not None or manager.is_running(), "transformers' manager stopped"
    return [found[name] for name in names]


def ours(engine: Engine, asked: list[Asked]) -> list[list[int]]:
    """Through the engine."""
    sequences = [
        engine.submit(Sequence(tuple(one.prompt), {}, Sampling(max_tokens=one.more, ignore_eos=True))) for one in asked
    ]
    while engine.busy:
        engine.step()
    return [[*sequence.drawn] for sequence in sequences]


def _greedy(most: int) -> GenerationConfig:
    """Nothing ends an answer but its length."""
    return GenerationConfig(max_new_tokens=most, do_sample=False, eos_token_id=-1, pad_token_id=0)


if __name__ == "__main__":
    report("continuous", "How fast are many uneven requests answered?", measure)
