"""Examples to one batch: padding, weights, the few shapes."""

import numpy as np
import pytest

from mis_jax.data.collate import Example, collate, length_bucket, loss_weight, tiles_bucket

SIZE = 4


def example(name: str, length: int, answer: int, tiles: int, seed: int = 0) -> Example:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (tiles, SIZE, SIZE, 3), dtype=np.uint8)
    ids = rng.integers(1, 50, length).astype(np.int32)
    return Example(name, ids, np.arange(length) >= length - answer, pixels, (tiles,))


EXAMPLES = [example("a", 7, 4, 3, 1), example("b", 3, 0, 0, 2), example("c", 8, 1, 1, 3)]


def batch(**changes):
    settings = dict(length=8, tiles_per_sequence=4, image_size=SIZE, pad_id=99)
    return collate([[one] for one in EXAMPLES], **(settings | changes))


def test_rows_are_padded_on_the_right():
    made = batch()
    for row, one in enumerate(EXAMPLES):
        n = len(one.input_ids)
        assert made.input_ids[row].tolist() == one.input_ids.tolist() + [99] * (8 - n)
        assert made.positions[row].tolist() == [*range(n)] + [0] * (8 - n)
        assert made.segment_ids[row].tolist() == [1] * n + [0] * (8 - n)
        assert (made.loss_weights[row, :n] > 0).tolist() == one.loss_mask.tolist()
        assert not made.loss_weights[row, n:].any()
    kinds = [np.asarray(a).dtype for a in (made.input_ids, made.positions, made.segment_ids)]
    assert kinds == [np.int32] * 3
    assert made.loss_weights.dtype == np.float32
    assert (made.tiles.dtype, made.tile_mask.dtype) == (np.uint8, bool)


def test_a_row_owns_its_tile_slots():
    made = batch()
    assert made.tiles.shape == (12, SIZE, SIZE, 3)
    expected = [True] * 3 + [False] + [False] * 4 + [True] + [False] * 3
    assert made.tile_mask.tolist() == expected
    for row, one in enumerate(EXAMPLES):
        start = 4 * row
        assert np.array_equal(made.tiles[start : start + len(one.tiles)], one.tiles)
    assert not np.asarray(made.tiles)[~np.asarray(made.tile_mask)].any()


def test_no_tiles_at_all():
    made = collate([[EXAMPLES[1]]], length=4, tiles_per_sequence=0, image_size=SIZE, pad_id=0)
    assert made.tiles.shape == (0, SIZE, SIZE, 3)
    assert made.tile_mask.shape == (0,)


@pytest.mark.parametrize(
    ("reduction", "weight"), [("token", 1), ("sample", 1 / 4), ("square", 1 / 2)]
)
def test_weights_of_an_answer_of_four_tokens(reduction, weight):
    assert loss_weight(4, reduction) == weight
    assert loss_weight(0, reduction) == 0
    row = np.asarray(batch(reduction=reduction).loss_weights)[0]
    assert row[row > 0].tolist() == [weight] * 4


@pytest.mark.parametrize("changes", [dict(length=7), dict(tiles_per_sequence=2)])
def test_what_does_not_fit_is_refused_by_name(changes):
    with pytest.raises(ValueError, match=r"sample [ac]: .*do not fit .*data.max_length") as caught:
        batch(**changes)
    assert "\n" not in str(caught.value)


def test_length_buckets_are_few_and_large_enough():
    for longest in (8192, 168, 96, 7):
        buckets = {length_bucket(n, longest) for n in range(1, longest + 1)}
        assert all(n <= length_bucket(n, longest) <= longest for n in range(1, longest + 1))
        assert len(buckets) <= longest.bit_length()
    assert [length_bucket(n, 8192) for n in (1, 4096, 4097, 8192)] == [1, 4096, 8192, 8192]
    assert length_bucket(9000, 8192) == 8192  # which collate then refuses


def test_tile_buckets_are_powers_of_two():
    assert [tiles_bucket(n) for n in (0, 1, 2, 3, 4, 5, 13)] == [0, 1, 2, 4, 4, 8, 16]
