"""Schedule against Hugging Face's formula, one AdamW step against torch's."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mis_jax.config import DtypeConfig, OptimizerConfig
from mis_jax.train.optimizer import learning_rate_schedule, make_optimizer

PEAK = 5e-6
FLOAT32 = DtypeConfig()


def hugging_face_lambda(steps: int, ratio: float):
    """The factor that transformers multiplies the learning rate with, by step."""
    import transformers

    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = transformers.get_cosine_schedule_with_warmup(
        optimizer, math.ceil(steps * ratio), steps
    )
    return scheduler.lr_lambdas[0]


@pytest.mark.parametrize("steps", [1, 2, 33, 34, 100, 1000])
def test_cosine_is_hugging_faces(steps):
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=PEAK), steps)
    factor = hugging_face_lambda(steps, 0.03)
    places = sorted({0, 1, math.ceil(0.03 * steps), steps // 2, steps - 1, steps})
    got = [float(schedule(jnp.int32(step))) for step in places]
    expected = [PEAK * factor(step) for step in places]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-12)


def test_known_values():
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=PEAK), 100)
    assert float(schedule(0)) == 0
    assert float(schedule(1)) == pytest.approx(PEAK / 3)
    assert float(schedule(3)) == pytest.approx(PEAK)
    assert float(schedule(100)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_no_warmup_and_nothing_but_warmup(ratio):
    config = OptimizerConfig(learning_rate=PEAK, warmup_ratio=ratio)
    schedule = learning_rate_schedule(config, 10)
    factor = hugging_face_lambda(10, ratio)
    got = [float(schedule(step)) for step in range(11)]
    np.testing.assert_allclose(got[:10], [PEAK * factor(s) for s in range(10)], rtol=1e-5)


def test_constant_stays_at_the_peak_after_the_warmup():
    config = OptimizerConfig(learning_rate=PEAK, schedule="constant")
    schedule = learning_rate_schedule(config, 100)
    got = [float(schedule(step)) for step in (0, 3, 50, 100)]
    np.testing.assert_allclose(got, [0, PEAK, PEAK, PEAK], rtol=1e-6)


def parameters(seed: int, scale: float) -> dict[str, np.ndarray]:
    """Under names that a model has: what is left out by name shows."""
    rng = np.random.default_rng(seed)
    shapes = {
        "text.layers.block.up.kernel": (5, 7),
        "vision.layers.block.up.bias": (7,),
        "text.layers.block.attention_norm.scale": (3, 5),
        "text.embedding": (4, 5),
    }
    return {n: (scale * rng.normal(size=s)).astype(np.float32) for n, s in shapes.items()}


@pytest.mark.parametrize("gradient_scale", [0.01, 10.0], ids=["not clipped", "clipped"])
def test_steps_are_torchs_adamw(gradient_scale):
    """Every tensor decays, norms and biases too; clipping is by the norm of all of them."""
    torch = pytest.importorskip("torch")
    config = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_ratio=0.0)
    start = parameters(0, 1.0)
    ours = {n: jnp.asarray(v) for n, v in start.items()}
    transform = make_optimizer(config, FLOAT32, steps=10)
    state = transform.init(ours)
    theirs = {n: torch.nn.Parameter(torch.from_numpy(v.copy())) for n, v in start.items()}
    optimizer = torch.optim.AdamW(
        theirs.values(), lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05
    )
    for step in range(3):
        gradient = parameters(step + 1, gradient_scale)
        updates, state = transform.update(
            {n: jnp.asarray(v) for n, v in gradient.items()}, state, ours
        )
        ours = optax.apply_updates(ours, updates)
        for name, parameter in theirs.items():
            parameter.grad = torch.from_numpy(gradient[name].copy())
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        optimizer.step()
        for name, parameter in theirs.items():
            difference = np.abs(np.asarray(ours[name]) - parameter.detach().numpy()).max()
            assert difference <= 1e-6, (step, name, difference)


def test_an_infinite_clip_does_not_clip():
    config = OptimizerConfig(clip=math.inf, schedule="constant", warmup_ratio=0.0)
    gradient = {"kernel": jnp.array([3e4, -4e4])}
    clip, _ = optax.clip_by_global_norm(config.clip).update(gradient, optax.EmptyState())
    assert clip["kernel"].tolist() == gradient["kernel"].tolist()
    transform = make_optimizer(config, FLOAT32, 10)
    updates, _ = transform.update(gradient, transform.init(gradient), gradient)
    assert np.isfinite(np.asarray(updates["kernel"])).all()


def test_decay_reaches_norms_and_biases_without_any_gradient():
    config = OptimizerConfig(learning_rate=0.1, schedule="constant", warmup_ratio=0.0)
    start = {n: jnp.asarray(v) for n, v in parameters(0, 1.0).items()}
    transform = make_optimizer(config, FLOAT32, steps=10)
    zeros = jax.tree.map(jnp.zeros_like, start)
    updates, _ = transform.update(zeros, transform.init(start), start)
    for name, value in optax.apply_updates(start, updates).items():
        np.testing.assert_allclose(value, start[name] * (1 - 0.1 * 0.05), rtol=1e-5)


def test_moments_have_the_dtype_asked_for():
    transform = make_optimizer(OptimizerConfig(), DtypeConfig(moments="bfloat16"), steps=10)
    adam = transform.init({"kernel": jnp.zeros((2, 2))})[1]
    assert adam.mu["kernel"].dtype == adam.nu["kernel"].dtype == jnp.bfloat16
