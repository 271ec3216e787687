"""Safetensors files that lie, are cut short or hold NaN: one line each, never a crash."""

import json
import math
import os
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny_models import assert_same, random_checkpoint, tiny_config

from mis_jax.checkpoint.convert import convert, write_checkpoint
from mis_jax.checkpoint.dtype_cast import all_finite
from mis_jax.checkpoint.load import find_problems, open_checkpoint, read_checkpoint
from mis_jax.checkpoint.safetensors_reader import INDEX, Shards, TensorFile


def write(path: Path, header: dict | bytes, data: bytes, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(start: int, stop: int, shape=(4,), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


LIES = {
    "shorter than its header says": ({"a": entry(0, 32, (8,))}, bytes(16)),
    "longer than its header says": ({"a": entry(0, 16)}, bytes(32)),
    "shape and offsets disagree": ({"a": entry(0, 16, (5,))}, bytes(16)),
    "dtype and offsets disagree": ({"a": entry(0, 16, dtype="BF16")}, bytes(16)),
    "offsets that run backwards": ({"a": entry(16, 0)}, bytes(16)),
    "tensors that overlap": ({"a": entry(0, 16), "b": entry(8, 24)}, bytes(24)),
    "one place for two tensors": ({"a": entry(0, 16), "b": entry(0, 16)}, bytes(16)),
    "a hole between tensors": ({"a": entry(0, 16), "b": entry(20, 36)}, bytes(36)),
    "a start below zero": ({"a": entry(-4, 12)}, bytes(16)),
    "a shape that overflows": ({"a": entry(0, 16, (2**62, 2**62))}, bytes(16)),
    "an unknown dtype": ({"a": entry(0, 16, dtype="Q9")}, bytes(16)),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 16]}}, bytes(16)),
    "a list in place of the object": (b"[1, 2]", bytes(16)),
    "no JSON": (b"{'a': 1}", bytes(16)),
    "no UTF-8": (b'{"\xff\xfe": 1}', bytes(16)),
    "the same key twice": (
        b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},'
        b' "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',
        bytes(16),
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_headers_that_lie(name, tmp_path):
    path = write(tmp_path / "model.safetensors", *LIES[name])
    with pytest.raises(ValueError, match="not a whole safetensors file") as caught:
        TensorFile(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and message.endswith("; download it again")
    assert "\n" not in message


@pytest.mark.parametrize("length", [10 * 10**9, 2**63, 2**64 - 1, 200])
def test_a_header_of_ten_gigabytes(length, tmp_path):
    path = write(tmp_path / "model.safetensors", {"a": entry(0, 16)}, bytes(16), length)
    with pytest.raises(ValueError, match=rf"the header is said to take {8 + length}\)"):
        TensorFile(path)


def test_a_large_file_with_a_large_header(tmp_path):
    """Ten gigabytes that are there (a sparse file) are not read either."""
    path = write(tmp_path / "model.safetensors", {"a": entry(0, 16)}, bytes(16), 10 * 10**9)
    os.truncate(path, 11 * 10**9)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        TensorFile(path)


@pytest.mark.parametrize("size", [0, 1, 7, 8])
def test_next_to_nothing(size, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(size))
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        TensorFile(path)


def test_a_zip_archive_under_the_wrong_name(tmp_path):
    """What torch.save writes."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        TensorFile(path)


def test_values_that_are_not_aligned(tmp_path):
    values = np.arange(4, dtype=np.float32)
    header = json.dumps({"a": entry(0, 16)}).encode()
    header += b" " * (-(len(header) + 8) % 4 + 1)
    file = TensorFile(write(tmp_path / "model.safetensors", header, values.tobytes()))
    assert file.entries["a"].start % 4
    np.testing.assert_array_equal(file.tensor("a"), values)


def test_released_pages_come_back(tmp_path):
    values = np.random.default_rng(0).standard_normal((300, 1000)).astype(np.float32)
    save_file({"a": values, "b": values + 1}, tmp_path / "model.safetensors")
    file = TensorFile(tmp_path / "model.safetensors")
    view = file.tensor("b")
    file.release()
    np.testing.assert_array_equal(view, values + 1)
    np.testing.assert_array_equal(file.tensor("a"), values)


# An index


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    start = random_checkpoint(tiny_config("llama"), np.random.default_rng(0), folder / "start")
    write_checkpoint(start, folder / "out", "internvl", shard_bytes=20_000)
    return folder / "out"


@pytest.fixture
def copy(sharded, tmp_path):
    for path in sharded.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "x.bin", 3, None,
     "x\x00.safetensors"],
)  # fmt: skip
def test_names_that_lead_out_of_the_folder(name, copy):
    index = json.loads((copy / INDEX).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    (copy / INDEX).write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match=r"no plain name of a \.safetensors file; download"
    ) as error:
        read_checkpoint(copy)
    assert str(error.value).startswith(f"{copy / INDEX}: field 'weight_map' names {name!r}")


def test_a_key_in_two_shards(copy):
    first, second = sorted(copy.glob("*.safetensors"))[:2]
    taken = load_file(first)
    key = sorted(taken)[0]
    save_file(load_file(second) | {key: taken[key]}, second)
    with pytest.raises(ValueError, match=f"tensor '{key}' occurs twice, also in"):
        read_checkpoint(copy)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": []}', '{"weight_map": {}}'])
def test_a_broken_index(content, copy):
    (copy / INDEX).write_text(content)
    with pytest.raises(ValueError, match=str(copy / INDEX)):
        read_checkpoint(copy)


# NaN


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_all_finite(value, dtype):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((5, 7)).astype(dtype)
    values[0, 0], values[1, 1] = ml_dtypes.finfo(dtype).max, ml_dtypes.finfo(dtype).min
    values[0, 1], values[1, 0] = 0.0, -0.0
    assert all_finite(values) and all_finite(-np.abs(values)) and all_finite(np.abs(values))
    values[2, 3] = value
    assert not all_finite(values) and not all_finite(values[2:3, 3:4].copy())


@pytest.mark.parametrize(("kind", "to"), [("internvl", "hf"), ("hf", "internvl"), ("hf", "native")])
def test_an_error_names_the_tensor_as_the_source_does(kind, to, rng, tmp_path):
    start = random_checkpoint(tiny_config("internlm2"), rng, tmp_path / "start")
    write_checkpoint(start, tmp_path / "in", kind)
    (file,) = (tmp_path / "in").glob("*.safetensors")
    tensors = load_file(file)
    plain = {"internvl": "layers.1.feed_forward.w1", "hf": "layers.1.mlp.gate_proj"}[kind]
    fused = {"internvl": "layers.2.attention.wqkv", "hf": "layers.2.self_attn.k_proj"}[kind]
    keys = [next(key for key in tensors if f"{name}.weight" in key) for name in (plain, fused)]
    for key in keys:
        tensors[key][0, 0] = np.nan
    save_file(tensors, file)
    with pytest.raises(ValueError, match="NaN") as caught:
        convert(open_checkpoint(tmp_path / "in"), tmp_path / "out", to)
    assert all(key in str(caught.value) for key in keys)
    tensors[keys[0]][0, 0], tensors[keys[1]][0, 0] = 1e6, 0
    save_file(tensors, file)
    with pytest.raises(ValueError, match=rf"'{keys[0]}' has values beyond float16"):
        convert(open_checkpoint(tmp_path / "in"), tmp_path / "out2", to, dtype="float16")


def test_nan_is_reported_and_converted_on_request(copy, tmp_path_factory):
    out = tmp_path_factory.mktemp("nan") / "out"
    shard = sorted(copy.glob("*.safetensors"))[-1]
    tensors = load_file(shard)
    changed = sorted(tensors)[:2]
    tensors[changed[0]].reshape(-1)[3] = np.nan
    tensors[changed[1]].reshape(-1)[0] = -np.inf
    save_file(tensors, shard)
    with pytest.raises(ValueError, match=r"2 tensor\(s\) hold NaN or infinite values") as caught:
        convert(open_checkpoint(copy), out, "internvl")
    assert all(key in str(caught.value) for key in changed) and "--allow-nan" in str(caught.value)
    assert not out.exists()
    seen: list[int] = []
    convert(
        open_checkpoint(copy), out, "internvl", allow_nonfinite=True,
        progress=lambda done, total: seen.append(total - done),
    )  # fmt: skip
    assert seen == [0]  # what was done before is not done again
    assert_same(read_checkpoint(copy), read_checkpoint(out))


# Anything at all

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
near_entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F16", "I64", "F8_E4M3", "X"]) | anything,
        "shape": st.lists(st.integers(-2, 9), max_size=3) | anything,
        "data_offsets": st.lists(st.integers(-2, 80), min_size=2, max_size=2) | anything,
    },
)
headers = st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]) | st.text(max_size=4),
                          near_entries | anything, max_size=4)  # fmt: skip
relaxed = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def opened(opener, *arguments, blamed: Path):
    """What a file is read as; None where it is refused by a ValueError that names it."""
    try:
        return opener(*arguments)
    except ValueError as error:
        if not str(error).startswith(f"{blamed}: "):
            raise
        return None


@relaxed
@given(
    header=headers | st.binary(max_size=64),
    data=st.binary(max_size=80),
    length=st.none() | st.integers(0, 2**64 - 1),
)
def test_any_header(header, data, length, tmp_path):
    """A file is read, within its bounds, or refused by one ValueError."""
    path = write(tmp_path / "model.safetensors", header, data, length)
    file = opened(TensorFile, path, blamed=path)
    if file is None:
        return
    for key, found in file.entries.items():
        assert found.start >= 8 and found.start + found.size <= path.stat().st_size
        if found.dtype in ("float32", "bfloat16", "float16"):
            assert file.tensor(key).size == math.prod(found.shape)


@relaxed
@given(content=anything, other=st.dictionaries(st.text(max_size=6), anything, max_size=3))
def test_any_index(content, other, sharded, tmp_path):
    for path in sharded.glob("*.safetensors"):
        target = tmp_path / path.name
        if not target.exists():
            target.symlink_to(path)  # as in a hub's cache
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": content, **other}))
    shards = opened(Shards, tmp_path, "internvl", blamed=tmp_path / INDEX)
    if shards is not None:
        assert {file.parent for file in shards.files} == {tmp_path}


@relaxed
@given(data=st.data())
def test_any_byte_that_is_changed(data, sharded, tmp_path):
    """One byte of a sound shard's header changed: refused, or read with every value in bounds."""
    whole = bytearray(sorted(sharded.glob("*.safetensors"))[0].read_bytes())
    length = int.from_bytes(whole[:8], "little")
    place = data.draw(st.integers(0, 8 + length - 1))
    whole[place] = data.draw(st.integers(0, 255))
    path = tmp_path / "model.safetensors"
    path.write_bytes(whole)
    file = opened(TensorFile, path, blamed=path)
    if file is not None:
        for key, found in file.entries.items():
            assert found.start + found.size <= len(whole)
            if found.dtype == "float32":
                file.tensor(key).sum()


def test_a_sound_folder_has_no_problem(sharded):
    assert find_problems(sharded) == []
