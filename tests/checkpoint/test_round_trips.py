"""import(export(x)) is x to the last bit, in every format, dtype and number of files."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_models import IMAGE_TOKEN, KINDS, TOWERS, assert_same, random_checkpoint, tiny_config

from mis_jax.checkpoint.convert import write_checkpoint
from mis_jax.checkpoint.load import find_problems, read_checkpoint


def through(checkpoint, folder, kind, **options):
    write_checkpoint(checkpoint, folder, kind, **options)
    assert find_problems(folder) == []
    return read_checkpoint(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["hf", "internvl"])
def test_published_layouts(layout, kind, tower, dtype, rng, tmp_path):
    start = random_checkpoint(tiny_config(kind, tower), rng, tmp_path / "start", dtype)
    whole = through(start, tmp_path / "whole", layout)
    assert_same(start, whole)
    assert [p.name for p in (tmp_path / "whole").glob("*.safetensors*")] == ["model.safetensors"]
    sharded = through(whole, tmp_path / "sharded", layout, shard_bytes=6000)
    assert_same(start, sharded)
    files = sorted(p.name for p in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"


def test_shards_keep_to_their_size(rng, tmp_path):
    start = random_checkpoint(tiny_config("llama"), rng, tmp_path / "start")
    write_checkpoint(start, tmp_path / "out", "hf", shard_bytes=8000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    total = 0
    for path in (tmp_path / "out").glob("*.safetensors"):
        tensors = load_file(path)
        size = sum(t.nbytes for t in tensors.values())
        assert size <= 8000 or len(tensors) == 1
        assert {index["weight_map"][name] for name in tensors} == {path.name}
        assert path.stat().st_mode & 0o777 == 0o644
        total += size
    assert index["metadata"]["total_size"] == total


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["internlm2", "qwen3"])
def test_native(kind, dtype, rng, tmp_path):
    start = random_checkpoint(tiny_config(kind, "rms_norm"), rng, tmp_path / "start", dtype)
    assert_same(start, through(start, tmp_path / "native", "native"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "chain", [("internvl", "hf", "internvl"), ("native", "internvl", "native")]
)
def test_chains(chain, kind, rng, tmp_path):
    """transformers has no field for the template, the thumbnail or InternLM2: they stay."""
    config = dataclasses.replace(
        tiny_config(kind), max_tiles=7, min_tiles=2, use_thumbnail=False, dynamic_tiles=False,
        template="internvl_zh", system_message="Only tell the truth.",
    )  # fmt: skip
    start = here = random_checkpoint(config, rng, tmp_path / "start", "bfloat16")
    for number, fmt in enumerate(chain):
        here = through(here, tmp_path / f"{number}", fmt)
        assert_same(start, here)
    first, last = (
        {p.name: p.read_bytes() for p in sorted(folder.glob("model*.safetensors"))}
        for folder in (tmp_path / "0", tmp_path / "2")
    )
    assert first == last


@pytest.mark.parametrize("kind", ["internlm2", "qwen2"])
def test_tied_head_comes_back_tied(kind, rng, tmp_path):
    """Also through the original layout, whose code never ties and so gets the head as a copy."""
    start = random_checkpoint(tiny_config(kind, tie_embeddings=True), rng, tmp_path / "start")
    here = through(start, tmp_path / "internvl", "internvl")
    assert_same(start, here)
    head = f"language_model.{'output' if kind == 'internlm2' else 'lm_head'}.weight"
    stored = load_file(tmp_path / "internvl" / "model.safetensors")
    assert stored[head].tobytes() == start.arrays["text.embedding"].tobytes()
    written = json.loads((tmp_path / "internvl" / "config.json").read_text())
    assert written["tie_word_embeddings"] and written["llm_config"]["tie_word_embeddings"]
    for number, fmt in enumerate(("hf", "native", "internvl")):
        here = through(here, tmp_path / f"{number}", fmt)
        assert_same(start, here)
    assert not any("head" in key for key in load_file(tmp_path / "0" / "model.safetensors"))


def test_head_of_its_own_under_a_config_that_calls_it_tied(rng, tmp_path):
    start = random_checkpoint(tiny_config("qwen2"), rng, tmp_path / "start")
    write_checkpoint(start, tmp_path / "hf", "hf")
    path = tmp_path / "hf" / "config.json"
    raw = json.loads(path.read_text())
    raw["tie_word_embeddings"] = True
    path.write_text(json.dumps(raw))
    assert_same(start, read_checkpoint(tmp_path / "hf"))


def test_dtype_of_choice(rng, tmp_path):
    start = random_checkpoint(tiny_config("qwen2"), rng, tmp_path / "start")
    for fmt in ("hf", "internvl", "native"):
        low = through(start, tmp_path / fmt, fmt, dtype="bfloat16")
        assert low.dtype == "bfloat16"
        back = read_checkpoint(tmp_path / fmt, dtype="float32")
        assert back.dtype == "float32"
        for name, array in start.arrays.items():
            rounded = array.astype(low.arrays[name].dtype)
            assert np.asarray(low.arrays[name]).tobytes() == rounded.tobytes()
            np.testing.assert_array_equal(back.arrays[name], rounded.astype(np.float32))
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert raw["dtype"] == "bfloat16"
    for build in (write_checkpoint, lambda c, d, k, dtype: read_checkpoint(tmp_path / "hf", dtype)):
        with pytest.raises(ValueError, match=r"dtype 'int8' is not supported; choose from float32"):
            build(start, tmp_path / "x", "hf", dtype="int8")


def test_float16_that_would_overflow_is_refused(rng, tmp_path):
    start = random_checkpoint(tiny_config("qwen2"), rng, tmp_path / "start")
    start.arrays["text.norm.scale"][3] = 1e6
    for fmt in ("hf", "native"):
        with pytest.raises(ValueError, match=r"norm.*beyond float16's 65504; choose bfloat16"):
            write_checkpoint(start, tmp_path / fmt, fmt, dtype="float16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["start"]


def test_companions_and_unknown_fields_go_along(rng, tmp_path):
    """Tokenizer files, token ids and fields we do not know survive; weights and caches do not."""
    start = random_checkpoint(tiny_config("internlm2"), rng, tmp_path / "start")
    write_checkpoint(start, tmp_path / "a", "internvl")
    path = tmp_path / "a" / "config.json"
    raw = json.loads(path.read_text())
    raw |= {"auto_map": {"AutoConfig": "x.Y"}, "system_message": None}
    raw["llm_config"] |= {"eos_token_id": 2, "pad_token_id": 2, "torch_dtype": "float32", "odd": 1}
    path.write_text(json.dumps(raw))
    for name in ("readme.txt", "generation_config.json", "chat_template.jinja"):
        (tmp_path / "a" / name).write_text("{}" if name.endswith(".json") else name)
    (tmp_path / "a" / "modeling.py").write_text("raise SystemExit")
    (tmp_path / "a" / "pytorch_model.bin").write_text("x")
    (tmp_path / "a" / "pytorch_model.bin.index.json").write_text("{}")

    write_checkpoint(read_checkpoint(tmp_path / "a"), tmp_path / "b", "native")
    write_checkpoint(read_checkpoint(tmp_path / "b"), tmp_path / "c", "internvl", dtype="bfloat16")
    kept = {p.name for p in (tmp_path / "c").iterdir()}
    text = {"readme.txt", "generation_config.json", "chat_template.jinja"}
    text |= {"added_tokens.json", "vocab.json", "merges.txt", "modeling.py"}
    assert kept == text | {"config.json", "model.safetensors"}
    back = json.loads((tmp_path / "c" / "config.json").read_text())
    assert back["auto_map"] == {"AutoConfig": "x.Y"} and back["llm_config"]["odd"] == 1
    assert back["torch_dtype"] == back["llm_config"]["torch_dtype"] == "bfloat16"
    assert back["image_token_id"] == IMAGE_TOKEN

    write_checkpoint(read_checkpoint(tmp_path / "b"), tmp_path / "d", "hf")
    hf = json.loads((tmp_path / "d" / "config.json").read_text())
    assert not (tmp_path / "d" / "modeling.py").exists() and "auto_map" not in hf
    assert (hf["text_config"]["eos_token_id"], hf["text_config"]["pad_token_id"]) == (2, 2)
    assert (
        json.loads((tmp_path / "d" / "processor_config.json").read_text())["image_seq_length"] == 4
    )


def test_progress_counts_bytes(rng, tmp_path):
    start = random_checkpoint(tiny_config("internlm2"), rng, tmp_path / "start")
    seen: list[tuple[int, int]] = []
    write_checkpoint(start, tmp_path / "out", "internvl", progress=lambda *p: seen.append(p))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert seen[0] == (0, size) and seen[-1] == (size, size)
    assert len(seen) == len(tensors) + 1 and seen == sorted(seen)
    seen.clear()
    read_checkpoint(tmp_path / "out", progress=lambda *p: seen.append(p))
    assert seen[-1] == (size, size) and seen == sorted(seen)
