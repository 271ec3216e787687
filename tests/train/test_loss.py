"""The loss of a batch against torch and against arithmetic by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mis_jax.data.collate import Example, collate
from mis_jax.model.batch import Batch
from mis_jax.train import loss as loss_module

pytestmark = pytest.mark.usefixtures("optimized")

VOCAB = 17


def weighted_loss(logits, batch: Batch, chunk: int = 4):
    """Of given logits: a table of unit vectors makes the hidden states the logits."""
    return loss_module.weighted_loss(logits, jnp.eye(VOCAB), batch, chunk=chunk)


def example(length: int, answers: list[int], seed: int) -> Example:
    """`length` random ids of which `answers` (positions) are under the loss."""
    ids = np.random.default_rng(seed).integers(0, VOCAB, length).astype(np.int32)
    mask = np.zeros(length, bool)
    mask[answers] = True
    return Example(str(seed), ids, mask, np.zeros((0, 4, 4, 3), np.uint8), ())


EXAMPLES = [example(9, [4, 5, 6, 8], 1), example(6, [5], 2), example(5, [], 3)]


def batch_of(examples: list[Example], reduction) -> Batch:
    return collate(
        [[e] for e in examples],
        length=10,
        tiles_per_sequence=0,
        image_size=4,
        pad_id=0,
        reduction=reduction,
    )


def random_logits(rows: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 3, (rows, 10, VOCAB)).astype(np.float32)


def surprise(logits: np.ndarray, example: Example, row: int) -> dict[int, float]:
    """Minus log probability of every answer token, by hand in float64."""
    found = {}
    for place in np.flatnonzero(example.loss_mask):
        scores = logits[row, place - 1].astype(np.float64)  # the position before tells about it
        probability = np.exp(scores[example.input_ids[place]]) / np.exp(scores).sum()
        found[int(place)] = -np.log(probability)
    return found


def test_token_reduction_is_torchs_cross_entropy():
    torch = pytest.importorskip("torch")
    logits, batch = random_logits(3), batch_of(EXAMPLES, "token")
    labels = np.full((3, 10), -100)
    for row, one in enumerate(EXAMPLES):
        labels[row, : len(one.input_ids)] = np.where(one.loss_mask, one.input_ids, -100)
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits[:, :-1].reshape(-1, VOCAB)),
        torch.from_numpy(labels[:, 1:].reshape(-1)),
    )
    total, weight = weighted_loss(jnp.asarray(logits), batch)
    assert float(weight) == 5
    np.testing.assert_allclose(float(total / weight), expected.item(), rtol=1e-6)


@pytest.mark.parametrize("reduction", ["token", "sample", "square"])
def test_reductions_by_hand(reduction):
    logits, batch = random_logits(3), batch_of(EXAMPLES, reduction)
    total = weight = 0.0
    for row, one in enumerate(EXAMPLES):
        values = surprise(logits, one, row).values()
        count = len(values)
        each = {"token": 1, "sample": 1 / max(count, 1), "square": max(count, 1) ** -0.5}[reduction]
        total += each * sum(values)
        weight += each * count
    got = weighted_loss(jnp.asarray(logits), batch)
    np.testing.assert_allclose([float(x) for x in got], [total, weight], rtol=1e-6)


def test_only_the_tokens_before_answers_get_a_gradient():
    batch = batch_of(EXAMPLES, "token")
    gradient = jax.grad(lambda x: weighted_loss(x, batch)[0])(jnp.asarray(random_logits(3)))
    touched = np.argwhere(np.abs(np.asarray(gradient)).sum(-1) > 0).tolist()
    assert touched == [[0, 3], [0, 4], [0, 5], [0, 7], [1, 4]]


def test_without_a_loss_token_the_sum_and_its_gradient_are_zero():
    batch = batch_of([EXAMPLES[2]], "square")
    assert np.count_nonzero(batch.loss_weights) == 0
    loss = lambda x: weighted_loss(x, batch)  # noqa: E731
    (total, weight), gradient = jax.value_and_grad(loss, has_aux=True)(
        jnp.asarray(random_logits(1))
    )
    assert (float(total), float(weight)) == (0, 0)
    assert not np.asarray(gradient).any()


def test_bfloat16_logits_are_summed_in_float32():
    logits = jnp.asarray(random_logits(3), jnp.bfloat16)
    batch = batch_of(EXAMPLES, "token")
    total, _ = weighted_loss(logits, batch)
    exact, _ = weighted_loss(logits.astype(jnp.float32), batch)
    assert total.dtype == jnp.float32
    assert float(total) == float(exact)


def test_padding_never_counts():
    batch = batch_of(EXAMPLES, "token")
    logits = random_logits(3)
    noisy = logits.copy()
    noisy[1, 6:] = 1e4
    got, same = (weighted_loss(jnp.asarray(x), batch)[0] for x in (logits, noisy))
    assert float(got) == float(same)
    other = dataclasses.replace(batch, input_ids=np.where(batch.segment_ids, batch.input_ids, 5))
    assert float(weighted_loss(jnp.asarray(logits), other)[0]) == float(got)


@pytest.mark.parametrize(("chunk", "shortest"), [(1, 128), (3, 128), (10, 128), (64, 128), (64, 1)])
@pytest.mark.parametrize("vocab", [VOCAB, VOCAB - 4])
def test_chunks_have_the_loss_and_gradients_of_whole_logits(chunk, shortest, vocab, monkeypatch):
    """Against logits of all positions by autodiff; the table may have more rows than tokens.

    The last pair takes a quarter of a row at a time.
    """
    monkeypatch.setattr(loss_module, "_SHORTEST", shortest)
    rng = np.random.default_rng(1)
    batch = batch_of(EXAMPLES, "square")
    batch = dataclasses.replace(batch, input_ids=batch.input_ids % vocab)
    hidden = jnp.asarray(rng.normal(0, 1, (3, 10, 8)), jnp.float32)
    table = jnp.asarray(rng.normal(0, 1, (VOCAB, 8)), jnp.float32)

    def whole(hidden, table):
        logits = jax.nn.log_softmax(hidden[:, :-1] @ table[:vocab].T)
        losses = -jnp.take_along_axis(logits, batch.input_ids[:, 1:, None], axis=-1)[..., 0]
        return jnp.sum(losses * batch.loss_weights[:, 1:])

    def ours(hidden, table):
        return loss_module.weighted_loss(hidden, table, batch, vocab=vocab, chunk=chunk)[0]

    expected, wanted = jax.value_and_grad(whole, (0, 1))(hidden, table)
    got, found = jax.jit(jax.value_and_grad(lambda h, t: 2 * ours(h, t), (0, 1)))(hidden, table)
    np.testing.assert_allclose(float(got), 2 * float(expected), rtol=1e-5)
    for mine, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine, 2 * theirs, atol=2e-6)
    assert not np.any(found[1][vocab:])


def test_no_gradient_is_computed_that_nobody_asked_for():
    """A frozen head costs no product with the positions' slopes."""
    batch, table = batch_of(EXAMPLES, "token"), jnp.ones((VOCAB, 8))
    total = lambda h, t: loss_module.weighted_loss(h, t, batch)[0]  # noqa: E731
    hidden = jnp.ones((3, 10, 8))
    products = {
        which: str(jax.make_jaxpr(jax.grad(total, which))(hidden, table)).count("dot_general[")
        for which in (0, 1, (0, 1))
    }
    assert products == {0: 2, 1: 2, (0, 1): 3}
    assert str(jax.make_jaxpr(total)(hidden, table)).count("dot_general[") == 1
