"""Twenty steps on each of several meshes of eight CPU devices; prints what came of it as JSON.

Started by test_mesh_steps.py as a program of its own, as a process has one set of devices.
"""

import dataclasses
import json
import re
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mis_jax.config import (
    DataConfig,
    DtypeConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    Source,
    TrainConfig,
)
from mis_jax.model.batch import Batch
from mis_jax.model.config import InternVLConfig, TextConfig, VisionConfig
from mis_jax.parallel.sharding import make_mesh, put_batch
from mis_jax.train.compiled_step import TrainProgram, make_train_program
from mis_jax.train.step import TrainState

STEPS, ROWS, LENGTH, TILES = 20, 8, 64, 2
MODEL = InternVLConfig(
    vision=VisionConfig(hidden_size=32, num_layers=2, num_heads=2, mlp_size=64, image_size=56),
    text=TextConfig(
        kind="internlm2", vocab_size=301, hidden_size=64, num_layers=2, num_heads=8,
        num_kv_heads=2, mlp_size=128, head_dim=16,
    ),
    image_token_id=300,
)  # fmt: skip
MESHES = {
    "one": MeshConfig(),
    "fsdp": MeshConfig(fsdp=8),
    "fsdp x tensor": MeshConfig(fsdp=2, tensor=4),  # more shards than key heads
    "fsdp x context": MeshConfig(fsdp=4, context=2),
    "two slices": MeshConfig(fsdp=4, slices=2),
    "all": MeshConfig(fsdp=2, tensor=2, context=2),
}


def run_config(mesh: MeshConfig, **train) -> RunConfig:
    steps = dict(steps=STEPS, global_batch=2 * ROWS, micro_batch=ROWS)
    return RunConfig(
        Path("unused"),
        Path("unused"),
        DataConfig(sources=(Source("mis", root=Path("unused")),)),
        TrainConfig(**({"remat": "full"} | train), **steps),
        optimizer=OptimizerConfig(learning_rate=1e-3, eps=1e-4, warmup_ratio=0.0),
        mesh=mesh,
        dtype=DtypeConfig(compute="float32"),
    )


def random_batch(rng: np.random.Generator) -> Batch:
    """Two micro-batches of packed rows, each row with two samples and two tiles."""
    ids = rng.integers(0, 300, (2, ROWS, LENGTH)).astype(np.int32)
    ids[..., 3:7] = ids[..., 33:37] = MODEL.image_token_id
    ends = rng.integers(40, LENGTH, (2, ROWS, 1))
    place = np.broadcast_to(np.arange(LENGTH), ids.shape)
    segments = np.where(place < 30, 1, 2) * (place < ends)
    positions = np.where(place < 30, place, place - 30)
    weights = rng.random(ids.shape) * (rng.random(ids.shape) < 0.4) * (segments > 0)
    tiles = rng.integers(0, 256, (2, ROWS * TILES, 56, 56, 3)).astype(np.uint8)
    return Batch(
        ids,
        positions.astype(np.int32),
        segments.astype(np.int32),
        weights.astype(np.float32),
        tiles,
        np.ones(tiles.shape[:2], bool),
    )  # type: ignore[arg-type]


def initial_state(program: TrainProgram) -> TrainState:
    """Random values that do not depend on the mesh; rows that are no tokens are zero."""

    def filled(name: str, like: jax.ShapeDtypeStruct) -> jax.Array:
        rng = np.random.default_rng(len(name) * 1000 + sum(map(ord, name)))
        value = rng.normal(0, 0.1, like.shape).astype(np.float32)
        if name.endswith("scale"):
            value += 1
        if name in ("text.embedding", "text.head"):
            value[MODEL.text.vocab_size :] = 0
        return jax.device_put(value, like.sharding)

    state = program.state
    trainable = {n: filled(n, x) for n, x in state.trainable.items()}
    frozen = {n: filled(n, x) for n, x in state.frozen.items()}
    shardings = jax.tree.map(lambda x: x.sharding, state)
    optimizer = jax.jit(program.transform.init, out_shardings=shardings.optimizer)(trainable)
    return TrainState(
        jax.device_put(jnp.int32(0), shardings.step),
        trainable,
        frozen,
        optimizer,
        jax.device_put(jnp.float32(0), shardings.grad_norm_ema),
    )


def collectives(text: str) -> dict[str, int]:
    """How many of each kind a compiled program has."""
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    return dict(sorted(Counter(re.findall(rf"= \S.* ({kinds})(?:-start)?\(", text)).items()))


def run(mesh_config: MeshConfig, steps: int, **train) -> dict:
    config = run_config(mesh_config, **train)
    count = 1 if mesh_config == MESHES["one"] else 8
    mesh = make_mesh(config.mesh, jax.devices()[:count])
    program = make_train_program(config, MODEL, mesh, STEPS)
    state, rng = initial_state(program), np.random.default_rng(0)
    losses, text = [], ""
    with jax.set_mesh(mesh):
        for _ in range(steps):
            batch = put_batch(random_batch(rng), mesh, accumulated=True)
            if not text:
                text = program.step.lower(state, batch).compile().as_text()
            state, metrics = program.step(state, batch)
            losses.append(float(metrics["loss"]))
    return {
        "losses": losses,
        "parameters": {n: np.asarray(x) for n, x in program.parameters(state).items()},
        "beyond": float(sum(np.abs(state.trainable[n][301:]).sum() for n in ("text.head",))),
        "collectives": collectives(text),
        "programs": program.step._cache_size(),
        "shapes": {n: x.sharding.spec for n, x in state.trainable.items()},
    }


def main() -> None:
    found = {name: run(mesh, STEPS) for name, mesh in MESHES.items()}
    found["splash"] = run(MESHES["all"], 2, attention="splash")
    one = found["one"].pop("parameters")
    for outcome in found.values():
        others = outcome.pop("parameters", one)
        outcome.pop("shapes")
        outcome["furthest"] = max(
            float(np.abs(others[n] - one[n]).max() / np.abs(one[n]).max()) for n in one
        )
    print(json.dumps(found))


if __name__ == "__main__":
    assert dataclasses.is_dataclass(MODEL) and len(sys.argv) == 1
    main()
