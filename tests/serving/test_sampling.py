"""Each rule of drawing against its formula, written plainly; the numbers drawn against the probabilities."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer.errors import StateError, UsageError
from gossamer.serving.sampling import SampledToken, Sampler, Sampling

SIZE, DRAWS = 12, 1200
LOGITS = torch.randn(SIZE, generator=torch.Generator().manual_seed(1)) * 1.5


class Only:
    """A guide that allows some tokens."""

    def __init__(self, *allowed: int) -> None:
        self.allowed, self.done, self.followed = allowed, False, list[int]()

    def mask(self, logits: Tensor) -> None:
        for token in {*range(len(logits))} - {*self.allowed}:
            logits[token] = -torch.inf

    def advance(self, token: int) -> None:
        self.followed.append(token)


def plainly(options: dict[str, Any], logits: list[float], prompt: list[int], seen: list[int]) -> list[float]:
    """The probabilities, from the definitions and without tensors."""
    scores = [score + options.get("logit_bias", {}).get(token, 0) for token, score in enumerate(logits)]
    for token, often in Counter(seen).items():
        scores[token] -= options.get("presence_penalty", 0) + options.get("frequency_penalty", 0) * often
    penalty = options.get("repetition_penalty", 1)
    for token in {*prompt, *seen}:
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    chances = [math.exp(score / options["temperature"]) for score in scores]
    ranked = sorted(range(len(scores)), key=lambda token: -chances[token])
    kept = ranked[: options.get("top_k") or len(ranked)]
    kept = [token for token in kept if chances[token] >= options.get("min_p", 0) * chances[ranked[0]]]
    total, together, nucleus = sum(chances[token] for token in kept), 0.0, list[int]()
    for token in kept:
        if together < options.get("top_p", 1):
            nucleus.append(token)
        together += chances[token] / total
    total = sum(chances[token] for token in nucleus)
    return [chances[token] / total if token in nucleus else 0.0 for token in range(len(scores))]


RULES: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.75},
    "min_p": {"min_p": 0.2},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.7},
    "negative": {"presence_penalty": -1.0, "frequency_penalty": -0.3},
    "repetition": {"repetition_penalty": 1.6},
    "bias": {"logit_bias": {2: 3.0, 5: -100.0, 400: 5.0}},
    "all": {
        "temperature": 1.3, "top_k": 8, "top_p": 0.9, "min_p": 0.05, "presence_penalty": 0.5,
        "frequency_penalty": 0.2, "repetition_penalty": 1.2, "logit_bias": {3: 1.0},
    },
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_tokens_come_as_often_as_the_formula_says(rule: str) -> None:
    options, prompt, seen = {"temperature": 1.0} | RULES[rule], [1, 7, 7], [3, 7, 3, 9]
    sampler = Sampler(Sampling(**options, seed=5), prompt)
    for token in seen:
        sampler.seen(token)
    counts = Counter(sampler.draw(LOGITS).token for _ in range(DRAWS))
    chances = plainly(options, LOGITS.tolist(), prompt, seen)
    possible = [token for token, chance in enumerate(chances) if chance]
    assert {*counts} <= {*possible}
    expected = [DRAWS * chances[token] for token in possible]
    squared = sum((counts[token] - many) ** 2 / many for token, many in zip(possible, expected, strict=True))
    freedom = max(len(possible) - 1, 1)
    assert squared < freedom + 4 * math.sqrt(2 * freedom) + 6  # beyond the 99.9th percentile of chi squared


@pytest.mark.parametrize("rule", ["presence", "frequency", "repetition", "bias"])
def test_the_likeliest_is_taken_after_the_changes(rule: str) -> None:
    draw = random.Random(3)
    for seed in range(30):
        logits = torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))
        prompt, seen = [draw.randrange(SIZE)], [draw.randrange(SIZE) for _ in range(3)]
        sampler = Sampler(Sampling(**RULES[rule]), prompt)
        for token in seen:
            sampler.seen(token)
        chances = plainly(RULES[rule] | {"temperature": 1.0}, logits.tolist(), prompt, seen)
        assert sampler.draw(logits).token == max(range(SIZE), key=chances.__getitem__)


def test_a_large_vocabulary_is_cut_where_a_full_sort_cuts_it() -> None:
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(2)) * 0.1  # so flat that 1,024 are too few
    sampler = Sampler(Sampling(temperature=1.0, top_p=0.5, seed=0), [])
    chances = plainly({"temperature": 1.0, "top_p": 0.5}, logits.tolist(), [], [])
    drawn = {sampler.draw(logits).token for _ in range(1200)}
    assert all(chances[token] for token in drawn)
    assert len(drawn) > 600


def test_the_model_s_own_log_probabilities_are_told() -> None:
    own = LOGITS.log_softmax(0)
    options = RULES["all"] | {"top_logprobs": 5, "logit_bias": {0: 100.0}}
    before = LOGITS.clone()
    drawn = Sampler(Sampling(**options), [1]).draw(LOGITS)
    assert isinstance(drawn, SampledToken)
    assert drawn.token == 0
    assert drawn.logprob == pytest.approx(own[0].item(), abs=1e-5)
    assert [token for token, _ in drawn.top] == own.topk(5).indices.tolist()
    assert [logprob for _, logprob in drawn.top] == pytest.approx(own.topk(5).values.tolist(), abs=1e-5)
    assert torch.equal(LOGITS, before)


def test_nobody_draws_from_another_s_numbers() -> None:
    def drawn(samplers: list[Sampler]) -> list[list[int]]:
        made: list[list[int]] = [[] for _ in samplers]
        for _ in range(30):
            for sampler, tokens in zip(samplers, made, strict=True):
                tokens.append(sampler.draw(LOGITS).token)
        return made

    def sampler(seed: int | None) -> Sampler:
        return Sampler(Sampling(temperature=1.5, seed=seed), [])

    state = torch.get_rng_state()
    (alone,) = drawn([sampler(1)])
    together = drawn([sampler(1), sampler(2), sampler(1), sampler(None), sampler(None)])
    assert together[0] == together[2] == alone != together[1]
    assert together[3] != together[4]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e-3])
def test_a_temperature_near_zero_takes_the_likeliest(temperature: float) -> None:
    assert Sampler(Sampling(temperature=temperature), []).draw(LOGITS * 1000).token == LOGITS.argmax()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_the_guide_forbids_is_never_drawn(temperature: float) -> None:
    guide: Any = Only(2, 5)
    sampler = Sampler(Sampling(temperature=temperature, logit_bias={0: 100.0}), [], guide)
    assert not sampler.plain
    assert {sampler.draw(LOGITS).token for _ in range(50)} <= {2, 5}
    sampler.seen(5)
    assert guide.followed == [5]
    assert not sampler.done
    guide.done = True
    assert sampler.done


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_left_to_draw_is_said(temperature: float) -> None:
    nothing: Any = Only()
    with pytest.raises(StateError, match="no token is left"):
        Sampler(Sampling(temperature=temperature), [], nothing).draw(LOGITS)
    for value in (torch.nan, torch.inf):
        logits = LOGITS.clone()
        logits[3] = value
        with pytest.raises(StateError, match="not finite"):
            Sampler(Sampling(temperature=temperature, top_k=2), []).draw(logits)


def test_only_plain_requests_are_plain() -> None:
    assert Sampler(Sampling(stop=("x",), max_tokens=3), []).plain
    for options in [*RULES.values(), {"temperature": 1.0}, {"top_logprobs": 1}]:
        changes = {*options} - {"top_k", "top_p", "min_p"}
        assert Sampler(Sampling(**options), []).plain == (not changes)  # cuts keep the likeliest


OUTSIDE = [
    ("max_tokens", 0),
    ("max_tokens", 2**63),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_k", -1),
    ("min_p", 1.1),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -3),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", math.inf),
    ("logit_bias", {1: 101.0}),
    ("logit_bias", {-1: 0.0}),
    ("logit_bias", {1: math.nan}),
    ("logit_bias", dict.fromkeys(range(1025), 0.0)),
    ("seed", -1),
    ("seed", 2**63),
    ("stop", ("",)),
    ("stop", ("x" * 257,)),
    ("stop", ("x",) * 17),
    ("top_logprobs", 21),
    ("schema", " " * 65537),
]


@pytest.mark.parametrize(("name", "value"), OUTSIDE, ids=range(len(OUTSIDE)))
def test_a_value_out_of_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(UsageError) as caught:
        Sampling(**{name: value})
    assert caught.value.where == name
    assert caught.value.got
    assert caught.value.expected
    assert len(caught.value.got) <= 80
