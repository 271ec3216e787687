"""Key forms and the grouped projection, each checked against a formula written another way."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import KINDS, TOWERS, assert_same, random_checkpoint, tiny_config

from mis_jax.checkpoint import nnx_state
from mis_jax.checkpoint.convert import write_checkpoint
from mis_jax.checkpoint.load import find_problems, read_checkpoint
from mis_jax.checkpoint.mapping import rules


def in_memory_key(key: str) -> str:
    """transformers' on-disk key -> that of `model.state_dict()`, in transformers 5."""
    if key == "language_model.lm_head.weight":
        return "lm_head.weight"
    if key.startswith("language_model.model."):
        return "model.language_model." + key[len("language_model.model.") :]
    return "model." + key


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_in_memory_keys_of_transformers(kind, rng, tmp_path):
    start = random_checkpoint(tiny_config(kind, "rms_norm"), rng, tmp_path / "start")
    write_checkpoint(start, tmp_path / "hf", "hf")
    path = tmp_path / "hf" / "model.safetensors"
    stored = load_file(path)
    assert "language_model.lm_head.weight" in stored
    save_file({in_memory_key(key): value for key, value in stored.items()}, path)
    assert_same(start, read_checkpoint(tmp_path / "hf"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("layout", ["hf", "internvl"])
def test_tables_cover_every_parameter_once(layout, tower, kind):
    config = tiny_config(kind, tower)
    table = rules(layout, config)
    ours = [name for rule in table for name in rule.ours]
    assert sorted(ours) == sorted(nnx_state.shapes(config))
    assert len({rule.theirs for rule in table}) == len(table)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 3), (4, 4), (4, 1)])
def test_grouped_qkv_row_by_row(heads, kv_heads, rng, tmp_path):
    """Row r of wqkv: group r // ((G + 2) d); in it G query heads, one key head, one value head."""
    config = tiny_config("internlm2", num_heads=heads, num_kv_heads=kv_heads)
    start = random_checkpoint(config, rng, tmp_path / "start")
    write_checkpoint(start, tmp_path / "out", "internvl")
    wqkv = load_file(tmp_path / "out" / "model.safetensors")[
        "language_model.model.layers.1.attention.wqkv.weight"
    ]
    d, group = config.text.head_dim, heads // kv_heads
    assert wqkv.shape == ((heads + 2 * kv_heads) * d, config.text.hidden_size)
    q, k, v = (start.arrays[f"text.layers.block.attention.{p}.kernel"][1] for p in "qkv")
    for row in range(len(wqkv)):
        kv_head, within = divmod(row, (group + 2) * d)
        member, channel = divmod(within, d)
        if member < group:
            expected = q[:, (kv_head * group + member) * d + channel]
        else:
            expected = (k if member == group else v)[:, kv_head * d + channel]
        np.testing.assert_array_equal(wqkv[row], expected)


def test_rotary_buffers_of_old_checkpoints_are_ignored(rng, tmp_path):
    start = random_checkpoint(tiny_config("llama"), rng, tmp_path / "start")
    for layout in ("internvl", "hf"):
        write_checkpoint(start, tmp_path / layout, layout)
        path = tmp_path / layout / "model.safetensors"
        buffer = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
        save_file(load_file(path) | {buffer: np.ones(3, np.float32)}, path)
        assert find_problems(tmp_path / layout) == []
        assert_same(start, read_checkpoint(tmp_path / layout))


def test_files_outside_the_index_are_left_alone(rng, tmp_path):
    """Such as an adapter or an optimizer's state beside the shards."""
    start = random_checkpoint(tiny_config("llama"), rng, tmp_path / "start")
    write_checkpoint(start, tmp_path / "out", "hf", shard_bytes=20_000)
    save_file({"other": np.ones(2, np.float32)}, tmp_path / "out" / "adapter_model.safetensors")
    assert_same(start, read_checkpoint(tmp_path / "out"))
