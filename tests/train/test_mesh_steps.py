"""Twenty steps on eight CPU devices are those of one device, on every kind of mesh."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mis_jax.checkpoint.nnx_state import abstract_model, flat
from mis_jax.config import MeshConfig
from mis_jax.model.family import FAMILY
from mis_jax.parallel.sharding import FSDP_TENSOR, make_mesh, padded_vocab, parameter_shardings

pytestmark = pytest.mark.slow

#: What a step of two micro-batches sends, by kind: instructions in the program for CPU devices
#: (a layer's stand once, in a loop). A change here is a change of what a pod's network carries.
COLLECTIVES = {
    "fsdp":
        {"all-gather": 49, "all-reduce": 7, "all-to-all": 2},
    "fsdp x tensor":
        {"all-gather": 76, "all-reduce": 27, "all-to-all": 9, "collective-permute": 11},
    "fsdp x context":
        {"all-gather": 63, "all-reduce": 16, "all-to-all": 6, "collective-permute": 2},
    "two slices":
        {"all-gather": 49, "all-reduce": 14, "all-to-all": 2},
    "all":
        {"all-gather": 71, "all-reduce": 38, "all-to-all": 6, "collective-permute": 13},
}  # fmt: skip


@pytest.fixture(scope="module")
def runs() -> dict:
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("mesh_runs.py"))],
        env=os.environ | {"XLA_FLAGS": flags.strip()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", COLLECTIVES)
def test_losses_and_parameters_are_those_of_one_device(runs, mesh):
    one, many = runs["one"], runs[mesh]
    assert len(one["losses"]) == len(many["losses"]) == 20
    np.testing.assert_allclose(many["losses"], one["losses"], rtol=1e-5)
    assert many["furthest"] <= 1e-5  # of any parameter, relative to its largest value
    assert one["losses"][-1] < one["losses"][0] - 0.2  # and it did learn
    assert many["programs"] == 1
    assert many["beyond"] == 0  # rows of the head that are no tokens


def test_splash_attention_on_a_mesh_of_all_axes(runs):
    np.testing.assert_allclose(runs["splash"]["losses"], runs["one"]["losses"][:2], rtol=1e-5)


@pytest.mark.skipif(not jax.__version__.startswith("0.10."), reason="counted with jax 0.10.2")
@pytest.mark.parametrize("mesh", COLLECTIVES)
def test_collectives_are_those_we_know(runs, mesh):
    assert runs[mesh]["collectives"] == COLLECTIVES[mesh]
    assert runs["one"]["collectives"] == {}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("internvl2_5-1b", dict(fsdp=64)),
        ("internvl2_5-1b", dict(fsdp=2, tensor=4)),  # 14 heads, two key heads
        ("internvl2_5-8b", dict(fsdp=8)),
        ("internvl2_5-8b", dict(fsdp=256)),
        ("internvl2_5-8b", dict(fsdp=64, tensor=4)),
        ("internvl2_5-78b", dict(fsdp=16)),
        ("internvl2_5-78b", dict(fsdp=64, tensor=4)),
    ],
    ids=str,
)
def test_no_large_parameter_is_whole_anywhere(name, sizes):
    """On meshes of up to 256 devices; the devices themselves are not needed."""
    config = FAMILY[name]
    model = abstract_model(config, vocab_rows=padded_vocab(config.text.vocab_size))
    shape = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1} | sizes
    mesh = jax.sharding.AbstractMesh(tuple(shape.values()), tuple(shape))
    places = parameter_shardings(model, mesh, FSDP_TENSOR)  # type: ignore[arg-type]
    for path, value in flat(model).items():
        held = 4 * np.prod(places[path].shard_shape(value.shape))
        whole = 4 * np.prod(value.shape)
        assert whole <= 1 << 20 or held < whole, path


def test_slices_must_be_those_that_there_are():
    class Device:
        def __init__(self, number: int):
            self.slice_index = number // 2

    with pytest.raises(ValueError, match=r"mesh.slices is 2, but the devices are 4 slices"):
        make_mesh(MeshConfig(slices=2), [Device(i) for i in range(8)])
