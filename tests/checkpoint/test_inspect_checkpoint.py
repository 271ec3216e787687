"""`inspect` tells what a folder holds from its headers alone."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import random_checkpoint, tiny_config

from mis_jax.checkpoint import nnx_state, safetensors_reader
from mis_jax.checkpoint.convert import write_checkpoint
from mis_jax.checkpoint.inspect import inspect_checkpoint


@pytest.fixture(params=["hf", "internvl", "native"])
def format_and_folder(request, rng, tmp_path):
    start = random_checkpoint(tiny_config("qwen3", "rms_norm"), rng, tmp_path / "start")
    write_checkpoint(
        start, tmp_path / "out", request.param, dtype="bfloat16", shard_bytes=20_000
    )  # fmt: skip
    return request.param, tmp_path / "out"


def test_what_it_tells(format_and_folder, monkeypatch):
    def no_reading(*args):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(safetensors_reader.Shards, "read", no_reading)
    monkeypatch.setattr("mis_jax.checkpoint.native.NativeSource.read", no_reading)
    fmt, folder = format_and_folder
    found = inspect_checkpoint(folder)
    assert json.loads(json.dumps(found)) == found
    counts = nnx_state.count(tiny_config("qwen3", "rms_norm"))
    total = sum(counts.values())
    assert found["format"] == fmt and found["path"] == str(folder)
    assert found["parameters"] == counts | {"total": total}
    assert found["dtype"] == "bfloat16" and found["dtypes"] == {"bfloat16": total}
    assert found["bytes"] > found["weight_bytes"] > (0.5 if fmt == "native" else 2) * total
    assert found["weight_files"] > 1
    assert found["text"]["kind"] == "qwen3" and found["vision"]["norm"] == "rms_norm"
    assert (found["tokens_per_tile"], found["max_tiles"], found["image_token_id"]) == (4, 12, 60)
    assert found["template"] == "internvl2_5" and found["system_message"] is None
    qwen = {"added_tokens.json", "vocab.json", "merges.txt"}
    ready = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    files = qwen if fmt != "hf" else qwen - {"added_tokens.json"} | ready
    assert set(found["tokenizer_files"]) == files
    assert found["problems"] == []


def test_trouble_with_the_weights_is_listed(rng, tmp_path):
    start = random_checkpoint(tiny_config("llama"), rng, tmp_path / "start")
    write_checkpoint(start, tmp_path / "out", "hf")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    del tensors["language_model.model.norm.weight"]
    save_file(tensors | {"odd": np.ones(3, np.float32)}, path)
    found = inspect_checkpoint(tmp_path / "out")
    assert found["problems"] == [
        "missing tensor 'language_model.model.norm.weight' (24,)",
        "unexpected tensor 'odd' (3,)",
    ]
    path.write_bytes(b"no")
    found = inspect_checkpoint(tmp_path / "out")
    assert len(found["problems"]) == 1 and "not a whole safetensors" in found["problems"][0]
    assert (found["dtype"], found["dtypes"], found["weight_files"]) == (None, {}, 0)
    with pytest.raises(ValueError, match="no such folder"):
        inspect_checkpoint(tmp_path / "nowhere")
