"""Broken input ends in one ValueError naming file, field and remedy; nothing half-written stays."""

import errno
import itertools
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import assert_same, random_checkpoint, tiny_config

from mis_jax.checkpoint.convert import convert, write_checkpoint
from mis_jax.checkpoint.hf.config_writer import native_json
from mis_jax.checkpoint.load import find_problems, open_checkpoint, read_checkpoint

ATTENTION = "language_model.model.layers.1.self_attn"


@pytest.fixture
def start(rng, tmp_path):
    return random_checkpoint(tiny_config("llama"), rng, tmp_path / "start")


@pytest.fixture
def folder(start, tmp_path):
    """A sound checkpoint in the original layout, to be broken."""
    write_checkpoint(start, tmp_path / "folder", "internvl")
    return tmp_path / "folder"


def change_config(folder, change):
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def error_of(folder) -> str:
    """The message of reading, which `find_problems` must know as well."""
    with pytest.raises(ValueError, match=re.escape(str(folder))) as info:
        read_checkpoint(folder)
    assert find_problems(folder)
    return str(info.value)


def test_every_tensor_that_does_not_fit_in_one_error(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["mlp1.0.bias"], tensors[f"{ATTENTION}.q_proj.weight"]
    tensors["language_model.model.layers.7.mlp.up_proj.weight"] = np.ones((2, 2), np.float32)
    tensors["vision_model.head"] = np.ones(3, np.float32)
    tensors[f"{ATTENTION}.k_proj.weight"] = np.ones((5, 24), np.float32)
    tensors["mlp1.1.bias"] = np.ones(24, np.int32)
    save_file(tensors, path)
    message = error_of(folder)
    assert message.startswith(f"{folder}: 6 problems with its tensors; weights and config.json")
    assert set(message.splitlines()[1:]) == {
        "  missing tensor 'mlp1.0.bias' (64,)",
        f"  missing tensor '{ATTENTION}.q_proj.weight' (24, 24)",
        "  unexpected tensor 'language_model.model.layers.7.mlp.up_proj.weight' (2, 2)",
        "  unexpected tensor 'vision_model.head' (3,)",
        f"  tensor '{ATTENTION}.k_proj.weight' has shape (5, 24), config.json asks for (12, 24)",
        "  tensor 'mlp1.1.bias' has dtype I32; supported: F32, BF16, F16",
    }
    assert len(find_problems(folder)) == 6


def test_one_problem_takes_one_line(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["language_model.model.norm.weight"]
    save_file(tensors, path)
    message = error_of(folder)
    assert "\n" not in message
    assert "missing tensor 'language_model.model.norm.weight' (24,); weights and config" in message


def test_a_long_list_is_told_layer_by_layer(rng, tmp_path):
    start = random_checkpoint(tiny_config("llama", num_layers=12), rng, tmp_path / "start")
    write_checkpoint(start, tmp_path / "out", "internvl")
    change_config(tmp_path / "out", lambda raw: raw["llm_config"].update(intermediate_size=44))
    message = error_of(tmp_path / "out")
    assert message.count("\n") == 36  # 3 x 12 tensors, each by name
    change_config(tmp_path / "out", lambda raw: raw["llm_config"].update(hidden_size=28))
    lines = error_of(tmp_path / "out").splitlines()
    assert len(lines) < 25
    name = "language_model.model.layers.{i}.mlp.up_proj.weight"
    wanted = f"  tensor '{name}' has shape (40, 24), config.json asks for (44, 28) for i in 0-11"
    assert wanted in lines


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model_type="llava"), r"config.json: field 'model_type' is 'llava'; supported: 'int"),
        (dict(model_type=None), r"field 'model_type' is None"),
        (dict(vision_config=None), r"field 'vision_config' is missing"),
        (dict(llm_config=[1]), r"field 'llm_config' is \[1\]; supported: a JSON object"),
        (dict(downsample_ratio=0.3), r"field 'downsample_ratio' is 0.3; supported: 1/n"),
        (dict(ps_version="v3"), r"field 'ps_version' is 'v3'; supported: 'v1', 'v2'"),
        (dict(force_image_size=448), r"field 'force_image_size' is 448; supported: 56"),
        (dict(pad2square=True), r"field 'pad2square' is True; supported: False"),
        (dict(select_layer=-9), r"field 'select_layer' is -9"),
        (dict(max_dynamic_patch="12"), r"'max_dynamic_patch' is '12'; supported: a whole number"),
        (dict(image_token_id=90), None),  # the tokenizer's word counts
    ],
)
def test_config_at_the_top(change, message, folder):
    change_config(folder, lambda raw: raw.update(change))
    if message is None:
        assert find_problems(folder) == []
        return
    with pytest.raises(ValueError, match=message) as info:
        read_checkpoint(folder)
    assert str(folder / "config.json") in str(info.value) and "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"]),
            r"'llm_config.architectures' is \['Qwen3MoeForCausalLM'\]; .*no mixture of experts",
        ),
        (
            dict(model_type="qwen3_moe", architectures=None),
            "'llm_config.model_type' is 'qwen3_moe'",
        ),
        (dict(model_type="qwen3_moe"), "'llm_config.model_type' is 'qwen3_moe'; .*no mixture"),
        (dict(model_type="gpt_oss", architectures=["GptOssForCausalLM"]), "no gpt-oss"),
        (dict(model_type="qwen2"), "'llm_config.model_type' is 'qwen2'; .*'LlamaForCausalLM'"),
        (dict(model_type=None, architectures=None), "'llm_config.model_type' is None"),
        (dict(hidden_size="24"), "'llm_config.hidden_size' is '24'; supported: a whole number"),
        (dict(num_hidden_layers=None), "'llm_config.num_hidden_layers' is missing"),
        (dict(hidden_act="gelu"), "'llm_config.hidden_act' is 'gelu'; supported: 'silu'"),
        (dict(use_sliding_window=True), "'llm_config.use_sliding_window' is True"),
        (dict(rope_scaling={"type": "yarn"}), "'llm_config.rope_scaling.type' is 'yarn'"),
        (dict(rope_scaling={"type": "dynamic"}), "'llm_config.rope_scaling.factor' is missing"),
        (
            dict(num_key_value_heads=3),
            "config.json: text num_kv_heads 3 does not divide num_heads 4",
        ),
        (dict(vocab_size=50), "the id of <IMG_CONTEXT> is 60, outside the vocabulary of 50"),
    ],
)
def test_config_of_the_language_model(change, message, folder):
    change_config(folder, lambda raw: raw["llm_config"].update(change))
    with pytest.raises(ValueError, match=message) as info:
        read_checkpoint(folder)
    assert str(folder / "config.json") in str(info.value) and "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu_pytorch_tanh"),
        ("norm_type", "batch_norm"),
        ("image_size", [56, 28]),
        ("num_attention_heads", 0),
        ("qkv_bias", "yes"),
    ],
)
def test_config_of_the_tower(field, value, folder):
    change_config(folder, lambda raw: raw["vision_config"].update({field: value}))
    assert f"field 'vision_config.{field}' is {value!r}; supported: " in error_of(folder)


def test_missing_folder_and_missing_config(tmp_path):
    assert error_of(tmp_path / "no").endswith(
        "no such folder; give the folder that holds config.json"
    )
    assert f"{tmp_path / 'config.json'}: no such file" in error_of(tmp_path)


def test_what_people_give_in_the_place_of_a_folder(folder, tmp_path, monkeypatch):
    """A hub id, a cache's folder, a file: what it is, and what to give."""
    monkeypatch.chdir(tmp_path)
    hub_id = "OpenGVLab/InternVL2_5-8B"
    assert (
        f"hf download {hub_id} --local-dir checkpoints/InternVL2_5-8B, then give checkpoints/"
        in error_of(Path(hub_id))
    )
    assert "download" not in error_of(folder.parent / "OpenGVLab")
    cache = tmp_path / "hub" / "models--OpenGVLab--InternVL2_5-8B"
    (cache / "snapshots").mkdir(parents=True)
    shutil.copytree(folder, cache / "snapshots" / "0a1b")
    assert error_of(cache).endswith(f"give {cache / 'snapshots' / '0a1b'}")
    assert "models--OWNER--NAME/snapshots/HASH" in error_of(cache.parent)
    assert error_of(folder / "model.safetensors").endswith(f"holds config.json: {folder}")
    other = tmp_path / "llama.cpp"
    other.mkdir()
    (other / "InternVL2_5-8B-Q4_K_M.gguf").write_bytes(b"GGUF")
    for given in (other, other / "InternVL2_5-8B-Q4_K_M.gguf"):
        assert "GGUF files are llama.cpp's; give a folder" in error_of(given)


@pytest.mark.parametrize("section", [None, "llm_config"])
def test_quantized_weights_in_one_line(section, folder):
    quantized = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    change_config(folder, lambda raw: (raw[section] if section else raw).update(quantized))
    message = error_of(folder)
    field = f"{section}.quantization_config" if section else "quantization_config"
    assert f"field '{field}' says that the weights are quantized ('awq')" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_pointer_of_git_lfs(name, folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 4976698672\n"
    (folder / name).write_text(pointer)
    assert error_of(folder).startswith(f"{folder / name}: a pointer of Git LFS in the place")


@pytest.mark.parametrize(
    "content", ["{", "", "[1]", "null", '"internvl"', "[" * 100_000, '{"a": ' + "1" * 9000 + "}"]
)
def test_broken_config(content, folder):
    (folder / "config.json").write_text(content)
    message = error_of(folder)
    assert (
        message.startswith(f"{folder / 'config.json'}: ") and "download the file again" in message
    )


def test_truncated_weights(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 4, 60, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        message = error_of(folder)
        assert message.startswith(f"{path}: not a whole safetensors file (")
        assert "download it again" in message


def test_pickled_weights_are_never_read(folder):
    (folder / "model.safetensors").unlink()
    assert f"{folder}: no .safetensors file; pickled .bin and .pt weights" in error_of(folder)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit'\ntR.")
    message = error_of(folder)
    assert f"{folder}: no .safetensors file, only pytorch_model.bin; pickled .bin" in message
    assert "save_pretrained(DIR, safe_serialization=True)" in message


def test_index_that_names_an_absent_shard(start, tmp_path):
    write_checkpoint(start, tmp_path / "out", "internvl", shard_bytes=20_000)
    lost = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    lost.unlink()
    index = tmp_path / "out" / "model.safetensors.index.json"
    message = error_of(tmp_path / "out")
    assert message == f"{index}: names files that are not there: {lost.name}; download them"
    index.write_text('{"metadata": {}}')
    assert f"{index}: field 'weight_map' is missing" in error_of(tmp_path / "out")


def test_tensor_in_two_files(folder):
    shutil.copyfile(folder / "model.safetensors", folder / "old.safetensors")
    message = error_of(folder)
    assert "occurs twice, also in" in message and "remove the file that is left over" in message


def test_tokenizer_without_the_image_token(folder):
    change_config(folder, lambda raw: raw.pop("image_token_id"))
    assert find_problems(folder) == []
    (folder / "added_tokens.json").write_text('{"<img>": 3}')
    assert f"{folder}: no tokenizer file names <IMG_CONTEXT>; copy" in error_of(folder)
    (folder / "added_tokens.json").unlink()
    assert "no tokenizer file names <IMG_CONTEXT>" in error_of(folder)


class TestNative:
    @pytest.fixture
    def native(self, start, tmp_path):
        write_checkpoint(start, tmp_path / "native", "native")
        return tmp_path / "native"

    def test_version(self, native):
        change_config(native, lambda raw: raw.update(version=9))
        assert "field 'version' is 9, this mis_jax reads 2; convert" in error_of(native)

    def test_unknown_field(self, native):
        change_config(native, lambda raw: raw["config"].update(colour=1))
        message = error_of(native)
        assert "field 'config' is not readable" in message and "colour" in message

    def test_parameters_that_do_not_fit(self, native):
        change_config(native, lambda raw: raw["config"]["text"].update(kind="qwen2", mlp_size=41))
        message = error_of(native)
        assert "6 problems with its tensors" in message
        assert "missing parameter 'text.layers.block.attention.q.bias'" in message
        shapes = "has shape (3, 24, 40), config.json asks for (3, 24, 41)"
        assert f"parameter 'text.layers.block.gate.kernel' {shapes}" in message

    def test_values_that_are_cut_short(self, native):
        largest = max((native / "params").rglob("*"), key=lambda path: path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:100])
        message = error_of(native)
        assert f"parameter '{largest.parent.name}' lacks chunk {largest.name}, or has it" in message
        assert message.endswith("convert the checkpoint again")

    def test_chunks_that_are_gone(self, native):
        """zarr would read zeros where a file is missing."""
        for layer in (0, 2):
            (native / "params" / "text.layers.block.gate.kernel" / f"{layer}.0.0").unlink()
        expected = "parameter 'text.layers.block.gate.kernel' lacks chunk 0.0.0 and 1 more"
        assert expected in error_of(native)
        assert expected in find_problems(native)[0]

    def test_metadata_or_folder_that_is_gone(self, native):
        metadata = native / "params" / "_METADATA"
        metadata.unlink()
        assert f"{native / 'params'}: not readable (" in error_of(native)
        shutil.rmtree(native / "params")
        assert f"{native / 'params'}: no such folder" in error_of(native)


def test_existing_destination_is_refused(start, folder, tmp_path):
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(ValueError, match="exists already; remove it or choose another folder"):
        write_checkpoint(start, folder, "hf")
    assert sorted(p.name for p in folder.iterdir()) == before
    (tmp_path / "empty").mkdir()
    write_checkpoint(start, tmp_path / "empty", "hf")
    assert_same(start, read_checkpoint(tmp_path / "empty"))


def test_shard_size_of_nothing_is_refused(start, tmp_path):
    with pytest.raises(ValueError, match="shard size is 0 bytes; give one above zero"):
        write_checkpoint(start, tmp_path / "out", "hf", shard_bytes=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["hf", "internvl", "native"])
def test_full_disk_leaves_nothing_behind(layout, start, tmp_path, monkeypatch):
    fill_disk(monkeypatch, after=3)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError, match="No space left on device"):
        write_checkpoint(start, tmp_path / "out", layout, shard_bytes=20_000)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("layout", ["hf", "internvl", "native"])
def test_full_disk_keeps_what_a_conversion_has_done(layout, folder, start, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fill_disk(patch, after=20)
        with pytest.raises(OSError, match="make room and run the same command again") as caught:
            convert(open_checkpoint(folder), tmp_path / "out", layout)
        assert caught.value.errno == errno.ENOSPC
        assert str(caught.value).count("Errno") == 1  # Python's own, which the command leaves out
        assert "GB are free" in str(caught.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="not finished: run the same mis-jax command again"):
        read_checkpoint(tmp_path / "out.incomplete")
    seen: list[tuple[int, int]] = []
    convert(open_checkpoint(folder), tmp_path / "out", layout, progress=lambda *p: seen.append(p))
    assert 0 < seen[0][0] < seen[-1][0] == seen[-1][1]  # went on, and did not start again
    assert_same(start, read_checkpoint(tmp_path / "out"))
    assert not (tmp_path / "out.incomplete").exists()
    assert not list((tmp_path / "out").glob("*INCOMPLETE*"))


def fill_disk(monkeypatch, *, after: int) -> None:
    """Let the disk be full once `after` pieces are written."""
    pwrite, pieces = os.pwrite, itertools.count()

    def full(descriptor, content, offset):
        if next(pieces) >= after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, content, offset)

    monkeypatch.setattr(os, "pwrite", full)


def bounded_error(folder, monkeypatch) -> str:
    """The error of config.json, which comes before anything is made for each layer."""
    from mis_jax.checkpoint import nnx_state

    def shapes(config):
        raise AssertionError("the sizes were believed")

    monkeypatch.setattr(nnx_state, "shapes", shapes)
    with pytest.raises(ValueError, match=re.escape(f"{folder / 'config.json'}: ")) as caught:
        read_checkpoint(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("llm_config", "num_hidden_layers", 10**9),
        ("llm_config", "num_hidden_layers", 1e9),
        ("llm_config", "hidden_size", 2**40),
        ("llm_config", "vocab_size", 10**12),
        ("llm_config", "intermediate_size", 10**4000),
        ("llm_config", "max_position_embeddings", 10**15),
        ("llm_config", "head_dim", 10**9),
        ("vision_config", "num_hidden_layers", 10**9),
        ("vision_config", "image_size", 2**30),
        ("vision_config", "patch_size", -14),
        (None, "max_dynamic_patch", 10**9),
    ],
)
def test_a_size_beyond_reason_is_refused_by_its_name(folder, section, field, value, monkeypatch):
    change_config(folder, lambda raw: (raw[section] if section else raw).update({field: value}))
    message = bounded_error(folder, monkeypatch)
    name = f"{section}.{field}" if section else field
    assert f"field '{name}' is {value!r:.100}; supported: " in message


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("text", "num_layers", 10**9),
        ("text", "num_layers", "2"),
        ("text", "rope_theta", float("1e300")),
        ("vision", "image_size", 2**30),
        ("vision", "num_layers", True),
        (None, "max_tiles", 10**9),
        (None, "image_token_id", -1),
        (None, "select_layer", 10**9),
        (None, "downsample_ratio", 0),
    ],
)
def test_a_size_beyond_reason_in_our_own_format(tmp_path, field, section, value, monkeypatch):
    native = tmp_path / "native"
    native.mkdir()
    content = native_json(tiny_config("llama"), None)
    (native / "config.json").write_text(json.dumps(content))
    change_config(
        native,
        lambda raw: (raw["config"][section] if section else raw["config"]).update({field: value}),
    )
    message = bounded_error(native, monkeypatch)
    assert f"{field} is {value!r:.40}; supported: " in message


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("added_tokens.json", '{"<IMG_CONTEXT>": 1%s}' % ("0" * 3000), "a whole number up to"),
        ("added_tokens.json", '{"<IMG_CONTEXT>": NaN}', "NaN is no JSON"),
        ("added_tokens.json", '{"<IMG_CONTEXT>": 1, "<IMG_CONTEXT>": 2}', "stands twice"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"%s": {"content": "<IMG_CONTEXT>"}}}' % ("9" * 5000),
            "the id of <IMG_CONTEXT>, a whole number",
        ),
    ],
)
def test_ids_beyond_reason(folder, file, content, message):
    (folder / file).write_text(content)
    found = error_of(folder)
    assert str(folder / file) in found and message in found and "\n" not in found
