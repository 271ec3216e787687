"""Two processes of two devices each: every one loads its rows, together they are the batch."""

import json

import numpy as np
import pytest
from several_processes import run_together
from tiny_world import run_config, write_yaml

from mis_jax.data.loader import TrainingData
from mis_jax.parallel import sharding

PROGRAM = """
import json
from pathlib import Path

import numpy as np

from mis_jax.config import MeshConfig, load_config
from mis_jax.data.loader import TrainingData
from mis_jax.data.processor import Processor
from mis_jax.parallel.sharding import held_rows, make_mesh, put_batch
from mis_jax.checkpoint.hf.config import read_config

path, out = map(Path, words)
config = load_config(path)
processor = Processor.from_folder(config.model, read_config(config.model)[0])
found = []
for sizes in ({"data": 2, "fsdp": 2}, {"fsdp": 2, "tensor": 2}, {"fsdp": 1, "tensor": 4}):
    mesh = make_mesh(MeshConfig(**({"data": 1, "fsdp": 1, "tensor": 1} | sizes)))
    rows = held_rows(mesh, config.train.global_batch, config.train.micro_batch)
    steps = TrainingData(config, processor).iterator(0, rows)
    batch = put_batch(next(steps).batch, mesh, accumulated=True)
    steps.close()
    whole = jax.jit(lambda x: x, out_shardings=jax.NamedSharding(mesh, jax.P()))(batch)
    fields = {n: np.asarray(getattr(whole, n)) for n in ("input_ids", "tiles", "tile_mask")}
    found.append({"rows": rows.tolist(), **{n: [f.shape, int(f.astype(np.int64).sum()),
        f.astype(np.uint8).tobytes().hex()[::97]] for n, f in fields.items()}})
(out / f"{process}.json").write_text(json.dumps(found))
"""


class Placed:
    """Stands for the sharding of a batch as one of several processes sees it."""

    def __init__(self, *held: slice):
        self._held = held

    def addressable_devices_indices_map(self, shape):
        return {device: (rows,) for device, rows in enumerate(self._held)}


def test_no_two_hosts_hold_the_same_rows(monkeypatch):
    """Two hosts of two devices; micro-batches of 4 rows, of which a device has one."""
    found = []
    for held in ((slice(0, 1), slice(1, 2)), (slice(2, 3), slice(3, 4))):
        placed = Placed(*held)
        monkeypatch.setattr(sharding, "batch_sharding", lambda mesh, placed=placed: placed)
        found.append(sharding.held_rows(None, 8, micro_batch=4).tolist())
    assert found == [[0, 1, 4, 5], [2, 3, 6, 7]]


@pytest.mark.slow
def test_each_process_loads_its_rows(tiny_checkpoint, tiny_data, tiny_processor, tmp_path):
    config = run_config(
        tiny_checkpoint, tiny_data, tmp_path / "run", train__global_batch=8, train__micro_batch=4
    )
    path = write_yaml(config, tmp_path / "run.yaml")
    run_together(PROGRAM, path, tmp_path)
    steps = TrainingData(config, tiny_processor).iterator()
    batch = next(steps).batch
    steps.close()
    first, second = (json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2))
    held = [sorted(a["rows"] + b["rows"]) for a, b in zip(first, second, strict=True)]
    assert held[:2] == [list(range(8))] * 2  # each row on one process
    assert first[2]["rows"] == second[2]["rows"] == list(range(8))  # tensor axis over both
    for mesh in (*first, *second):
        for name in ("input_ids", "tiles", "tile_mask"):
            field = np.asarray(getattr(batch, name))
            shape, total, bits = mesh[name]
            assert shape == list(field.shape)
            assert total == field.astype(np.int64).sum()
            assert bits == field.astype(np.uint8).tobytes().hex()[::97]
