"""Runs that train adapters: what they write, and how they go on."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_lora import RANK, run_of
from test_trainer import Crash, crash_at, metrics_of

from mis_jax.checkpoint import nnx_state
from mis_jax.checkpoint.load import load, open_checkpoint
from mis_jax.config import DtypeConfig, LoraConfig
from mis_jax.data.loader import TrainingData
from mis_jax.data.processor import Processor
from mis_jax.model.lora import is_adapter
from mis_jax.parallel.sharding import make_mesh
from mis_jax.train import lora
from mis_jax.train.compiled_step import make_train_program
from mis_jax.train.trainer import train


@pytest.fixture(scope="module")
def run(tiny_checkpoint, tiny_data):
    """What a run compiles, a function that gives its first state, and a batch."""
    config = run_of(tiny_checkpoint, tiny_data, tiny_data, train__steps=3)
    opened = open_checkpoint(config.model)
    program = make_train_program(config, opened.config, make_mesh(config.mesh), config.train.steps)
    data = TrainingData(config, Processor.from_folder(config.model, opened.config))
    batch = next(data.iterator(0, np.arange(config.train.global_batch))).batch
    return program, lambda: program.load(opened), batch


def test_what_is_dropped_depends_on_the_step(run):
    program, first, batch = run

    def loss(step: int) -> float:
        state = first()
        trainable = {  # adapters that add nothing would hide what they drop
            name: jnp.full_like(value, 0.1) if name.endswith("adapter.b") else value
            for name, value in state.trainable.items()
        }
        number = jnp.full_like(state.step, step)
        state = dataclasses.replace(state, trainable=trainable, step=number)
        return float(program.step(state, batch)[1]["loss"])

    assert loss(0) == loss(0) != loss(1)


def test_the_merged_model_answers_as_the_trained_one(run, tmp_path):
    """The projector is trained too and lies beside the factors."""
    program, first, batch = run
    config = program.config
    opened, state = open_checkpoint(config.model), first()
    for _ in range(2):
        state, _ = program.step(state, batch)
    folder = tmp_path / "adapter"
    lora.export(folder, state.trainable, config, opened)
    half = dataclasses.replace(
        config, train=dataclasses.replace(config.train, final_dtype="float16")
    )
    lora.export(tmp_path / "half", state.trainable, half, opened)
    files = (load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path / "half"))
    for (name, value), rounded in zip(next(files).items(), next(files).values(), strict=True):
        assert rounded.dtype == np.float16 and np.array_equal(rounded, value.astype(np.float16)), (
            name
        )
    content = json.loads((folder / "adapter_config.json").read_text())
    assert (content["r"], content["lora_alpha"], content["rank_pattern"]) == (RANK, 2 * RANK, {})
    assert content["modules_to_save"] == ["mlp1"]
    a = "base_model.model.language_model.model.layers.0.attention.wqkv.lora_A.weight"
    assert load_file(folder / "adapter_model.safetensors")[a].shape == (RANK, 32)
    merged = load(open_checkpoint(config.model, folder))
    one = jax.tree.map(lambda field: field[0], batch)

    @functools.partial(jax.jit, static_argnums=1)
    def logits(values, lora_config):
        return nnx_state.build(opened.config, values, lora=lora_config)(one)

    attached = logits(program.parameters(state), config.lora)
    assert np.abs(logits(merged.arrays, None) - attached).max() <= 1e-4
    assert np.abs(logits(load(opened).arrays, None) - attached).max() > 0.1
    with pytest.raises(ValueError, match=r"a LoRA adapter, no model; generate, .* --adapter "):
        open_checkpoint(folder)


@pytest.mark.slow
def test_a_run_goes_on_to_the_same_adapter(tiny_checkpoint, tiny_data, tmp_path):
    """Quantised base, what is dropped included: by seed, step and micro-batch alone."""
    outputs = tmp_path / "straight", tmp_path / "interrupted"
    changes = dict(
        lora=LoraConfig(rank=RANK, base="nf4"), train__steps=3, train__micro_batch=2,
        train__freeze=("vision", "projector", "language"),
    )  # fmt: skip
    for output in outputs:
        config = run_of(tiny_checkpoint, tiny_data, output, **changes)
        if output == outputs[1]:
            with pytest.raises(Crash):
                train(config, crash_at(3))
        trained = train(config)
        assert trained.model == output / "final"
        names = sorted(path.name for path in trained.model.iterdir())
        assert names == ["adapter_config.json", "adapter_model.safetensors"]
    for a, b in zip(*map(metrics_of, outputs), strict=True):
        assert a["loss"] == b["loss"]
    ours, theirs = (load_file(o / "final" / "adapter_model.safetensors") for o in outputs)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    config = dataclasses.replace(config, dtype=DtypeConfig())
    program = make_train_program(
        config, open_checkpoint(tiny_checkpoint).config, make_mesh(config.mesh), 3
    )
    gate = "text.layers.block.gate"
    assert f"{gate}.kernel" not in program.state.frozen
    for name, dtype in {
        f"{gate}.kernel.values": jnp.uint4,
        f"{gate}.kernel.scale": jnp.float32,
        "text.embedding": jnp.bfloat16,  # of compute: it is not written again
    }.items():
        assert program.state.frozen[name].dtype == dtype
    for name, value in program.state.trainable.items():
        assert value.dtype == jnp.float32 and is_adapter(name), name
