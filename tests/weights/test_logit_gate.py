"""The logit gate: equal models pass, rounded ones too, others do not."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import random_batch, random_checkpoint, tiny_config

from mis_jax.weights.convert import write_checkpoint
from mis_jax.weights.verify import Comparison, Thresholds, compare, verify, verify_checkpoints


@pytest.fixture
def checkpoints(rng, tmp_path):
    """One model in two formats, rounded to bfloat16, and with one layer changed."""
    start = random_checkpoint(tiny_config("internlm2"), rng, tmp_path / "start")
    write_checkpoint(start, tmp_path / "internvl", "internvl")
    write_checkpoint(start, tmp_path / "hf", "hf")
    write_checkpoint(start, tmp_path / "rounded", "native", dtype="bfloat16")
    changed = {name: array.copy() for name, array in start.arrays.items()}
    changed["text.layers.block.down.kernel"][1] *= 1.5
    write_checkpoint(dataclasses.replace(start, arrays=changed), tmp_path / "changed", "hf")
    return tmp_path


def test_conversions_and_rounding_pass_and_a_changed_layer_does_not(checkpoints, rng):
    batches = [random_batch(rng), random_batch(rng)]
    first = checkpoints / "internvl"
    same = verify_checkpoints(first, checkpoints / "hf", batches, Thresholds(max_difference=1e-5))
    assert same.passed and same.reasons == []
    assert same.comparison.top_k_overlap == 1.0 and same.comparison.positions == 2 * (30 + 21)

    loose = Thresholds(top_k_overlap=0.9)  # of 67 random tokens some lie within rounding
    rounded = verify_checkpoints(first, checkpoints / "rounded", batches, loose)
    assert rounded.passed, rounded
    assert 0 < rounded.comparison.kl < 1e-3 and rounded.comparison.max_difference > 1e-5
    strict = verify_checkpoints(first, checkpoints / "rounded", batches, Thresholds(0.0, 1.0, 1e-6))
    assert not strict.passed
    assert [reason.split(" is ")[0][:20] for reason in strict.reasons] == ["largest difference o"]

    other = verify_checkpoints(first, checkpoints / "changed", batches)
    assert not other.passed and len(other.reasons) == 2
    assert "top-5 overlap" in other.reasons[0] and "mean KL" in other.reasons[1]


def test_different_image_tokens_are_refused(checkpoints, rng):
    path = checkpoints / "hf" / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"image_token_id": 61}))
    with pytest.raises(ValueError, match="image token 61 is not 60, that of"):
        verify_checkpoints(checkpoints / "internvl", checkpoints / "hf", [random_batch(rng)])


def fixed(logits):
    return lambda batch: jnp.broadcast_to(
        jnp.asarray(logits), (*batch.input_ids.shape, len(logits))
    )


def test_figures_by_hand(rng):
    """Two tokens of probability 3/4 and 1/4 against two of 1/2: KL is 0.75 ln 1.5 + 0.25 ln 0.5."""
    batch = random_batch(rng)
    found = compare(fixed(np.log([0.75, 0.25]) + 7.0), fixed(np.log([0.5, 0.5]) + 7.0), [batch])
    assert found.kl == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5), rel=1e-4)
    assert found.max_difference == pytest.approx(np.log(2), rel=1e-4)
    assert (found.top_k_overlap, found.positions) == (1.0, 51)

    ranks = np.arange(10.0)
    found = compare(fixed(ranks), fixed(np.roll(ranks, 2)), [batch])
    assert found.top_k_overlap == pytest.approx(3 / 5)  # 5..9 against 7, 8, 9, 0, 1


def test_models_in_memory(rng):
    batch = random_batch(rng)
    near, far = fixed([3.0, 2.0, 1.0]), fixed([1.0, 2.0, 3.0])
    assert verify(near, near, [batch]).passed
    found = verify(near, far, [batch])
    assert not found.passed and found.comparison == compare(near, far, [batch])


def test_padding_is_not_compared(rng):
    batch = random_batch(rng)

    def noisy(b):
        padding = (b.segment_ids == 0)[..., None]
        return jnp.where(padding, jnp.nan, jnp.ones((*b.input_ids.shape, 9)))

    found = compare(noisy, lambda b: jnp.ones((*b.input_ids.shape, 9)), [batch])
    assert found == Comparison(1.0, 0.0, 0.0, 51)


def test_nan_never_passes(rng):
    found = compare(fixed([1.0, 2.0, np.nan]), fixed([1.0, 2.0, 3.0]), [random_batch(rng)])
    assert np.isnan(found.kl) and np.isnan(found.max_difference)
    assert Thresholds(0.0, 1e9, 1e9).failures(found)


def test_nothing_to_compare(rng):
    with pytest.raises(ValueError, match="no token to compare"):
        compare(fixed([1.0]), fixed([1.0]), [])
    with pytest.raises(ValueError, match="vocabularies of 2 and 3 tokens"):
        compare(fixed([1.0, 2.0]), fixed([1.0, 2.0, 3.0]), [random_batch(rng)])
