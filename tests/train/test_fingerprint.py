"""The fingerprint of parameters: of every bit and its place, whatever the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_world import run_config

from mis_jax.checkpoint.convert import write_checkpoint
from mis_jax.checkpoint.load import read_checkpoint
from mis_jax.config import MeshConfig
from mis_jax.parallel.sharding import make_mesh
from mis_jax.train.fingerprint import fingerprint
from mis_jax.train.trainer import train


def test_it_changes_with_every_bit_and_place_and_with_no_mesh():
    values = np.random.default_rng(0).standard_normal((8, 6, 4)).astype(np.float32)
    arrays = {"a": jnp.asarray(values), "b": jnp.asarray(values, jnp.bfloat16)}
    found = fingerprint(arrays)
    flipped = values.copy()
    flipped.view(np.uint32)[3, 2, 1] ^= 1
    moved = values.copy()
    moved[[0, 1]] = moved[[1, 0]]
    others = [
        {"a": jnp.asarray(flipped), "b": arrays["b"]},
        {"a": jnp.asarray(moved), "b": arrays["b"]},
        {"b": arrays["a"], "a": arrays["b"]},
        {"a": arrays["a"].reshape(8, 4, 6), "b": arrays["b"]},
        {"a": arrays["a"]},
    ]
    assert len({found, *map(fingerprint, others)}) == 6
    nf4 = {"q": jnp.arange(16, dtype=jnp.uint4)}
    assert fingerprint(nf4) != fingerprint({"q": nf4["q"].at[3].set(4)})
    if jax.device_count() >= 2:
        mesh = make_mesh(MeshConfig(fsdp=-1))
        place = NamedSharding(mesh, PartitionSpec("fsdp"))
        assert fingerprint({n: jax.device_put(x, place) for n, x in arrays.items()}) == found


@pytest.mark.parametrize("rank", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_does_not_go_on_with_another_base_model(tiny_checkpoint, tiny_data, tmp_path, rank):
    """One bit of a vision weight, frozen by itself or under adapters."""
    base = read_checkpoint(tiny_checkpoint)
    model = tmp_path / "model"
    write_checkpoint(base, model, "native")
    changes: dict = dict(train__freeze=("vision",)) if not rank else dict(lora__rank=rank)
    config = run_config(
        model, tiny_data, tmp_path / "run", train__steps=2, train__save_every=1, **changes
    )

    def stop(step: int, steps: int, metrics: dict) -> None:
        if step == 2:  # the first one is saved
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(config, stop)
    name = next(n for n in base.arrays if n.startswith("vision.") and n.endswith("kernel"))
    value = np.array(base.arrays[name])
    value.view(f"u{value.itemsize}").reshape(-1)[5] ^= 1
    model.rename(tmp_path / "kept")
    write_checkpoint(
        type(base)(base.config, base.arrays | {name: value}, base.dtype, base.folder, base.source),
        model, "native",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"model .*/model: its parameters are not those"):
        train(config)
    model.rename(tmp_path / "changed")
    (tmp_path / "kept").rename(model)
    assert train(config).steps == 2
