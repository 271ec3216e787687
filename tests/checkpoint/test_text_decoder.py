"""Language models alone: Llama 3's rotary scaling, and folders that hold more or less than one."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from guard_world import write_guard, write_tensors
from safetensors.numpy import load_file
from tiny_models import tiny_config

from mis_jax.checkpoint.hf.config import read_config
from mis_jax.checkpoint.hf.config_writer import native_json, published_json
from mis_jax.checkpoint.text_decoder import load_decoder, read_decoder_config
from mis_jax.model.config import Llama3Scaling
from mis_jax.model.layers import rotary_angles

TOLERANCE = 3e-5
LENGTH = 150  # well beyond the 64 tokens that the rotary scaling starts from


def change(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def folder(rng, tmp_path):
    return write_guard(tmp_path / "guard", rng)


@pytest.mark.parametrize(
    ("head_dim", "factor", "heads"), [(128, 8.0, 32), (64, 32.0, 32)], ids=["8B", "1B"]
)
def test_angles_are_those_of_transformers(head_dim, factor, heads):
    """The published settings of Llama 3.1 8B and Llama 3.2 1B."""
    pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = dict(
        rope_type="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8192, rope_theta=500000.0,
    )  # fmt: skip
    theirs = LlamaConfig(
        hidden_size=heads * head_dim, num_attention_heads=heads, rope_parameters=rope,
        max_position_embeddings=131072,
    )  # fmt: skip
    inverse, scale = ROPE_INIT_FUNCTIONS["llama3"](theirs, device=None)
    assert scale == 1.0
    cos, sin = rotary_angles(
        jnp.ones((1, 1), jnp.int32), jnp.ones(1, jnp.int32), head_dim=head_dim, theta=500000.0,
        dynamic_factor=None, max_position=131072, scaling=Llama3Scaling(factor, 1.0, 4.0, 8192),
    )  # fmt: skip
    angles = np.arctan2(np.asarray(sin), np.asarray(cos))[0, 0]
    np.testing.assert_allclose(angles, inverse.numpy(), rtol=3e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_transformers(tied, rng, tmp_path):
    """From the published form of config.json, and from what transformers makes of it."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaForCausalLM

    folder = write_guard(tmp_path / "guard", rng, tied=tied, shards=3 if tied else 1)
    theirs = LlamaForCausalLM.from_pretrained(folder).eval()
    assert theirs.config.rope_parameters["rope_type"] == "llama3"
    decoder = load_decoder(folder)
    assert (decoder.head is None) == tied
    ids = rng.integers(0, decoder.config.vocab_size, (2, LENGTH))
    with torch.no_grad():
        expected = theirs(input_ids=torch.from_numpy(ids)).logits.numpy()
    got = logits_of(decoder, ids)
    assert np.abs(got - expected).max() <= TOLERANCE
    # The scaling is no small matter here, so the tolerance does hold it.
    change(folder, rope_scaling=None)
    assert np.abs(logits_of(load_decoder(folder), ids) - expected).max() > 100 * TOLERANCE

    theirs.save_pretrained(tmp_path / "again")
    assert "rope_parameters" in json.loads((tmp_path / "again" / "config.json").read_text())
    again = load_decoder(tmp_path / "again")
    assert again.config == decoder.config
    np.testing.assert_array_equal(logits_of(again, ids), got)


def logits_of(decoder, ids) -> np.ndarray:
    rows, length = ids.shape
    hidden, _, _ = decoder(
        decoder.embed(jnp.asarray(ids), jnp.float32),
        positions=jnp.broadcast_to(jnp.arange(length), ids.shape),
        lengths=jnp.full(rows, length),
        segment_ids=jnp.ones(ids.shape, jnp.int32),
    )
    return np.asarray(decoder.logits(hidden))


def test_dtype(folder):
    assert load_decoder(folder).embedding.dtype == jnp.float32
    assert load_decoder(folder, dtype="bfloat16").layers.block.gate.kernel.dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="dtype 'int8' is not supported; choose from float32"):
        load_decoder(folder, dtype="int8")


def test_every_tensor_that_does_not_fit_in_one_error(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.3.mlp.up_proj.weight"] = np.ones((2, 2), np.float32)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.ones(48, np.float32)
    tensors["model.layers.1.self_attn.k_proj.weight"] = np.ones((5, 48), np.float32)
    tensors["model.layers.2.mlp.gate_proj.lora_A.weight"] = np.ones((2, 48), np.float32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int32)
    write_tensors(folder, tensors)
    with pytest.raises(ValueError, match="6 problems with its tensors; weights and config") as info:
        load_decoder(folder)
    lines = str(info.value).splitlines()
    assert lines[0].startswith(str(folder))
    assert sorted(lines[1:]) == [
        "  missing tensor 'model.norm.weight' (48,)",
        "  tensor 'lm_head.weight' has dtype I32; supported: F32, BF16, F16",
        "  tensor 'model.layers.1.self_attn.k_proj.weight' has shape (5, 48), config.json asks for "
        "(24, 48)",
        "  unexpected tensor 'model.layers.0.self_attn.q_proj.bias' (48,)",
        "  unexpected tensor 'model.layers.2.mlp.gate_proj.lora_A.weight'",
        "  unexpected tensor 'model.layers.3.mlp.up_proj.weight' (2, 2)",
    ]


def test_a_tied_head_may_be_stored_as_a_copy_alone(folder):
    change(folder, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"'tie_word_embeddings' is true, but the tensor 'lm_head"):
        load_decoder(folder)
    tensors = load_file(folder / "model.safetensors")
    write_tensors(folder, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    assert load_decoder(folder).head is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn"}}, "field 'rope_scaling.rope_type' is 'yarn'; "),
        (
            {"rope_scaling": {"rope_type": "llama3", "low_freq_factor": 1.0}},
            "field 'rope_scaling.high_freq_factor' is missing; ",
        ),
        (
            {"rope_scaling": {"type": "llama3", "low_freq_factor": 4, "high_freq_factor": 4}},
            "field 'rope_scaling.high_freq_factor' is 4; supported: a number above low_freq_factor",
        ),
        ({"model_type": "internvl"}, "field 'model_type' is 'internvl'; supported: "),
        (
            {"model_type": "internlm2", "architectures": None},
            "field 'model_type' is 'internlm2'; supported: llama, qwen2 or qwen3",
        ),
        ({"num_key_value_heads": 3}, "text num_kv_heads 3 does not divide num_heads 4; "),
        ({"tie_word_embeddings": "no"}, "field 'tie_word_embeddings' is 'no'; supported: true or "),
    ],
)
def test_a_config_that_is_not_supported(fields, message, folder):
    change(folder, **fields)
    with pytest.raises(ValueError, match=re.escape(f"{folder / 'config.json'}: {message}")):
        read_decoder_config(folder)


def test_folders_without_weights_that_may_be_opened(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "model.bin")
    with pytest.raises(ValueError, match=r"only model\.bin; pickled \.bin and \.pt"):
        load_decoder(folder)
    with pytest.raises(ValueError, match="no such folder; give the folder"):
        load_decoder(tmp_path / "none")


def test_rotary_scaling_of_internvl_in_every_format(tmp_path):
    scaling = Llama3Scaling(8.0, 1.0, 4.0, 64)
    config = tiny_config("llama", rope_dynamic_factor=None, rope_scaling=scaling)
    contents = [published_json(config, kind, None, "float32") for kind in ("internvl", "hf")]
    for content in (*contents, native_json(config, None)):
        (tmp_path / "config.json").write_text(json.dumps(content))
        (tmp_path / "added_tokens.json").write_text(json.dumps({"<IMG_CONTEXT>": 60}))
        assert read_config(tmp_path)[0].text == config.text
