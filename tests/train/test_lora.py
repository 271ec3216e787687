"""LoRA in a step: logits and gradients are PEFT's, first values, and what stays as it is."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import adamw, batch_of, examples, reference, step_of
from tiny_world import run_config

from mis_jax.checkpoint import nnx_state
from mis_jax.checkpoint.load import Checkpoint, read_checkpoint
from mis_jax.checkpoint.peft.files import read_adapter
from mis_jax.config import LoraConfig
from mis_jax.model.lora import is_adapter
from mis_jax.train import lora
from mis_jax.train.step import TrainState

BOTH = ("vision", "language")
RANK = 4
TARGETS = (  # every linear map of the blocks, in transformers' names
    r".*language_model.*(q|k|v|o|gate|up|down)_proj"
    r"|.*vision_tower.*(attention\.(q_proj|k_proj|v_proj|projection_layer)|fc1|fc2)"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    ref = reference()
    config = ref.reference_config("qwen2", "layer_norm", num_hidden_layers=2)
    folder = tmp_path_factory.mktemp("lora") / "hf"
    return read_checkpoint(ref.save(ref.reference_model(config, seed=0), folder))


def run_of(checkpoint_folder, data, output, **changes):
    """Settings of a short run; all linear maps of the blocks have adapters."""
    lora_config = LoraConfig(rank=RANK, targets=BOTH)
    return run_config(checkpoint_folder, data, output, **({"lora": lora_config} | changes))


def shapes_of(config, lora_config) -> dict:
    abstract = nnx_state.abstract_model(config, lora=lora_config)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=here)
        for name, value in nnx_state.flat(abstract).items()
    }


# Against PEFT


def names_of(kernel: str, fused: bool) -> tuple[str, str]:
    """Our names of the factors of a kernel."""
    linear = kernel.removesuffix(".kernel")
    if fused and linear[-2:] in (".q", ".k", ".v"):
        return f"{linear[:-2]}.adapter_a", f"{linear}.adapter.b"
    return f"{linear}.adapter.a", f"{linear}.adapter.b"


@pytest.mark.parametrize(
    ("text", "tower", "kind"),
    [
        pytest.param("qwen2", "layer_norm", "qwen2", marks=pytest.mark.slow),
        ("llama", "rms_norm", "internlm2"),
    ],
)
def test_logits_and_gradients_are_those_of_peft(text, tower, kind, tmp_path):
    """Where upstream has one map for q, k and v, theirs get the same A, whose gradients we sum.

    Their gradients are stored as if they were factors, so that the import aligns the names.
    """
    peft, torch, ref = pytest.importorskip("peft"), pytest.importorskip("torch"), reference()
    model = ref.reference_model(ref.reference_config(text, tower, num_hidden_layers=2), seed=1)
    base = read_checkpoint(ref.save(model, tmp_path / "base"))
    config = dataclasses.replace(base.config, text=dataclasses.replace(base.config.text, kind=kind))
    made = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS)
    theirs = peft.get_peft_model(model, made)
    factors = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    fused = {"text.": kind == "internlm2", "vision": True}
    with torch.no_grad():
        for name, parameter in factors.items():
            one = (".self_attn." in name and kind == "internlm2") or "vision_tower" in name
            key = re.sub(r"\.[kv]_proj\.lora_A", ".q_proj.lora_A", name) if one else name
            parameter.copy_(factors[key] if key != name else 0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(str(tmp_path / "a"))
    values = {name: jnp.asarray(value) for name, value in base.arrays.items()}
    for kernel, pair in read_adapter(tmp_path / "a", base.config).items():
        a, b = names_of(kernel, fused[kernel[:5] if kernel[0] == "t" else "vision"])
        values |= {a: jnp.asarray(pair.a), b: jnp.asarray(pair.b)}
        assert pair.scale == 2.0

    rows = examples(seed=2)
    batch = jax.tree.map(lambda field: field[0], batch_of(rows))
    length = batch.input_ids.shape[1]
    output = theirs(
        input_ids=torch.from_numpy(batch.input_ids).long(),
        attention_mask=torch.from_numpy((batch.segment_ids > 0).astype(np.int64)),
        pixel_values=ref.pixel_values([row.tiles for row in rows]),
    ).logits
    weights = torch.zeros(len(rows), length, output.shape[-1])
    real = batch.segment_ids > 0
    weights[torch.from_numpy(real)] = torch.randn(int(real.sum()), output.shape[-1])
    (output * weights).sum().backward()
    with torch.no_grad():
        for parameter in factors.values():
            parameter.copy_(parameter.grad)
    theirs.save_pretrained(str(tmp_path / "gradients"))
    expected = {}
    for kernel, pair in read_adapter(tmp_path / "gradients", base.config).items():
        a, b = names_of(kernel, fused[kernel[:5] if kernel[0] == "t" else "vision"])
        expected[a] = expected.get(a, 0) + pair.a
        expected[b] = pair.b

    lora_config = LoraConfig(rank=RANK, targets=BOTH)
    trained = {name: value for name, value in values.items() if is_adapter(name)}

    def total(trained, values):
        model = nnx_state.build(config, values | trained, lora=lora_config)
        logits = model(batch)
        return jnp.sum(logits * weights.numpy()), logits

    (_, logits), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(trained, values)
    assert np.abs(np.asarray(logits) - output.detach().numpy())[real].max() <= 1e-4
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        difference = np.abs(np.asarray(gradient) - expected[name]).max()
        assert difference <= 1e-4 * np.abs(expected[name]).max(), name


# What a run changes


def test_only_adapters_and_an_unfrozen_projector_move(checkpoint, tmp_path):
    config = run_of(tmp_path, tmp_path, tmp_path)
    official = run_of(tmp_path, tmp_path, tmp_path, train__freeze=(*BOTH, "projector"))
    shapes = shapes_of(checkpoint.config, config.lora)
    start = {name: np.array(value) for name, value in checkpoint.arrays.items()}
    start |= {n: np.array(v) for n, v in lora.first_adapters(config.seed, shapes).items()}
    assert start.keys() == shapes.keys()
    transform, schedule = adamw()
    trained = {n: jnp.array(v) for n, v in start.items() if lora.is_trained(config, n)}
    frozen = {n: jnp.array(v) for n, v in start.items() if n not in trained}
    zero = jnp.zeros((), jnp.int32), jnp.zeros(())
    state = TrainState(zero[0], trained, frozen, transform.init(trained), zero[1])
    step = step_of(checkpoint, transform, schedule, lora=config.lora)
    for seed in (4, 5):
        state, _ = step(state, batch_of(examples(seed)))
    for name, value in (state.trainable | state.frozen).items():
        moved = not np.array_equal(np.asarray(value), start[name])
        assert moved == (is_adapter(name) or name.startswith("projector.")), name
        assert lora.is_trained(official, name) == is_adapter(name), name


def test_first_values_leave_the_model_as_it_is(checkpoint):
    lora_config = LoraConfig(rank=RANK, targets=BOTH)
    shapes = shapes_of(checkpoint.config, lora_config)
    first = lora.first_adapters(3, shapes)
    again, other = lora.first_adapters(3, shapes), lora.first_adapters(4, shapes)
    for name, value in first.items():
        assert np.array_equal(value, again[name])
        if name.endswith(".b"):
            assert not np.any(value)
            continue
        assert np.any(value != other[name])
        bound = value.shape[-2] ** -0.5
        assert 0.9 * bound < np.abs(value).max() <= bound
        assert np.std(value) == pytest.approx(bound / 3**0.5, rel=0.15)
    batch = jax.tree.map(lambda field: field[0], batch_of(examples(0)))
    values = {name: jnp.asarray(value) for name, value in checkpoint.arrays.items()}

    @functools.partial(jax.jit, static_argnums=1)
    def logits(values, lora_config):
        return nnx_state.build(checkpoint.config, values, lora=lora_config)(batch)

    expected = np.asarray(logits(values, None))
    np.testing.assert_array_equal(logits(values | first, lora_config), expected)
