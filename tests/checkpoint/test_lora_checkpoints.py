"""LoRA that is not merged yet: beside the weights of a checkpoint, or in a folder of its own."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import random_checkpoint, tiny_config

from mis_jax.checkpoint.convert import convert, write_checkpoint
from mis_jax.checkpoint.inspect import inspect_checkpoint
from mis_jax.checkpoint.load import find_problems, open_checkpoint, read_checkpoint

RANK = 3
FUSED = "language_model.model.layers.1.attention.wqkv"
PLAIN = "language_model.model.layers.0.feed_forward.w2"
TOWER = "vision_model.encoder.layers.1.attn.qkv"


@pytest.fixture
def merged(rng, tmp_path):
    """Tensors of the merged model by key; `unmerged` is the folder as upstream saves it."""
    start = random_checkpoint(tiny_config("internlm2"), rng, tmp_path / "start")
    write_checkpoint(start, tmp_path / "plain", "internvl")
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    unmerged, expected = {}, dict(tensors)
    for key, values in tensors.items():
        module = key.removesuffix(".weight")
        wrapped = wrapped_key(key)
        if module not in (FUSED, PLAIN, TOWER):
            unmerged[wrapped] = values
            continue
        a = rng.standard_normal((RANK, values.shape[1])).astype(np.float32)
        b = rng.standard_normal((values.shape[0], RANK)).astype(np.float32)
        unmerged[wrapped.replace(".weight", ".base_layer.weight")] = values
        unmerged[wrapped.replace(".weight", ".lora_A.default.weight")] = a
        unmerged[wrapped.replace(".weight", ".lora_B.default.weight")] = b
        expected[key] = values + 2 * (b @ a)
    folder = tmp_path / "unmerged"
    folder.mkdir()
    for path in [*(tmp_path / "plain").glob("*.json"), tmp_path / "plain" / "merges.txt"]:
        (folder / path.name).write_bytes(path.read_bytes())
    change(folder, use_llm_lora=RANK, use_backbone_lora=RANK)
    save_file(unmerged, folder / "model.safetensors")
    return expected


def wrapped_key(key: str) -> str:
    for part in ("language_model.", "vision_model."):
        if key.startswith(part):
            return f"{part}base_model.model.{key.removeprefix(part)}"
    return key


def change(folder, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_checkpoint_with_factors_is_merged(merged, tmp_path):
    folder = tmp_path / "unmerged"
    assert find_problems(folder) == [] and inspect_checkpoint(folder)["problems"] == []
    convert(open_checkpoint(folder), tmp_path / "out", "internvl")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == merged.keys()
    for key, values in found.items():
        np.testing.assert_allclose(values, merged[key], rtol=0, atol=1e-5, err_msg=key)
        if key.removesuffix(".weight") not in (FUSED, PLAIN, TOWER):
            np.testing.assert_array_equal(values, merged[key], err_msg=key)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["use_llm_lora"] == raw["use_backbone_lora"] == 0


def test_an_adapter_in_a_folder_of_its_own(merged, rng, tmp_path):
    """Of the language model alone, as PEFT saves what the official script trains."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    content = load_file(tmp_path / "unmerged" / "model.safetensors")
    factors = {
        key.removeprefix("language_model.").replace(".default", ""): values
        for key, values in content.items()
        if ".lora_" in key and key.startswith("language_model.")
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    opened = open_checkpoint(tmp_path / "plain", adapter)
    convert(opened, tmp_path / "out", "internvl")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for key in (f"{FUSED}.weight", f"{PLAIN}.weight"):
        np.testing.assert_allclose(found[key], merged[key], rtol=0, atol=1e-5)
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    np.testing.assert_array_equal(found[f"{TOWER}.weight"], plain[f"{TOWER}.weight"])


def refused(folder) -> str:
    with pytest.raises(ValueError, match=str(folder)) as caught:
        read_checkpoint(folder)
    assert find_problems(folder)
    return str(caught.value)


def test_the_rank_must_be_known(merged, tmp_path):
    change(tmp_path / "unmerged", use_llm_lora=0)
    assert "field 'use_llm_lora' is 0" in refused(tmp_path / "unmerged")


def test_factors_that_do_not_fit(merged, tmp_path):
    path = tmp_path / "unmerged" / "model.safetensors"
    tensors = load_file(path)
    lost = f"{wrapped_key(PLAIN)}.lora_A.default.weight"
    del tensors[lost]
    save_file(tensors, path)
    assert f"missing tensor '{PLAIN}.lora_A.weight'" in refused(tmp_path / "unmerged")
    change(tmp_path / "unmerged", use_llm_lora=RANK + 1)
    assert f"a rank of {RANK + 1} ask" in refused(tmp_path / "unmerged")


def test_the_same_factor_twice(merged, tmp_path):
    path = tmp_path / "unmerged" / "model.safetensors"
    tensors = load_file(path)
    key = f"{wrapped_key(PLAIN)}.lora_A.default.weight"
    save_file(tensors | {key.replace("default", "other"): tensors[key]}, path)
    assert "occurs twice" in refused(tmp_path / "unmerged")


def test_factors_with_nan(merged, tmp_path):
    path = tmp_path / "unmerged" / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{wrapped_key(PLAIN)}.lora_A.default.weight"][0, 0] = np.nan
    save_file(tensors, path)
    with pytest.raises(ValueError, match=rf"'{PLAIN}\.lora_A\.weight' holds NaN or infinite"):
        read_checkpoint(tmp_path / "unmerged")
