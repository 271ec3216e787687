"""Rows of several samples: nothing lost, nothing over, and how full they are."""

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mis_jax.data.packing import fill, pack, tiles_per_sequence
from mis_jax.data.schedule import Capacity, Rounding, make_schedule

sys.path.append(str(Path(__file__).parents[2]))
from benchmarks.mis_sizes import mis_like


@pytest.mark.parametrize("seed", range(4))
def test_rows_of_a_mis_like_set_are_full(seed):
    """At least 95 % of the tokens and 90 % of the tiles, at the length of the paper's recipe."""
    tokens, tiles = mis_like(4427, seed)
    assert 850 < tokens.mean() < 950 and 2.2 < tiles.mean() < 2.4
    room = tiles_per_sequence(tokens, tiles, 8192)
    rows = pack(tokens, tiles, max_tokens=8192, max_tiles=room)
    assert fill(rows, tokens, 8192) >= 0.95
    assert fill(rows, tiles, room) >= 0.90


sizes = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 6)), min_size=1, max_size=60)


@settings(max_examples=200, deadline=None)
@given(sizes, st.integers(50, 120), st.integers(6, 20), st.integers(1, 10))
def test_every_sample_is_in_one_row_and_no_row_is_too_full(found, tokens_room, tiles_room, ahead):
    tokens, tiles = (np.array(column) for column in zip(*found, strict=True))
    room = {"max_tokens": tokens_room, "max_tiles": tiles_room}
    rows = pack(tokens, tiles, **room, look_ahead=ahead)
    assert sorted(place for row in rows for place in row) == list(range(len(found)))
    for row in rows:
        assert tokens[row].sum() <= tokens_room and tiles[row].sum() <= tiles_room
        assert row  # none is empty
    taken: set[int] = set()
    for row in rows:  # the oldest first, and nothing from further away than the look-ahead
        assert row[0] == min(set(range(len(found))) - taken)
        assert len(set(range(max(row))) - taken) < ahead + len(row)
        taken.update(row)


def test_text_alone_needs_no_tiles():
    tokens, tiles = np.array([30, 40, 50]), np.zeros(3, int)
    assert tiles_per_sequence(tokens, tiles, 100) == 0
    assert pack(tokens, tiles, max_tokens=100, max_tiles=0) == [[0, 2], [1]]


def test_a_row_has_tiles_for_the_largest_sample():
    assert tiles_per_sequence(np.array([100, 400]), np.array([0, 9]), 400) == 9


# Plans of whole runs

TOKENS, TILES = np.array([9, 0, 30, 12, 25, 7, 18, 40]), np.array([1, 0, 2, 0, 2, 1, 1, 3])
GOOD = np.flatnonzero(TOKENS)


def plan(**changes):
    settings = dict(seed=3, epochs=2, capacity=Capacity(50, 4))
    return make_schedule(GOOD, TOKENS, TILES, **(settings | changes))


@pytest.mark.parametrize("capacity", [None, Capacity(50, 4), Capacity(400, 40)])
def test_every_epoch_has_every_good_sample_once(capacity):
    made = plan(epochs=3, capacity=capacity)
    assert sorted(made.places.tolist()) == list(range(3 * len(GOOD)))
    epochs = made.places // len(GOOD)
    for epoch in range(3):
        assert sorted(made.samples[epochs == epoch].tolist()) == GOOD.tolist()
    assert (np.diff([epochs[row] for row in made.starts[:-1]]) >= 0).all()
    for number in range(made.sequences):
        row = made.sequence(number)
        assert len({place // len(GOOD) for place, _ in row}) == 1  # no row of two epochs
        if capacity:
            assert TOKENS[[s for _, s in row]].sum() <= capacity.tokens


def test_beyond_the_last_row_rows_are_empty():
    made = plan()
    assert made.sequence(made.sequences) == [] and made.sequence(made.sequences + 7) == []


def test_a_place_in_the_stream_names_the_same_sample_in_every_plan():
    alone, packed = plan(capacity=None), plan()
    of = dict(zip(packed.places.tolist(), packed.samples.tolist(), strict=True))
    assert [of[place] for place in range(len(of))] == alone.samples.tolist()
    assert alone.places.tolist() == list(range(len(of)))


@pytest.mark.parametrize("capacity", [None, Capacity(50, 4)])
def test_a_plan_of_rows_is_the_beginning_of_a_longer_one(capacity):
    whole = plan(epochs=9, capacity=capacity)
    for rows in (1, 8, 20):
        made = plan(epochs=None, sequences=rows, capacity=capacity)
        assert made.sequences == rows
        assert [made.sequence(i) for i in range(rows)] == [whole.sequence(i) for i in range(rows)]


def rounded(samples: int, multiple: int, batch: int, **changes):
    """Two epochs counted as the official code counts them."""
    sizes = np.arange(samples), np.full(samples, 9), np.zeros(samples, int)
    options = dict(seed=3, epochs=2, rounding=Rounding(multiple, batch))
    return make_schedule(*sizes, **(options | changes))


def test_steps_as_the_official_code_counts_them():
    """As a run of transformers 4.37.2's trainer took them, of 57 samples on two ranks of two rows
    and two accumulations: 14 steps; the eighth is the last micro-batch of the first epoch, filled
    up with the samples that the epoch began with, and the first one of the second epoch."""
    made = rounded(57, 4, 8)
    assert made.sequences == 14 * 8
    first, second = made.samples[:57], made.samples[60:]
    assert sorted(first.tolist()) == list(range(57))
    assert made.samples[56:60].tolist() == [first[56], *first[:3]]
    assert len(set(second.tolist())) == len(second) == 52
    assert len(set(made.places.tolist())) == 14 * 8
    # MIRage: 4,427 samples on 8 GPUs of 4 rows, 4 accumulations; without the option 70 steps.
    assert rounded(4427, 32, 128).sequences == 68 * 128
    assert rounded(4427, 128, 128).sequences == 70 * 128
    assert rounded(3, 8, 8).samples.tolist()[:8] == [*rounded(3, 8, 8).samples[:3]] * 2 + [
        *rounded(3, 8, 8).samples[:2]
    ]
    with pytest.raises(ValueError, match="the 3 samples of an epoch make no whole step of 8"):
        rounded(3, 4, 8)
    # A number of steps is as it is given; epochs are filled up all the same.
    assert rounded(57, 4, 8, epochs=None, sequences=80).samples.tolist() == list(made.samples[:80])


def test_packed_sequences_are_repeated_whole():
    made = plan(rounding=Rounding(3, 3))
    plain = plan(epochs=1)
    assert plain.sequences % 3 and made.sequences % 3 == 0
    of = [[s for _, s in made.sequence(n)] for n in range(-(-plain.sequences // 3) * 3)]
    whole = [[s for _, s in plain.sequence(n)] for n in range(plain.sequences)]
    assert of == (whole + whole)[: len(of)]
    assert len(set(made.places.tolist())) == len(made.places)


def test_fingerprints_tell_plans_apart():
    prints = {plan(**c).fingerprint for c in ({}, {"seed": 4}, {"epochs": 3}, {"capacity": None})}
    assert len(prints) == 4 and plan().fingerprint in prints
