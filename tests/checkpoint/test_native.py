"""The native format: orbax opens it, slices of it are read, and nothing more than they."""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import SingleDeviceSharding
from tiny_models import random_checkpoint, tiny_config

from mis_jax.checkpoint import native, nnx_state
from mis_jax.checkpoint.convert import write_checkpoint
from mis_jax.checkpoint.load import open_checkpoint


@pytest.fixture(params=["float32", "bfloat16", "float16"])
def start(request, rng, tmp_path):
    config = tiny_config("qwen2")
    checkpoint = random_checkpoint(config, rng, tmp_path / "start", request.param)
    write_checkpoint(checkpoint, tmp_path / "native", "native")
    return checkpoint


def test_orbax_opens_it(start, tmp_path):
    here = SingleDeviceSharding(jax.devices()[0])
    abstract = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=here)
        for name, array in start.arrays.items()
    }
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(tmp_path / "native" / "params", nnx_state.nested(abstract))
    for name, array in nnx_state.flattened(tree).items():
        assert np.asarray(array).tobytes() == start.arrays[name].tobytes(), name
    assert nnx_state.flattened(tree).keys() == start.arrays.keys()


def test_small_chunks(start, tmp_path, monkeypatch):
    """The same values whatever the chunks, and rows that cross their borders."""
    monkeypatch.setattr(native, "_CHUNK", 300)
    monkeypatch.setattr(native, "PIECE", 700)
    write_checkpoint(start, tmp_path / "small", "native")
    folder = tmp_path / "small" / "params" / "text.layers.block.gate.kernel"
    assert len(list(folder.glob("*.*.0"))) > 3 * 3
    source = open_checkpoint(tmp_path / "small").weights
    for name, array in start.arrays.items():
        stacked = ".layers.block." in name
        inner = array[1] if stacked else array
        layer = 1 if stacked else None
        assert source.read(name, layer).tobytes() == inner.tobytes(), name
        rows = slice(1, len(inner) - 1)
        assert source.read(name, layer, rows).tobytes() == inner[rows].tobytes(), name
