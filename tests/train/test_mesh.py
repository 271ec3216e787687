"""Sharding rules, and the same run on one device and on meshes of eight."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mis_jax.config import MeshConfig
from mis_jax.parallel.sharding import AXES, FSDP, FSDP_TENSOR, REPLICATED, Rules, make_mesh

PROGRAM = """
import json, sys
from pathlib import Path

tests, checkpoint, data, work = sys.argv[1:]
sys.path.insert(0, tests)
import jax
from tiny_world import read_lines, run_config

from mis_jax.config import MeshConfig
from mis_jax.train import compiled_step, trainer

make_step, make_mesh = compiled_step.make_train_step, trainer.make_mesh
trees, programs = [], []


def watched(*arguments, **options):
    step = make_step(*arguments, **options)

    def run(state, batch):
        before = jax.tree.map(lambda x: x.sharding, state)
        after, metrics = step(state, batch)
        trees.append((before, jax.tree.map(lambda x: x.sharding, after), after))
        programs.append(step._cache_size())
        return after, metrics

    return run


def shares(tree):  # of every array, the part of it that one device holds
    return {n: x.addressable_shards[0].data.size / x.size for n, x in tree.items()}


class Crash(Exception):
    pass


def crash(done, *_):
    if done == 2:
        raise Crash


compiled_step.make_train_step = watched
found = {}
meshes = {"1": (1, 1, 1), "fsdp 8": (1, 8, 1), "2 2 2": (2, 2, 2)}
for name, sizes in meshes.items():
    count = sizes[0] * sizes[1] * sizes[2]
    trainer.make_mesh = lambda config: make_mesh(config, jax.devices()[:count])
    trees.clear(), programs.clear()
    config = run_config(
        Path(checkpoint), Path(data), Path(work) / name, mesh=MeshConfig(*sizes),
        train__steps=3, train__global_batch=8, train__save_every=1, train__freeze=("vision",),
    )
    if name == "2 2 2":  # and it goes on from a checkpoint
        try:
            trainer.train(config, crash)
        except Crash:
            trainer.train(config)
    else:
        trainer.train(config)
    before, after, state = trees[-1]
    adam = state.optimizer[1]
    found[name] = {
        "metrics": read_lines(config.output / "metrics.jsonl"),
        "shares": shares(state.trainable | state.frozen),
        "moments": [shares(adam.mu), shares(adam.nu)],
        "trainable": sorted(state.trainable),
        "same shardings": jax.tree.map(str, before) == jax.tree.map(str, after),
        "programs": max(programs),
        "devices": len(state.step.sharding.device_set),
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def runs(tiny_checkpoint, tiny_data, tmp_path_factory) -> dict:
    """The same three steps on three meshes, in a process that sees eight devices."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    work = tmp_path_factory.mktemp("meshes")
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, (tests, tiny_checkpoint, tiny_data, work))],
        env=os.environ | {"XLA_FLAGS": flags.strip()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp 8", "2 2 2"])
def test_every_mesh_computes_the_same(runs, mesh):
    one, many = runs["1"], runs[mesh]
    assert (one["devices"], many["devices"]) == (1, 8)
    assert [line["step"] for line in many["metrics"]] == [1, 2, 3]
    for a, b in zip(one["metrics"], many["metrics"], strict=True):
        for name in ("loss", "grad_norm", "param_norm", "learning_rate"):
            np.testing.assert_allclose(b[name], a[name], rtol=1e-5)
        assert (b["tokens"], b["loss_tokens"]) == (a["tokens"], a["loss_tokens"])
    assert one["metrics"][0]["loss"] != one["metrics"][2]["loss"]


@pytest.mark.slow
def test_parameters_and_moments_really_are_split(runs):
    assert set(runs["1"]["shares"].values()) == {1}
    for mesh, name, share in (
        ("fsdp 8", "text.layers.block.gate.kernel", 1 / 8),
        ("2 2 2", "text.layers.block.gate.kernel", 1 / 4),  # rows over fsdp, columns over tensor
        ("2 2 2", "vision.layers.block.up.kernel", 1 / 4),  # frozen parts too
        ("fsdp 8", "text.embedding", 1 / 8),
    ):
        assert runs[mesh]["shares"][name] == pytest.approx(share), (mesh, name)
    for run in runs.values():
        for moments in run["moments"]:
            assert moments == {name: run["shares"][name] for name in run["trainable"]}


@pytest.mark.slow
def test_a_step_leaves_every_array_where_it_was_and_compiles_once(runs):
    for mesh, run in runs.items():
        assert run["same shardings"], mesh
        assert run["programs"] == 1, mesh


def mesh_of(**sizes: int):
    """Stands for a mesh: rules only ask for the sizes of its axes."""
    shape = dict.fromkeys(AXES, 1) | sizes
    return type("Shape", (), {"shape": shape})()


def test_rules_split_what_divides_and_leave_the_rest_whole():
    mesh = mesh_of(fsdp=4, tensor=2)
    rows, columns = ("vocab", "embed"), (92553, 64)
    assert FSDP_TENSOR.spec(rows, columns, mesh) == P(None, "fsdp")  # 92553 is odd
    assert FSDP_TENSOR.spec(rows, (92554, 64), mesh) == P("tensor", "fsdp")
    assert FSDP_TENSOR.spec(rows, (92554, 6), mesh) == P("tensor")
    assert FSDP_TENSOR.spec(("layers", None, "unknown"), (2, 4, 4), mesh) == P()
    assert FSDP.spec(rows, (92554, 64), mesh) == P(None, "fsdp")
    assert REPLICATED.spec(rows, (92554, 64), mesh) == P()


def test_an_axis_of_one_device_splits_nothing():
    assert FSDP_TENSOR.spec(("embed", "mlp"), (64, 64), mesh_of(fsdp=4)) == P("fsdp")


def test_two_dimensions_on_one_mesh_axis_are_refused():
    rules = Rules({"embed": "fsdp", "mlp": "fsdp"})
    with pytest.raises(ValueError, match=r"two of the dimensions \('embed', 'mlp'\)"):
        rules.spec(("embed", "mlp"), (7, 7), mesh_of(fsdp=4))  # even where neither would be split
    assert rules.spec(("embed", "other"), (8, 8), mesh_of(fsdp=4)) == P("fsdp")


def test_every_parameter_of_the_family_has_a_spec():
    from mis_jax.checkpoint.nnx_state import abstract_model
    from mis_jax.model.family import FAMILY
    from mis_jax.parallel.sharding import parameter_shardings

    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    for name in ("internvl2_5-1b", "internvl2_5-78b", "internvl3_5-8b"):
        model = abstract_model(FAMILY[name])
        assert parameter_shardings(model, mesh, FSDP_TENSOR)


DEVICES = [object()] * 8  # make_mesh refuses before it looks at them


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(data=-1, fsdp=-1), "at most one axis may be -1"),
        (dict(data=3, fsdp=-1), r"does not fit 8 device\(s\)"),
        (dict(data=2, fsdp=2), r"'data': 2, 'fsdp': 2.* does not fit 8 device\(s\)"),
        (dict(data=4, fsdp=4), "does not fit"),
    ],
)
def test_meshes_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(MeshConfig(**sizes), DEVICES)


def test_one_axis_takes_the_rest():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert dict(mesh.shape) == dict.fromkeys(AXES, 1)
