"""The logit gate: equal models pass, rounded ones too, others do not."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import KINDS, random_batch, random_checkpoint, tiny_config

from mis_jax.checkpoint.convert import write_checkpoint
from mis_jax.checkpoint.layerwise import stages
from mis_jax.checkpoint.load import open_checkpoint
from mis_jax.checkpoint.nnx_state import build
from mis_jax.checkpoint.verify import (
    Comparison,
    LayerDifference,
    Thresholds,
    Verification,
    compare,
    verify,
    verify_checkpoints,
)


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


# Layer by layer

STAGES = [
    "vision embeddings", "vision layer 0", "vision layer 1", "projector", "text embeddings",
    "text layer 0", "text layer 1", "text layer 2", "logits",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tower", ["layer_norm", pytest.param("rms_norm", marks=pytest.mark.slow)])
def test_one_layer_at_a_time_gives_the_same_logits(kind, tower, rng, tmp_path):
    config = dataclasses.replace(
        tiny_config(kind, tower), select_layer=-1 if kind != "llama" else -2
    )
    start = random_checkpoint(config, rng, tmp_path / "start")
    write_checkpoint(start, tmp_path / "model", "internvl")
    with_pictures = random_batch(rng)
    none = {"tiles": with_pictures.tiles[:0], "tile_mask": with_pictures.tile_mask[:0]}
    text_only = dataclasses.replace(with_pictures, **none)
    batches = [with_pictures, text_only]
    model = build(config, start.arrays, compute_dtype=jnp.float32)
    found = list(stages(open_checkpoint(tmp_path / "model"), batches, None))
    assert [name for name, _ in found] == [
        stage for stage in STAGES if kind != "llama" or stage != "vision layer 1"
    ]
    for batch, logits in zip(batches, found[-1][1], strict=True):
        real = np.asarray(batch.segment_ids) > 0
        expected = np.asarray(model(batch))[real]
        # What rounding leaves after sums in another order: relative to the logits' own size.
        assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


CHANGED = {
    "vision.position_embed": (None, "vision embeddings"),
    "vision.layers.block.up.kernel": (1, "vision layer 1"),
    "vision.layers.block.attention_norm.scale": (0, "vision layer 0"),
    "projector.second.bias": (None, "projector"),
    "text.embedding": (None, "text embeddings"),
    "text.layers.block.attention.k.kernel": (2, "text layer 2"),
    "text.layers.block.down.kernel": (0, "text layer 0"),
    "text.norm.scale": (None, "logits"),
    "text.head": (None, "logits"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_the_first_layer_that_differs_is_named(name, rng, tmp_path):
    start = random_checkpoint(tiny_config("qwen2"), rng, tmp_path / "start")
    write_checkpoint(start, tmp_path / "a", "internvl")
    layer, stage = CHANGED[name]
    changed = start.arrays[name].copy()
    changed[slice(None) if layer is None else layer] *= -1.3
    arrays = start.arrays | {name: changed}
    write_checkpoint(dataclasses.replace(start, arrays=arrays), tmp_path / "b", "hf")
    found = verify_checkpoints(tmp_path / "a", tmp_path / "b", [random_batch(rng)])
    assert [layer.name for layer in found.layers] == STAGES
    first = found.first_beyond(1e-3)
    assert first is not None and first.name == stage
    assert all(layer.relative == 0 for layer in found.layers[: STAGES.index(stage)])


def test_nan_is_beyond_every_threshold():
    row = LayerDifference("text layer 0", float("nan"), float("nan"))
    found = Verification(False, [], Comparison(1.0, 0.0, 0.0, 1), [row])
    assert found.first_beyond(1e9) is row


def test_models_of_other_shapes_are_refused(rng, tmp_path):
    for name, layers in (("a", 3), ("b", 2)):
        config = tiny_config("qwen2", num_layers=layers)
        start = random_checkpoint(config, rng, tmp_path / f"{name}.start")
        write_checkpoint(start, tmp_path / name, "internvl")
    with pytest.raises(ValueError, match="text num_layers is 2 and 3 in"):
        verify_checkpoints(tmp_path / "a", tmp_path / "b", [random_batch(rng)])
