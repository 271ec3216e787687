"""Exports opened by transformers, and its models read from a file in the original layout."""

import dataclasses
import functools
import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import IMAGE_TOKEN, random_batch, random_checkpoint, tiny_config

from mis_jax.checkpoint.convert import write_checkpoint
from mis_jax.checkpoint.load import read_checkpoint
from mis_jax.checkpoint.nnx_state import build

torch = pytest.importorskip("torch")
sys.path.append(str(Path(__file__).parent.parent / "parity"))
import reference as ref  # noqa: E402
from transformers import InternVLForConditionalGeneration  # noqa: E402

TOLERANCE = 1e-4


@functools.partial(jax.jit, static_argnames="config")
def our_logits(config, arrays, batch):
    return build(config, arrays)(batch)


def their_logits(model, batch) -> np.ndarray:
    rows = len(batch.input_ids)
    tiles = batch.tiles.reshape(rows, -1, *batch.tiles.shape[1:])
    valid = batch.tile_mask.reshape(rows, -1)
    with torch.no_grad():
        output = model(
            input_ids=torch.from_numpy(batch.input_ids).long(),
            attention_mask=torch.from_numpy((batch.segment_ids > 0).astype(np.int64)),
            pixel_values=ref.pixel_values([t[v] for t, v in zip(tiles, valid, strict=True)]),
        )
    return output.logits.numpy()


@pytest.mark.parametrize(
    ("kind", "tower"),
    [
        ("internlm2", "layer_norm"),  # Llama to transformers
        ("llama", "rms_norm"),
        ("qwen2", "layer_norm"),
        ("qwen2", "rms_norm"),
        ("qwen3", "layer_norm"),
        ("qwen3", "rms_norm"),
    ],
)
def test_transformers_opens_our_export(kind, tower, rng, tmp_path):
    """Every tensor taken, none missing, the same logits; a tied head and two files now and then."""
    tied = (kind, tower) in {("qwen2", "layer_norm"), ("llama", "rms_norm")}
    config = tiny_config(kind, tower, tie_embeddings=tied)
    start = random_checkpoint(config, rng, tmp_path / "start")
    shard_bytes = 40_000 if tower == "rms_norm" else 10**9
    write_checkpoint(start, tmp_path / "hf", "hf", shard_bytes=shard_bytes)
    theirs, info = InternVLForConditionalGeneration.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(info.values()), info
    assert theirs.dtype == torch.float32
    assert sum(p.numel() for p in theirs.parameters()) == sum(a.size for a in start.arrays.values())
    batch = random_batch(rng)
    expected = their_logits(theirs.eval(), batch)
    difference = np.abs(np.asarray(our_logits(config, start.arrays, batch)) - expected)
    assert difference[batch.segment_ids > 0].max() <= TOLERANCE
    assert np.abs(expected).max() > 0.1  # otherwise the figure above would mean nothing


# The original layout from transformers' state dict, by the table of transformers'
# `convert_internvl_weights_to_hf.py` read backwards, not through mis_jax.checkpoint.mapping.
RENAMES = [
    (r"^model\.vision_tower", "vision_model"),
    (r"encoder\.layer\.", "encoder.layers."),
    (r"cls_token", "class_embedding"),
    (r"position_embeddings", "position_embedding"),
    (r"patch_embeddings\.projection", "patch_embedding"),
    (r"lambda_([12])", r"ls\1"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"attention\.projection_layer", "attn.proj"),
    (r"(vision_model.*)\.attention\.", r"\1.attn."),
    (r"^model\.multi_modal_projector\.layer_norm", "mlp1.0"),
    (r"^model\.multi_modal_projector\.linear_1", "mlp1.1"),
    (r"^model\.multi_modal_projector\.linear_2", "mlp1.3"),
    (r"^model\.language_model", "language_model.model"),
    (r"^lm_head", "language_model.lm_head"),
]
INTERNLM2_RENAMES = [
    (r"embed_tokens", "tok_embeddings"),
    (r"self_attn\.o_proj", "attention.wo"),
    (r"mlp\.gate_proj", "feed_forward.w1"),
    (r"mlp\.down_proj", "feed_forward.w2"),
    (r"mlp\.up_proj", "feed_forward.w3"),
    (r"input_layernorm", "attention_norm"),
    (r"post_attention_layernorm", "ffn_norm"),
    (r"language_model\.lm_head", "language_model.output"),
]


def original_tensors(theirs, *, internlm2: bool) -> dict[str, np.ndarray]:
    result: dict[str, np.ndarray] = {}
    for key, value in theirs.state_dict().items():
        for old, new in RENAMES + (INTERNLM2_RENAMES if internlm2 else []):
            key = re.sub(old, new, key)
        result[key] = value.numpy()
    for key in [k for k in result if ".attn.q_proj." in k]:
        parts = [result.pop(key.replace("q_proj", f"{p}_proj")) for p in "qkv"]
        result[key.replace("q_proj", "qkv")] = np.concatenate(parts)
    if internlm2:
        heads, kv_heads = (
            theirs.config.text_config.num_attention_heads,
            theirs.config.text_config.num_key_value_heads,
        )
        for key in [k for k in result if k.endswith("self_attn.q_proj.weight")]:
            q, k, v = (result.pop(key.replace("q_proj", f"{p}_proj")) for p in "qkv")
            q, k, v = np.split(q, heads), np.split(k, kv_heads), np.split(v, kv_heads)
            group = heads // kv_heads
            grouped = [[*q[g * group : (g + 1) * group], k[g], v[g]] for g in range(kv_heads)]
            name = key.replace("self_attn.q_proj", "attention.wqkv")
            result[name] = np.concatenate([head for part in grouped for head in part])
    return {key: np.ascontiguousarray(value) for key, value in result.items()}


def original_config(theirs, kind: str) -> dict:
    """config.json as upstream's own `to_dict` writes it."""
    vision, text = theirs.config.vision_config, theirs.config.text_config
    names = {
        "internlm2": "InternLM2ForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
    }
    copied = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "max_position_embeddings",
        "hidden_act",
    )  # fmt: skip
    llm = {name: getattr(text, name) for name in copied}
    llm |= dict(architectures=[names[kind]], model_type=kind, rope_theta=1e4, rope_scaling=None)
    if kind == "qwen3":
        llm["head_dim"] = text.head_dim
    return dict(
        model_type="internvl_chat",
        architectures=["InternVLChatModel"],
        llm_config=llm,
        vision_config=dict(
            model_type="intern_vit_6b",
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_hidden_layers=vision.num_hidden_layers,
            num_attention_heads=vision.num_attention_heads,
            norm_type=vision.norm_type,
            qkv_bias=vision.attention_bias,
            qk_normalization=vision.use_qk_norm,
            image_size=ref.IMAGE_SIZE,
            patch_size=14,
            layer_norm_eps=1e-6,
            hidden_act="gelu",
        ),
        force_image_size=ref.IMAGE_SIZE,
        downsample_ratio=0.5,
        ps_version="v2",
        select_layer=-1,
        template="internvl2_5",
        dynamic_image_size=True,
        use_thumbnail=True,
        min_dynamic_patch=1,
        max_dynamic_patch=12,
        pad2square=False,
    )


@pytest.mark.parametrize("kind", ["internlm2", "qwen2", "qwen3"])
@pytest.mark.parametrize("tower", ref.TOWERS)
def test_original_layout(tower, kind, rng, tmp_path):
    """The same parameters as from transformers' layout, hence the same logits; and back."""
    text = "llama" if kind == "internlm2" else kind
    theirs = ref.reference_model(ref.reference_config(text, tower), int(rng.integers(2**31)))
    folder = tmp_path / "internvl"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(original_config(theirs, kind)))
    (folder / "added_tokens.json").write_text(json.dumps({"<IMG_CONTEXT>": ref.IMAGE_TOKEN}))
    tensors = original_tensors(theirs, internlm2=kind == "internlm2")
    save_file(tensors, folder / "model.safetensors")
    got = read_checkpoint(folder)
    expected = read_checkpoint(ref.save(theirs, tmp_path / "hf"))
    text_config = dataclasses.replace(expected.config.text, kind=kind)
    assert got.config == dataclasses.replace(expected.config, text=text_config)
    assert got.arrays.keys() == expected.arrays.keys()
    for name, array in expected.arrays.items():
        np.testing.assert_array_equal(got.arrays[name], array, err_msg=name)
    if kind == "internlm2":  # the parity tests compare the logits of the other kinds
        batch = random_batch(rng)
        batch.input_ids[batch.input_ids == IMAGE_TOKEN] = ref.IMAGE_TOKEN
        mine = np.asarray(our_logits(got.config, got.arrays, batch))
        difference = np.abs(mine - their_logits(theirs, batch))
        assert difference[batch.segment_ids > 0].max() <= TOLERANCE

    write_checkpoint(got, tmp_path / "back", "internvl")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


@pytest.mark.parametrize("text", ref.TEXTS)
def test_state_dict_written_as_it_is(text, rng, tmp_path):
    """A file with the keys of `model.state_dict()` reads as one of `save_pretrained` does."""
    theirs = ref.reference_model(ref.reference_config(text, "rms_norm"), int(rng.integers(2**31)))
    ref.save(theirs, tmp_path / "disk")
    expected = read_checkpoint(tmp_path / "disk")
    state = {key: value.numpy() for key, value in theirs.state_dict().items()}
    assert {key.split(".")[0] for key in state} == {"model", "lm_head"}
    save_file(state, tmp_path / "disk" / "model.safetensors")
    got = read_checkpoint(tmp_path / "disk")
    assert got.config == expected.config
    for name, array in expected.arrays.items():
        np.testing.assert_array_equal(got.arrays[name], array)
