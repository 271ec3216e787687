"""The engine on eight devices that are made believe: the answers of one device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json
import sys

import jax
import numpy as np
from engine_runs import generate_tokens
from small_model import random_batch, random_model, tiny_config

from mis_jax.config import MeshConfig
from mis_jax.inference.engine import Engine
from mis_jax.model.unrolled import unrolled
from mis_jax.parallel.sharding import FSDP_TENSOR, make_mesh, parameter_shardings
from mis_jax.checkpoint import nnx_state

model = random_model(tiny_config(), seed=5)
batch = random_batch(np.random.default_rng(5), [5, 30, 3, 150, 9, 20], [2, 0, 1, 3, 0, 2])


def answers(model, **how):
    return generate_tokens(model, batch, max_new_tokens=20, **how).tokens


def on(mesh):
    places = parameter_shardings(model, mesh, FSDP_TENSOR)
    values = {
        name: jax.device_put(value, places[name]) for name, value in nnx_state.flat(model).items()
    }
    return nnx_state.build(model.config, values)


found = {"one": answers(model, max_num_seqs=2)}
for name, sizes in json.loads(sys.argv[1]).items():
    mesh = make_mesh(MeshConfig(**sizes))
    split = on(mesh)
    if name.startswith("written out"):
        split = unrolled(split)
    engine = Engine(split, stop_ids=(), decode=str, max_num_seqs=4)
    keys = engine._cache.keys[0] if isinstance(engine._cache.keys, tuple) else engine._cache.keys
    found[name] = [answers(split, max_num_seqs=4), [str(axis) for axis in keys.sharding.spec]]
print(json.dumps(found))
"""
MESHES = {
    "tensor": dict(fsdp=4, tensor=2),
    "written out": dict(data=2, fsdp=2, tensor=2),
    "written out, more shards than key heads": dict(fsdp=2, tensor=4),
}


@pytest.mark.slow
def test_answers_on_a_mesh_are_those_of_one_device() -> None:
    here = Path(__file__).parent
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(MESHES)],
        env=os.environ
        | {"XLA_FLAGS": flags.strip(), "PYTHONPATH": f"{here}:{here.parent}:{here.parent.parent}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len({tuple(row) for row in found["one"]}) > 3
    for name, sizes in MESHES.items():
        tokens, spec = found[name]
        assert tokens == found["one"], name
        assert "fsdp" in str(spec)
        assert ("tensor" in spec) == (sizes["tensor"] <= 2)
