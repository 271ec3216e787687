"""Loading onto a mesh: two processes of two devices each, every one reading its own slices."""

import json
from pathlib import Path

import numpy as np
import pytest
from several_processes import run_together
from tiny_models import random_checkpoint, tiny_config

from mis_jax.checkpoint.convert import write_checkpoint

MESHES = [{"fsdp": 4}, {"fsdp": 2, "tensor": 2}, {"data": 4}]
PROGRAM = """
import json
from pathlib import Path

import numpy as np

import mis_jax
from mis_jax import api
from mis_jax.config import MeshConfig
from mis_jax.parallel.sharding import make_mesh
from mis_jax.checkpoint import load, nnx_state

work, meshes = words
api.Processor.from_folder = lambda *arguments: None  # these folders hold no tokenizer
packed, values = load.packed, []


def watched(array, dtype, name):
    values.append(array.size)
    return packed(array, dtype, name)


load.packed = watched
found = []
for kind in ("internvl", "native"):
    for sizes in json.loads(meshes):
        values.clear()
        mesh = make_mesh(MeshConfig(**({"data": 1, "fsdp": 1, "tensor": 1, "context": 1} | sizes)))
        model, _ = mis_jax.load(Path(work) / kind, mesh=mesh)
        held, own = [], 0
        for name, array in nnx_state.flat(model).items():
            shards = {str(s.index): s for s in array.addressable_shards}.values()  # no copies
            for shard in shards:
                spans = [s.indices(n)[:2] for s, n in zip(shard.index, array.shape)]
                held.append([name, spans, np.asarray(shard.data).tobytes().hex()])
                own += shard.data.size
        found.append({"kind": kind, "mesh": sizes, "held": held, "own": own, "read": sum(values)})
(Path(work) / f"{process}.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_two_processes_read_what_they_need(rng, tmp_path):
    config = tiny_config("internlm2", vocab_size=68)
    start = random_checkpoint(config, rng, tmp_path / "start")
    for kind in ("internvl", "native"):
        write_checkpoint(start, tmp_path / kind, kind)
    total = sum(array.size for array in start.arrays.values())
    for first, second in zip(*run_both(tmp_path), strict=True):
        for process in (first, second):
            assert process["read"] == process["own"]  # nothing twice, nothing beyond its share
            if "data" in process["mesh"]:
                assert process["own"] == total
            else:
                assert process["own"] < 0.62 * total  # what no axis divides is held by both
        covered = {name: np.zeros(array.shape, bool) for name, array in start.arrays.items()}
        for name, spans, content in first["held"] + second["held"]:
            cut = tuple(slice(*span) for span in spans)
            assert start.arrays[name][cut].tobytes().hex() == content, name
            covered[name][cut] = True
        assert all(array.all() for array in covered.values())


def run_both(work: Path) -> list[list[dict]]:
    """What the two processes found, by kind and mesh."""
    run_together(PROGRAM, work, json.dumps(MESHES))
    return [json.loads((work / f"{i}.json").read_text()) for i in range(2)]
