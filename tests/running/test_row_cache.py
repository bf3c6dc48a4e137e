"""The cache of rows: room follows what is in use, and what is in use stays what it was."""

from __future__ import annotations

import pytest
import torch

from gossamer.running.row_cache import RowCache

SAMPLES = [(torch.zeros(2, 3), torch.zeros(2, 5)), (), (torch.zeros(1, 4),)]


def filled(axis: int, rows: int, tokens: int, room: tuple[int, int] = (0, 0)) -> RowCache:
    """With another number in every place."""
    cache = RowCache(SAMPLES, axis, room)
    cache.fit(rows, tokens)
    for layer in cache.layers:
        for one in layer:
            one.copy_(torch.arange(one.numel()).reshape(one.shape))
    return cache


def first(cache: RowCache, row: int, tokens: int) -> list[torch.Tensor]:
    return [one[row].narrow(cache.axis - 1, 0, tokens).clone() for layer in cache.layers for one in layer]


@pytest.mark.parametrize("axis", [1, 2])
def test_one_long_sequence_takes_the_room_of_many_short_ones(axis: int) -> None:
    cache = filled(axis, 32, 100)
    assert cache.rows == 32
    assert cache.tokens == 128
    before = first(cache, 1, 100)
    cache.fit(2, 4000)
    assert cache.rows == 8
    assert 4000 <= cache.tokens <= 4096
    assert all(torch.equal(one, other) for one, other in zip(first(cache, 1, 100), before, strict=True))
    assert not any(one.any() for one in first(cache, 2, 0))
    cache.fit(32, 100)
    assert cache.rows * cache.tokens == 32 * 128
    assert all(torch.equal(one, other) for one, other in zip(first(cache, 1, 100), before, strict=True))


@pytest.mark.parametrize("axis", [1, 2])
def test_reserving_keeps_all_that_there_is(axis: int) -> None:
    cache = filled(axis, 8, 128)
    before = [first(cache, row, 128) for row in range(8)]
    cache.reserve(1, 300)
    cache.reserve(20, 1)
    assert (cache.rows, cache.tokens) == (24, 384)
    for row, known in enumerate(before):
        assert all(torch.equal(one, other) for one, other in zip(first(cache, row, 128), known, strict=True))


@pytest.mark.parametrize("axis", [1, 2])
def test_a_row_is_copied_kept_and_given(axis: int) -> None:
    cache, other = filled(axis, 4, 64), RowCache(SAMPLES, axis)
    known = first(cache, 3, 50)
    cache.copy(3, 0, 50)
    kept = cache.keep(3, 60)
    other.give(2, kept, 50)
    for got in (first(cache, 0, 50), first(other, 2, 50)):
        assert all(torch.equal(one, right) for one, right in zip(got, known, strict=True))
    assert kept.nbytes == 60 * (6 + 10 + 4) * 4


def test_room_for_good_stays_where_it_is() -> None:
    cache = RowCache(SAMPLES, 2, room=(4, 256))
    places = [one.data_ptr() for layer in cache.layers for one in layer]
    cache.fit(4, 256)
    cache.trim()
    assert [one.data_ptr() for layer in cache.layers for one in layer] == places
    assert cache.laid == 0
    assert all(len(one) == 5 for layer in cache.layers for one in layer), "a row more, that is nobody's"
    cache.fit(1, 1000)
    assert cache.rows == 8
    assert cache.laid == 1
    cache.fit(4, 200)
    assert cache.laid == 1, "there is room"
    cache.trim()
    assert (cache.rows, cache.tokens, cache.laid) == (4, 256, 2)
