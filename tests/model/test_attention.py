"""Attention kernels against the reference, forward and backward, and nothing leaks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mis_jax.config import MeshConfig
from mis_jax.model.attention import attend_xla
from mis_jax.model.xla_cpu import attend_by_head
from mis_jax.parallel.attention_cudnn import attend_cudnn, attend_cudnn_packed, segment_places
from mis_jax.parallel.attention_kernels import attend_on, choose
from mis_jax.parallel.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("optimized")

SEGMENTS = np.array([[1] * 40 + [2] * 70 + [3] * 20 + [0] * 10, [1] * 140], np.int32)
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 128


def random_inputs(segments: np.ndarray, dim: int = HEAD_DIM, seed: int = 0) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    shapes = [(*segments.shape, heads, dim) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@functools.cache
def splash():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return attend_on(mesh, choose("splash", mesh, jnp.dtype(jnp.float32)), packed=True)


def with_gradients(attend, inputs, segments):
    """Output and gradients where there are samples; what padding holds is of no account."""
    *qkv, slope = inputs
    real = 1.0 if segments is None else jnp.asarray(segments > 0)[..., None, None]

    def total(q, k, v):
        out = attend(q, k, v, segments) * real
        return jnp.sum(out * slope), out

    (_, out), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*qkv)
    return [out, *gradients]


@pytest.mark.parametrize("segments", [SEGMENTS, None], ids=["packed", "tiles"])
def test_heads_one_by_one_are_the_reference(segments, monkeypatch):
    monkeypatch.setattr("mis_jax.model.xla_cpu._QUERIES", SEGMENTS.shape[1] // 3)  # four blocks
    inputs = random_inputs(SEGMENTS)
    expected = with_gradients(attend_xla, inputs, segments)
    for mine, theirs in zip(
        with_gradients(attend_by_head, inputs, segments), expected, strict=True
    ):
        np.testing.assert_allclose(mine, theirs, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_splash_is_the_reference(seed):
    """The kernel in Pallas' interpreter; the length is no multiple of its blocks."""
    inputs = random_inputs(SEGMENTS, seed=seed)
    expected = with_gradients(attend_xla, inputs, SEGMENTS)
    for mine, theirs in zip(with_gradients(splash()[0], inputs, SEGMENTS), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5)


@pytest.mark.slow
def test_splash_of_tiles_is_the_reference():
    """All to all, heads of 64 as InternViT's, an odd number of patches."""
    tiles = np.zeros((3, 145), np.int32)
    inputs = random_inputs(tiles, dim=64)[:1] * 3 + random_inputs(tiles, dim=64, seed=5)[3:]
    expected = with_gradients(attend_xla, inputs, None)
    for mine, theirs in zip(with_gradients(splash()[1], inputs, None), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5)


@pytest.mark.parametrize("kernel", ["xla", pytest.param("splash", marks=pytest.mark.slow)])
def test_no_gradient_of_one_sample_reaches_another(kernel):
    attend = attend_xla if kernel == "xla" else splash()[0]
    *qkv, slope = random_inputs(SEGMENTS)
    for sample in (1, 2, 3):
        own = jnp.asarray(sample == SEGMENTS)[..., None, None]
        gradients = jax.jit(
            jax.grad(lambda q, k, v: jnp.sum(attend(q, k, v, SEGMENTS) * slope * own), (0, 1, 2))  # noqa: B023
        )(*qkv)
        for gradient in gradients:
            outside = np.asarray(gradient)[sample != SEGMENTS]
            assert np.count_nonzero(outside) == 0
            assert np.count_nonzero(gradient) > 0


def test_places_of_samples_for_cudnn():
    starts, lengths = segment_places(jnp.asarray(SEGMENTS), most=4)
    assert starts.tolist() == [[0, 40, 110, -1, -1], [0, -1, -1, -1, -1]]
    assert lengths.tolist() == [[40, 70, 20, -1], [140, -1, -1, -1]]


@pytest.mark.parametrize(
    ("attend", "segments"),
    [(attend_cudnn, SEGMENTS), (attend_cudnn_packed, SEGMENTS), (attend_cudnn, None)],
)
def test_cudnn_gets_no_mask(monkeypatch, attend, segments):
    """Lowered for a GPU that is not here: the fused kernel forward and backward, and no bias.

    What the kernel computes can be checked on a GPU alone.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)
    dim = 64 if segments is None else 128
    shape = (3, 1025) if segments is None else SEGMENTS.shape
    *qkv, _ = (x.astype(jnp.bfloat16) for x in random_inputs(np.zeros(shape, np.int32), dim))
    total = lambda q, k, v: jnp.sum(attend(q, k, v, segments).astype(jnp.float32))  # noqa: E731
    traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(*qkv)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "@__cudnn$fmhaSoftmax" in text
    assert "fmhaSoftmaxBackward" in text
    assert "fmhaScaleBias" not in text
    assert ("PADDING_CAUSAL" if segments is not None else "PADDING") in text
    assert ("PADDING_CAUSAL" in text) == (segments is not None)


def test_a_kernel_that_the_devices_do_not_have():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    narrow = jnp.dtype(jnp.bfloat16)
    assert choose("auto", mesh, narrow) == "by_head"
    with pytest.raises(ValueError, match=r"train.attention is cudnn.*not bfloat16 on cpu"):
        choose("cudnn", mesh, narrow)


@pytest.mark.parametrize("largest_block", [1024, 2048])  # of the v5e and the v6e
@pytest.mark.parametrize("length", [128, 1152, 1280, 2048, 4096, 8192])
def test_splash_blocks_divide_each_other(length, largest_block) -> None:
    from mis_jax.parallel.attention_splash import make_kernel

    kernel = make_kernel(
        2, length, causal=True, largest_block=largest_block, head_shards=1, length_shards=1,
        interpret=True,
    )  # fmt: skip
    sizes = kernel.kwargs["block_sizes"]
    assert length % sizes.block_q == length % sizes.block_kv == 0
    assert sizes.block_kv % sizes.block_kv_compute == 0
    assert sizes.block_kv_dkv % sizes.block_kv_dkv_compute == 0
