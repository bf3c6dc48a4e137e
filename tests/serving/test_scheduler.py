"""Scheduling without a model: nobody starves, budgets hold, tenants are equal."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.serving.sampling import Sampling
from gossamer.serving.scheduler import Limits, Scheduler
from gossamer.serving.sequence import Sequence


def one_of(tenant: str, length: int, left: int = 3, most: int | None = None) -> Sequence:
    """A sequence of so many tokens that is done after `left` more."""
    sequence = Sequence((0,) * length, tenant=tenant, sampling=Sampling(max_tokens=left))
    sequence.most = most or sequence.most
    return sequence


def left(sequence: Sequence) -> int:
    return sequence.sampling.max_tokens - len(sequence.drawn)


def turn(scheduler: Scheduler) -> Counter[str]:
    """A step; the tokens that each tenant had in it."""
    scheduler.admit()
    had: Counter[str] = Counter()
    done = []
    for row, count in scheduler.plan():
        item = scheduler.running[row]
        item.read += count
        had[item.tenant] += count
        if item.read == item.length:
            item.ids.append(0)
            if not left(item):
                done.append(row)
    for row in sorted(done, reverse=True):
        scheduler.leave(row)
    return had


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 40), st.integers(1, 5)), min_size=1, max_size=30),
    st.integers(1, 5),
    st.integers(1, 20),
)
def test_all_are_served_and_no_step_is_too_large(drawn: list, rows: int, tokens: int) -> None:
    scheduler: Scheduler = Scheduler(Limits(rows, tokens))
    items = [one_of(*one) for one in drawn]
    assert all(scheduler.offer(one) for one in items)
    for _ in range(2000):
        had = turn(scheduler)
        assert sum(had.values()) <= max(tokens, rows + 1)
        assert len(scheduler.running) <= rows
        if not scheduler.running and not scheduler.waiting:
            break
    assert all(left(one) == 0 for one in items)


def test_a_tenant_with_many_requests_does_not_push_out_one_with_few() -> None:
    scheduler: Scheduler = Scheduler(Limits(rows=2, tokens=64))
    for _ in range(50):
        scheduler.offer(one_of("many", 10))
    for _ in range(4):
        turn(scheduler)
    late = one_of("few", 10)
    scheduler.offer(late)
    steps = 0
    while left(late):
        turn(scheduler)
        steps += 1
    assert steps < 12


def test_a_long_prompt_does_not_stop_the_others() -> None:
    scheduler: Scheduler = Scheduler(Limits(rows=4, tokens=8))
    short = one_of("a", 1, left=20)
    scheduler.offer(short)
    turn(scheduler)
    scheduler.offer(one_of("b", 100))
    for step in range(10):
        before = left(short)
        turn(scheduler)
        assert left(short) == before - 1, step


def test_withdrawn_and_turned_away() -> None:
    scheduler: Scheduler = Scheduler(Limits(waiting=2))
    items = [one_of("a", 1) for _ in range(3)]
    assert [scheduler.offer(one) for one in items] == [True, True, False]
    assert scheduler.withdraw(items[0])
    assert not scheduler.withdraw(items[0])
    assert scheduler.admit() == [items[1]]
    assert scheduler.leave(0) is None


def test_one_that_is_not_ready_is_passed_by_for_a_while() -> None:
    scheduler: Scheduler = Scheduler(Limits(rows=2))
    slow = one_of("a", 1)
    scheduler.offer(slow)
    for _ in range(20):
        scheduler.offer(one_of("a", 1, left=1))
    served = 0
    for _ in range(40):
        served += len(scheduler.admit(lambda one: one is not slow))
        for row in reversed(range(len(scheduler.running))):
            scheduler.leave(row)
    assert 1 < served < 6  # then all wait for it
    assert slow in scheduler.admit()


def test_the_cache_bounds_the_rows() -> None:
    scheduler: Scheduler = Scheduler(Limits(rows=8, cache=50))
    items = [one_of("a", 1, most=most) for most in (10, 20, 10, 60)]
    for one in items:
        scheduler.offer(one)
    assert scheduler.admit() == items[:2]
    scheduler.leave(1)
    assert scheduler.admit() == [items[2]]
    for row in (1, 0):
        scheduler.leave(row)
    assert scheduler.admit() == [items[3]]  # alone, whatever it takes
