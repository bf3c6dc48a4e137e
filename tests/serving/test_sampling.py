"""Every rule of sampling against its formula, and draws against their chances."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer.errors import StateError, UsageError
from gossamer.serving.request import Request, Sampling
from gossamer.serving.sampling import Sampler

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, 3.0, -2.0, 0.2])


def chances(logits: Tensor, sampling: Sampling, prompt: tuple[int, ...], drawn: list[int]) -> Tensor:
    """The formula, token by token."""
    scores = []
    for token, logit in enumerate(logits.double().tolist()):
        logit += sampling.logit_bias.get(token, 0.0)
        logit -= sampling.presence_penalty * (token in drawn) + sampling.frequency_penalty * drawn.count(token)
        if token in prompt or token in drawn:
            logit = logit / sampling.repetition_penalty if logit > 0 else logit * sampling.repetition_penalty
        scores.append(logit / sampling.temperature)
    order = sorted(range(len(scores)), key=lambda token: -scores[token])
    kept = order[: sampling.top_k or None]
    weights = torch.tensor(scores).double().exp()

    def normed(left: list[int]) -> Tensor:
        found = torch.zeros_like(weights)
        found[left] = weights[left]
        return found / found.sum()

    now = normed(kept)
    kept = [token for token in kept if now[token] >= sampling.min_p * now.max()]
    now, total, nucleus = normed(kept), 0.0, []
    for token in kept:
        if total >= sampling.top_p:
            break
        nucleus.append(token)
        total += now[token].item()
    return normed(nucleus)


RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.5},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.2},
    "all cuts": {"top_k": 6, "min_p": 0.05, "top_p": 0.9, "temperature": 1.3},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.7},
    "repetition": {"repetition_penalty": 1.8},
    "bias": {"logit_bias": {4: 4.0, 5: -100.0, 99: 1.0}},
}


@pytest.mark.parametrize("rule", RULES)
def test_draws_follow_the_formula(rule: str) -> None:
    sampling, prompt, before = Sampling(**{"temperature": 1.0, "seed": 3} | RULES[rule]), (1, 4), [0, 0, 3]
    sampler = Sampler(sampling, prompt)
    for token in before:
        sampler.seen(token)
    count = 4000
    got = Counter(sampler.draw(LOGITS).token for _ in range(count))
    expected = chances(LOGITS, sampling, prompt, before)
    assert all(expected[token] > 0 for token in got)
    there = [token for token in range(len(LOGITS)) if expected[token] > 0]
    squares = sum(
        (got[token] - count * expected[token].item()) ** 2 / (count * expected[token].item()) for token in there
    )
    assert squares < 26, f"chi squared of {len(there) - 1} degrees; 26 has a chance of 0.0005 with seven"


def test_what_is_told_is_of_the_model_itself() -> None:
    sampler = Sampler(Sampling(temperature=2.0, top_k=1, logit_bias={3: 9.0}, top_logprobs=2), ())
    drawn = sampler.draw(LOGITS)
    right = LOGITS.log_softmax(0)
    assert drawn.token == 3
    assert drawn.logprob == pytest.approx(right[3].item())
    assert [token for token, _ in drawn.top] == [5, 0]
    assert drawn.top[0][1] == pytest.approx(right[5].item())
    assert torch.equal(LOGITS, LOGITS.clone())


def test_greedy_with_penalties() -> None:
    sampler = Sampler(Sampling(frequency_penalty=2.0), ())
    assert not sampler.plain
    drawn = []
    for _ in range(4):
        drawn.append(sampler.draw(LOGITS).token)
        sampler.seen(drawn[-1])
    assert drawn == [5, 0, 1, 5]
    assert Sampler(Sampling(), ()).plain


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.01, 0.999), st.sampled_from([8, 1500, 5000]), st.floats(0.05, 5))
def test_the_nucleus_is_the_same_however_it_is_found(seed: int, top_p: float, size: int, sharpness: float) -> None:
    """The thousand likeliest are tried first; whether they suffice must not show."""
    logits = sharpness * torch.randn(size, generator=torch.Generator().manual_seed(seed))
    ordered = logits.softmax(0).sort(descending=True)
    kept = {*ordered.indices[ordered.values.cumsum(0) - ordered.values < top_p].tolist()}
    sampler = Sampler(Sampling(temperature=1.0, top_p=top_p, seed=seed), ())
    assert all(sampler.draw(logits).token in kept for _ in range(5))


def test_a_seed_gives_the_same_and_none_another() -> None:
    def some(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=2.0, seed=seed), ())
        return [sampler.draw(LOGITS).token for _ in range(40)]

    assert some(5) == some(5) != some(6)
    assert some(None) != some(None)


def test_nothing_left_to_draw() -> None:
    with pytest.raises(StateError, match="no token is left"):
        Sampler(Sampling(temperature=1.0), ()).draw(torch.full((4,), -torch.inf))


@pytest.mark.parametrize(
    ("field", "value"),
    [("min_p", 2), ("presence_penalty", 3), ("frequency_penalty", -3), ("repetition_penalty", 0),
     ("logit_bias", {1: 101}), ("logit_bias", dict.fromkeys(range(2000), 1.0)), ("seed", -1), ("seed", 2**63),
     ("stop", ("a",) * 17), ("stop", ("a" * 257,)), ("top_logprobs", 21), ("schema", " " * 70_000),
     ("temperature", float("nan")), ("top_p", float("nan"))],
)  # fmt: skip
def test_every_field_is_bounded(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=field):
        Sampling(**{field: value})


def test_weights_are_finite() -> None:
    with pytest.raises(UsageError, match="finite"):
        Request((1,), {"a": float("inf")})
