"""Choices that save memory leave the step what it is, and really save."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mesh_runs import MODEL, initial_state, random_batch, run_config

from mis_jax.config import MeshConfig
from mis_jax.model.config import InternVLConfig
from mis_jax.model.family import published
from mis_jax.model.vision import drop_path_factors
from mis_jax.parallel.sharding import make_mesh, put_batch
from mis_jax.train.compiled_step import TrainProgram, make_train_program

pytestmark = pytest.mark.slow


def program_of(
    model: InternVLConfig = MODEL,
    optimizer: dict | None = None,
    dtype: dict | None = None,
    **train,
) -> TrainProgram:
    config = run_config(MeshConfig(), **train)
    config = dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, **(optimizer or {})),
        dtype=dataclasses.replace(config.dtype, **(dtype or {})),
    )
    return make_train_program(config, model, make_mesh(config.mesh, jax.devices()[:1]), 20)


def two_steps(program: TrainProgram):
    """Losses and parameters after two steps."""
    state, rng, losses = initial_state(program), np.random.default_rng(0), []
    for _ in range(2):
        batch = put_batch(random_batch(rng), program.mesh, accumulated=True)
        state, metrics = program.step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses, program.parameters(state), state


@pytest.fixture(scope="module")
def plain():
    return two_steps(program_of())


@pytest.mark.parametrize(
    "train",
    [dict(remat="none", unroll=True), dict(remat="dots"), dict(remat="attention"),
     dict(remat="offload"), dict(loss_chunk=5)],
    ids=str,
)  # fmt: skip
def test_policies_change_no_result(plain, train):
    losses, parameters, _ = two_steps(program_of(**train))
    np.testing.assert_allclose(losses, plain[0], rtol=1e-6)
    for name, value in plain[1].items():
        difference = np.abs(np.asarray(parameters[name]) - np.asarray(value)).max()
        assert difference <= 1e-5 * np.abs(value).max(), name


def test_moments_wait_in_host_memory(plain):
    program = program_of(optimizer=dict(offload=True))
    losses, parameters, state = two_steps(program)
    moments = state.optimizer[1]
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves((moments.mu, moments.nu))}
    assert kinds == {"pinned_host"}
    assert {x.sharding.memory_kind for x in state.trainable.values()} == {"device"}
    np.testing.assert_allclose(losses, plain[0], rtol=1e-6)
    for name, value in plain[1].items():
        np.testing.assert_allclose(parameters[name], value, rtol=1e-5, atol=1e-7)


def compiled(program: TrainProgram):
    rows = program.config.train.global_batch
    return program.step.lower(program.state, program.batch(rows, 64, 2, 56)).compile()


def test_the_state_is_updated_in_place():
    """What is given away covers the whole state that comes back."""
    program = program_of()
    memory = compiled(program).memory_analysis()
    state = sum(x.dtype.itemsize * np.prod(x.shape) for x in jax.tree.leaves(program.state))
    assert memory.alias_size_in_bytes >= state
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 4096  # metrics


def test_bfloat16_state_takes_half():
    wide, narrow = (
        compiled(program_of(dtype=d)).memory_analysis().argument_size_in_bytes
        for d in ({}, dict(params="bfloat16", moments="bfloat16", gradients="bfloat16"))
    )
    batch = sum(x.size for x in jax.tree.leaves(random_batch(np.random.default_rng(0))))
    assert narrow < 0.5 * wide + 4 * batch


def test_no_logits_of_all_positions_are_held():
    """Chunks of 8 positions of a row against all 64, with a vocabulary of 20,001."""
    wordy = dataclasses.replace(MODEL, text=dataclasses.replace(MODEL.text, vocab_size=20001))
    few, all_ = (
        compiled(program_of(wordy, loss_chunk=n)).memory_analysis().temp_size_in_bytes
        for n in (8, 64)
    )
    logits = 8 * 64 * 20224 * 4  # rows, positions, rows of the table, float32
    assert all_ > logits
    assert few < all_ - 0.8 * logits


def test_adafactor_has_next_to_no_moments():
    program = program_of(published("internvl2_5-1b"), optimizer=dict(name="adafactor"))
    sizes = [
        sum(np.prod(x.shape) for x in jax.tree.leaves(tree))
        for tree in (program.state.optimizer, program.state.trainable)
    ]
    assert sizes[0] < 0.01 * sizes[1]


def test_parts_have_their_own_learning_rates():
    rates = dict(learning_rate=1e-3, vision_learning_rate=1e-4, projector_learning_rate=5e-4)
    config = dict(schedule="constant", weight_decay=0.0, clip=1e9, eps=1e-12, **rates)
    program = program_of(optimizer=config, freeze=())
    before = {n: np.asarray(x) for n, x in initial_state(program).trainable.items()}
    batch = put_batch(random_batch(np.random.default_rng(0)), program.mesh, accumulated=True)
    after = program.step(initial_state(program), batch)[0].trainable
    for name, rate in (
        ("vision.layers.block.up.kernel", 1e-4),
        ("projector.first.kernel", 5e-4),
        ("text.layers.block.up.kernel", 1e-3),
    ):  # AdamW's first step moves every weight by its learning rate
        moved = np.median(np.abs(np.asarray(after[name]) - before[name]))
        assert moved == pytest.approx(rate, rel=0.01), name


def test_a_spike_is_left_out():
    program = program_of(spike=3.0)
    state = dataclasses.replace(
        initial_state(program), step=jnp.int32(50), grad_norm_ema=jnp.float32(1e-3)
    )
    before = {n: np.asarray(x) for n, x in state.trainable.items()}
    batch = put_batch(random_batch(np.random.default_rng(0)), program.mesh, accumulated=True)
    state, metrics = program.step(state, batch)
    assert bool(metrics["spike"]) and bool(metrics["finite"])
    assert int(state.step) == 50 and float(state.grad_norm_ema) == np.float32(1e-3)
    assert all(np.array_equal(before[n], x) for n, x in state.trainable.items())
    state = dataclasses.replace(state, grad_norm_ema=jnp.float32(1e3))
    state, metrics = program.step(state, batch)
    assert not metrics["spike"] and int(state.step) == 51


def test_drop_path_drops_as_often_as_it_says():
    factors = np.asarray(drop_path_factors(jax.random.key(0), 0.4, 5, 4000))
    assert factors.shape == (5, 2, 4000)
    chance = np.linspace(0, 0.4, 5)
    np.testing.assert_allclose((factors == 0).mean((1, 2)), chance, atol=0.02)
    np.testing.assert_allclose(factors.mean((1, 2)), 1, atol=0.02)  # the sum stays the same
    for layer in range(5):
        kept = factors[layer][factors[layer] > 0]
        np.testing.assert_allclose(kept, 1 / (1 - chance[layer]), rtol=1e-6)


def test_drop_path_is_for_training_and_differs_from_step_to_step(plain):
    program = program_of(drop_path=0.9, freeze=())
    batch = put_batch(random_batch(np.random.default_rng(0)), program.mesh, accumulated=True)
    losses = []
    for step in (0, 0, 1):
        state = dataclasses.replace(initial_state(program), step=jnp.int32(step))
        losses.append(float(program.step(state, batch)[1]["loss"]))
    assert losses[0] == losses[1] != losses[2]
    assert losses[0] != plain[0][0]
