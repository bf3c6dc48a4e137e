"""Batches: every row once, little padding, the same plan every time, labels by position."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.data.batches import collate, largest_part, plan_batches, split_batch
from gossamer.data.masks import Example
from gossamer.errors import DataError

PINNED = [[0], [1, 3], [4, 2]]
LENGTHS = st.lists(st.integers(1, 200), max_size=300)


@given(LENGTHS, st.integers(1, 17), st.integers(0, 5), st.integers(0, 3), st.booleans())
def test_every_row_comes_exactly_once(lengths: list[int], size: int, seed: int, epoch: int, shuffle: bool):
    batches = plan_batches(lengths, size, seed=seed, epoch=epoch, shuffle=shuffle)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert sum(len(batch) < size for batch in batches) <= 1
    assert all(batches)


@given(LENGTHS.filter(bool), st.integers(1, 17), st.integers(1, 500))
def test_no_part_is_larger_than_the_largest(lengths: list[int], size: int, tokens: int):
    rows, longest = largest_part(lengths, size, tokens)
    assert rows * longest <= max(tokens, *lengths)
    for batch in plan_batches(lengths, size, seed=0, epoch=0):
        for part in split_batch(batch, lengths, tokens):
            assert len(part) * max(lengths[index] for index in part) <= rows * longest


def test_the_plan_depends_on_nothing_else():
    lengths = [random.Random(index).randrange(500) for index in range(1000)]
    first = plan_batches(lengths, 8, seed=1, epoch=2)
    random.seed(99)
    torch.manual_seed(99)
    drawn = random.random()
    random.seed(99)
    assert plan_batches(lengths, 8, seed=1, epoch=2) == first
    assert random.random() == drawn
    assert plan_batches(lengths, 8, seed=1, epoch=3) != first
    assert plan_batches(lengths, 8, seed=2, epoch=2) != first


def test_the_plan_is_the_same_on_every_machine():
    """Pinned, since a resumed run must find the order that it left."""
    assert plan_batches([5, 1, 4, 2, 3], 2, seed=0, epoch=0) == PINNED


def test_batches_hold_rows_of_similar_length():
    draw = random.Random(0)
    lengths = [int(draw.lognormvariate(4, 0.7)) + 1 for _ in range(3000)]

    def padded(batches: list[list[int]]) -> int:
        return sum(max(lengths[index] for index in batch) * len(batch) for batch in batches)

    planned = plan_batches(lengths, 8, seed=0, epoch=0)
    naive = [list(range(start, start + 8)) for start in range(0, 3000, 8)]
    assert padded(planned) < 1.1 * sum(lengths)
    assert padded(naive) > 1.8 * sum(lengths)


def test_without_shuffling_windows_keep_the_files_order():
    assert plan_batches([3, 1, 2] * 100, 1, seed=7, epoch=7, shuffle=False)[:2] == [[1], [4]]
    assert plan_batches([9] * 5, 2, seed=7, epoch=7, shuffle=False) == [[0, 1], [2, 3], [4]]


def test_examples_count_by_their_tokens():
    examples = [Example([1] * length, [True] * length, "f:1") for length in (5, 1, 4, 2, 3)]
    assert plan_batches(examples, 2, seed=0, epoch=0) == PINNED


def test_collate_labels_by_position_not_by_pad_id():
    """Token 9 is pad and EOS at once: as padding it is ignored, as EOS it is learned, in a prompt it is not."""
    examples = [
        Example([1, 9, 5, 9], [False, False, True, True], "f:1"),
        Example([2, 9], [False, True], "f:2"),
    ]
    batch = collate(examples, pad_id=9)
    assert batch.input_ids.tolist() == [[1, 9, 5, 9], [2, 9, 9, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.at.tolist() == [1, 2, 4]  # the token before each, in rows of four
    assert batch.targets.tolist() == [5, 9, 9]
    assert batch.counts == (2, 1)
    assert (batch.tokens, batch.supervised) == (6, 3)
    assert {batch.input_ids.dtype, batch.attention_mask.dtype, batch.targets.dtype, batch.at.dtype} == {torch.int64}


def test_the_first_token_of_a_text_is_not_counted():
    batch = collate([Example([4, 5, 6], [True, True, True], "f:1")], pad_id=0)
    assert batch.at.tolist() == [0, 1]
    assert batch.targets.tolist() == [5, 6]


def test_a_batch_moves_to_a_device():
    batch = collate([Example([4, 5], [False, True], "f:1")], pad_id=0).to("meta")
    assert batch.targets.device.type == batch.input_ids.device.type == "meta"
    assert batch.supervised == 1


@pytest.mark.parametrize("examples", [[], [Example([4, 5], [True, False], "f:1")]])
def test_a_batch_that_teaches_nothing_is_refused(examples: list[Example]):
    with pytest.raises(DataError, match="nothing in this batch"):
        collate(examples, pad_id=0)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(1, 200))
def test_parts_hold_the_batch_and_no_more_tokens_than_allowed(lengths: list[int], tokens: int):
    batch = [*range(len(lengths))]
    parts = split_batch(batch, lengths, tokens)
    assert [index for part in parts for index in part] == batch
    for part in parts:
        assert len(part) == 1 or len(part) * max(lengths[index] for index in part) <= tokens
