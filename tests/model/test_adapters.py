"""Adapters beside linear maps: what they add, what they drop, and kernels in few bits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx

from mis_jax.checkpoint import nnx_state
from mis_jax.config import LoraConfig
from mis_jax.model.batch import Batch
from mis_jax.model.config import InternVLConfig, TextConfig, VisionConfig
from mis_jax.model.layers import Linear, UncastParam
from mis_jax.model.lora import Adapter, QuantisedKernel, quantise, set_dropout

WIDTH, RANK = 24, 4


def tiny(kind: str) -> InternVLConfig:
    return InternVLConfig(
        vision=VisionConfig(hidden_size=16, num_layers=2, num_heads=2, mlp_size=24, image_size=56),
        text=TextConfig(
            kind=kind, vocab_size=67, hidden_size=WIDTH, num_layers=3, num_heads=4,
            num_kv_heads=2, mlp_size=40, head_dim=6,
        ),
        image_token_id=60,
    )  # fmt: skip


def shapes(kind: str, **settings) -> dict[str, jax.ShapeDtypeStruct]:
    lora = LoraConfig(**({"rank": RANK, "targets": ("vision", "language")} | settings))
    return nnx_state.flat(nnx_state.abstract_model(tiny(kind), lora=lora))  # type: ignore[return-value]


def filled(kind: str, seed: int = 0, **settings) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(0.1 * rng.standard_normal(value.shape), value.dtype)
        for name, value in shapes(kind, **settings).items()
    }


def adapters_of(model) -> dict[str, Adapter]:
    return {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Adapter)
    }


@pytest.mark.parametrize("kind", ["internlm2", "llama", "qwen2", "qwen3"])
def test_every_linear_map_of_the_blocks_and_no_other(kind):
    adapted = {name for name in shapes(kind) if ".adapter" in name}
    linears = [f"text.layers.block.{n}" for n in ("attention.out", "gate", "up", "down")]
    linears += [f"vision.layers.block.{n}" for n in ("attention.out", "up", "down")]
    text = [f"text.layers.block.attention.{part}" for part in "qkv"]
    vision = [f"vision.layers.block.attention.{part}" for part in "qkv"]
    expected = {f"{name}.adapter.{side}" for name in linears for side in "ab"}
    expected |= {f"{name}.adapter.b" for name in text + vision}
    # One map upstream has one `a`: the tower's qkv everywhere, InternLM2's wqkv.
    expected.add("vision.layers.block.attention.adapter_a")
    if kind == "internlm2":
        expected.add("text.layers.block.attention.adapter_a")
    else:
        expected |= {f"{name}.adapter.a" for name in text}
    assert adapted == expected
    only = {name for name in shapes(kind, targets=("language",)) if ".adapter" in name}
    assert only == {name for name in expected if name.startswith("text.")}
    assert shapes(kind)["text.layers.block.down.adapter.a"].shape == (3, 40, RANK)
    assert shapes(kind)["text.layers.block.down.adapter.b"].shape == (3, RANK, WIDTH)


def test_adapters_are_split_as_their_kernels_are():
    model = nnx_state.abstract_model(tiny("internlm2"), lora=LoraConfig(rank=RANK, base="nf4"))
    axes = {
        ".".join(map(str, path)): variable.axes
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    gate = "text.layers.block.gate"
    assert axes[f"{gate}.adapter.a"] == ("layers", "embed", None)
    assert axes[f"{gate}.adapter.b"] == ("layers", None, "mlp")
    assert axes[f"{gate}.kernel.values"] == ("layers", "embed", "mlp")
    assert axes[f"{gate}.kernel.scale"] == ("layers", "embed", "mlp")
    model = nnx_state.abstract_model(tiny("internlm2"), lora=LoraConfig(rank=RANK, base="int8"))
    assert model.text.layers.block.gate.kernel.scale.axes == ("layers", None, "mlp")


def linear(rng, *, key=None, dropout=0.25, group="here") -> Linear:
    made = Linear(WIDTH, 8, axes=(None, None), bias=True, dtype=jnp.float32, rngs=nnx.Rngs(0))
    a, b = rng.standard_normal((WIDTH, RANK)), rng.standard_normal((RANK, 8))
    adapter = Adapter(
        nnx.Param(jnp.asarray(a, jnp.float32)), nnx.Param(jnp.asarray(b, jnp.float32)),
        scale=3.0, dropout=dropout, group=group,
    )  # fmt: skip
    made.adapter = nnx.data(adapter)
    if key is not None:
        adapter.key = nnx.data(nnx.Variable(key))
    return made


def test_what_an_adapter_adds():
    rng = np.random.default_rng(0)
    made = linear(rng)
    x = rng.standard_normal((5, WIDTH)).astype(np.float32)
    adapter = made.adapter
    expected = x @ np.asarray(made.kernel[...]) + 3.0 * (
        x @ np.asarray(adapter.a[...]) @ np.asarray(adapter.b[...])
    )
    np.testing.assert_allclose(made(x), expected, rtol=1e-5, atol=1e-5)
    assert made(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_dropout_keeps_the_mean_and_its_gradient_has_the_same_mask():
    rng = np.random.default_rng(1)
    key = jax.random.key(3)
    made = linear(rng, key=key)
    adapter = made.adapter
    x = jnp.asarray(rng.standard_normal((400, WIDTH)), jnp.float32)
    kept = np.asarray(jax.random.bernoulli(key, 0.75, x.shape))
    assert 0.7 < kept.mean() < 0.8
    dropped = np.where(kept, np.asarray(x) / 0.75, 0)
    a, b = np.asarray(adapter.a[...]), np.asarray(adapter.b[...])
    np.testing.assert_allclose(adapter(x), 3.0 * dropped @ a @ b, rtol=1e-4, atol=1e-4)

    def total(a, x):
        other = Adapter(nnx.Param(a), adapter.b, scale=3.0, dropout=0.25, group="here")
        other.key = nnx.data(nnx.Variable(key))
        return other(x).sum()

    by_a, by_x = jax.jit(jax.grad(total, argnums=(0, 1)))(adapter.a[...], x)
    ones = np.ones((400, 8), np.float32)
    np.testing.assert_allclose(by_a, 3.0 * dropped.T @ ones @ b.T, rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(np.asarray(by_x) != 0, kept)


def test_keys_differ_by_layer_and_map_and_are_shared_where_a_is():
    def keys(seed: int) -> dict[str, bytes]:
        model = nnx_state.build(tiny("internlm2"), filled("internlm2"), lora=LoraConfig(
            rank=RANK, targets=("vision", "language")))  # fmt: skip
        set_dropout(model, jax.random.key(seed))
        found = {}
        for name, adapter in adapters_of(model).items():
            assert adapter.key is not None
            for layer, data in enumerate(np.asarray(jax.random.key_data(adapter.key[...]))):
                found[f"{name}.{layer}"] = data.tobytes()
        return found

    once = keys(1)
    assert once == keys(1) and not set(once.values()) & set(keys(2).values())
    assert len(once) == 7 * 3 + 6 * 2
    assert len(set(once.values())) == 5 * 3 + 4 * 2  # q, k and v drop the same inputs
    q, k = (once[f"text.layers.block.attention.{part}.adapter.1"] for part in "qk")
    assert q == k


@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_a_quantised_kernel_is_close_and_small(base):
    rng = np.random.default_rng(2)
    kernel = jnp.asarray(rng.standard_normal((3, 128, 40)), jnp.float32)
    kernel = kernel * jnp.array([1, 100, 0.01])[:, None, None]  # each layer has its own scales
    made = quantise(kernel, base)
    held = QuantisedKernel(UncastParam(made.qvalue), UncastParam(made.scale), base)
    back = np.asarray(held(jnp.float32))
    np.testing.assert_array_equal(back, qwix.dequantize(made))
    error = np.abs(back - kernel).mean((1, 2)) / np.abs(kernel).mean((1, 2))
    assert (error < {"int8": 0.01, "nf4": 0.1}[base]).all(), error
    # On devices: bits of a value, and float32 scales.
    compiled = jax.jit(lambda v, s: v.astype(jnp.float32).sum() + s.sum())
    memory = compiled.lower(made.qvalue, made.scale).compile().memory_analysis()
    each = {"int8": 1 + 4 / 128, "nf4": 0.5 + 4 / 64}[base]
    assert memory.argument_size_in_bytes / kernel.size == pytest.approx(each, rel=0.01)


def test_a_model_on_a_quantised_base_is_that_of_the_kernels_it_stands_for():
    config, lora = tiny("qwen2"), LoraConfig(rank=RANK, base="nf4")
    start = filled("qwen2", targets=("language",))
    values, plain = {}, dict(start)
    for name, value in start.items():
        if name.startswith("text.layers") and name.endswith("kernel"):
            made = jax.jit(lambda x: quantise(x, "nf4"))(value)
            values |= {f"{name}.values": made.qvalue, f"{name}.scale": made.scale}
            plain[name] = qwix.dequantize(made)
        else:
            values[name] = value
    ids = jnp.arange(20, dtype=jnp.int32)[None]
    no_tiles = jnp.zeros((0, 56, 56, 3), jnp.uint8)
    batch = Batch(ids, ids, jnp.ones_like(ids), jnp.zeros(ids.shape), no_tiles, jnp.zeros(0, bool))

    @partial(jax.jit, static_argnums=1)
    def output(values, lora):
        return nnx_state.build(config, values, lora=lora)(batch)

    got, expected = output(values, lora), output(plain, LoraConfig(rank=RANK))
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    assert np.abs(output(start, LoraConfig(rank=RANK)) - got).max() > 1e-4
