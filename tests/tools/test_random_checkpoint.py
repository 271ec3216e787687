"""The script that writes random checkpoints: sound files, reproducible, no two tensors alike."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from mis_jax.checkpoint import nnx_state
from mis_jax.checkpoint.inspect import inspect_checkpoint
from mis_jax.checkpoint.load import read_checkpoint
from mis_jax.checkpoint.parameter_source import layers_of
from mis_jax.model.family import FAMILY, published
from mis_jax.tokenizer.tokenizer import load_tokenizer

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import make_random_checkpoint as tool

#: Of the published tokenizers; InternVL3.5's and InternVL3-9B's are inferred (model/family.py).
IDS = {
    "internvl2_5-8b": {"<|im_end|>": 92542, "<|im_start|>": 92543, "<IMG_CONTEXT>": 92546},
    "internvl2_5-1b": {"<|im_start|>": 151644, "<|im_end|>": 151645, "<IMG_CONTEXT>": 151667},
    "internvl3-14b": {"<|endoftext|>": 151643, "<img>": 151665, "</box>": 151673},
    "internvl3_5-8b": {"<think>": 151667, "<img>": 151669, "<IMG_CONTEXT>": 151671},
    "internvl3-9b": {"<img>": 128512, "<IMG_CONTEXT>": 128514},
}
SMALL = dict(layers=2, vision_layers=2, shrink=16, vocabulary=1200, image_size=56)


@pytest.mark.parametrize("name", IDS)
def test_special_tokens_have_their_published_ids(name, tmp_path):
    tool.write_tokenizer(published(name), tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for token, i in IDS[name].items():
        assert tokenizer.token_id(token) == i, token


@pytest.mark.parametrize("name", ["internvl2_5-8b", "internvl3-78b", "internvl3_5-1b"])
@pytest.mark.parametrize("kind", ["internvl", "hf", "native"])
def test_what_it_writes_is_sound(name, kind, tmp_path):
    config = tool.cut(published(name), **SMALL)
    tool.write(config, tmp_path / "out", kind, dtype="bfloat16")
    found = inspect_checkpoint(tmp_path / "out")
    assert found["problems"] == [] and found["format"] == kind and found["dtype"] == "bfloat16"
    arrays = read_checkpoint(tmp_path / "out").arrays
    seen = set()
    for parameter, array in arrays.items():
        values = array.astype(np.float32)
        assert np.isfinite(values).all() and values.std() > 0
        for layer in layers_of(parameter, array.shape):
            seen.add((array if layer is None else array[layer]).tobytes())
    stacked = sum(len(list(layers_of(n, a.shape))) for n, a in arrays.items())
    assert len(seen) == stacked  # no two alike


@pytest.mark.parametrize("name", FAMILY)
def test_every_model_can_be_cut(name):
    config = tool.cut(published(name), **SMALL)
    assert config.text.num_heads == published(name).text.num_heads
    assert sum(nnx_state.count(config).values()) < 1e7


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    config = tool.cut(published("internvl2_5-2b"), **SMALL)
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        tool.write(config, tmp_path / folder, dtype="float32", seed=seed)
    a, b, c = ((tmp_path / n / "model.safetensors").read_bytes() for n in "abc")
    assert a == b and a != c and len(a) == len(c)


def test_rows_are_those_of_the_whole(monkeypatch):
    monkeypatch.setattr(tool, "_BLOCK", 64)
    config = tool.cut(published("internvl2_5-2b"), **SMALL)
    source = tool.RandomSource(config, "float32", 0)
    for name, layer in (("text.embedding", None), ("text.layers.block.gate.kernel", 1)):
        whole = source.read(name, layer)
        np.testing.assert_array_equal(source.read(name, layer, slice(3, 41)), whole[3:41])
    stacked = source.read("text.layers.block.gate.kernel")
    np.testing.assert_array_equal(stacked[1], source.read("text.layers.block.gate.kernel", 1))
    assert (whole.view(np.uint32) & 0xFFFF).any()  # every bit of a float32 is tested


def test_the_command(tmp_path, monkeypatch):
    words = "internvl3-1b OUT --format hf --layers 1 --vision-layers 1 --shrink 8 --vocabulary 900"
    words = words.replace("OUT", str(tmp_path / "out")).split()
    monkeypatch.setattr(sys, "argv", ["make_random_checkpoint.py", *words])
    tool.main()
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["model_type"] == "internvl" and raw["text_config"]["num_hidden_layers"] == 1
    with pytest.raises(ValueError, match="--shrink 3: does not divide"):
        tool.cut(published("internvl3-1b"), shrink=3)
