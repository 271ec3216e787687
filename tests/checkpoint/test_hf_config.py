"""config.json of every member of the family, both ways and through transformers' own reader."""

import json

import pytest
from tiny_models import tiny_config
from transformers import AutoConfig

from mis_jax.checkpoint.hf.config import read_config
from mis_jax.checkpoint.hf.config_writer import native_json, processor_files, published_json
from mis_jax.model.family import FAMILY


def write(folder, content, image_token=None):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content))
    if image_token is not None:
        (folder / "added_tokens.json").write_text(json.dumps({"<IMG_CONTEXT>": image_token}))
    return folder


@pytest.mark.parametrize("name", FAMILY)
def test_every_member_round_trips(name, tmp_path):
    config = FAMILY[name]
    original = published_json(config, "internvl", None, "bfloat16")
    assert read_config(write(tmp_path / "a", original, config.image_token_id))[0] == config
    # upstream's InternLM2Config refuses a `rope_scaling` of other keys
    factor = config.text.rope_dynamic_factor
    expected = None if factor is None else {"type": "dynamic", "factor": factor}
    assert original["llm_config"]["rope_scaling"] == expected
    theirs = published_json(config, "hf", None, "bfloat16")
    write(tmp_path / "b", theirs)
    for file, settings in processor_files(config).items():
        (tmp_path / "b" / file).write_text(json.dumps(settings))
    assert read_config(tmp_path / "b")[0] == config
    assert read_config(write(tmp_path / "c", native_json(config, None)))[0] == config


@pytest.mark.parametrize("name", FAMILY)
def test_transformers_reads_every_member(name, tmp_path):
    """Sizes, rotary base and factor, and tying, as transformers 5 understands our export."""
    config = FAMILY[name]
    text = config.text
    theirs = AutoConfig.from_pretrained(
        write(tmp_path / "hf", published_json(config, "hf", None, "bfloat16"))
    )
    assert theirs.model_type == "internvl" and not theirs.tie_word_embeddings
    assert str(theirs.dtype).endswith("bfloat16")
    read = theirs.text_config
    assert read.model_type == {"internlm2": "llama"}.get(text.kind, text.kind)
    rope = read.rope_parameters
    assert rope["rope_theta"] == text.rope_theta
    if text.rope_dynamic_factor is None:
        assert rope["rope_type"] == "default"
    else:
        assert (rope["rope_type"], rope["factor"]) == ("dynamic", text.rope_dynamic_factor)
    sizes = (read.vocab_size, read.hidden_size, read.num_hidden_layers, read.intermediate_size)
    assert sizes == (text.vocab_size, text.hidden_size, text.num_layers, text.mlp_size)
    heads = (read.num_attention_heads, read.num_key_value_heads, read.max_position_embeddings)
    assert heads == (text.num_heads, text.num_kv_heads, text.max_position)
    assert (read.head_dim, read.rms_norm_eps) == (text.head_dim, text.norm_eps)
    tower = theirs.vision_config
    assert (tower.norm_type, tower.use_qk_norm) == (config.vision.norm, config.vision.qk_norm)
    assert (tower.hidden_size, tower.num_hidden_layers, tower.attention_bias) == (
        config.vision.hidden_size,
        config.vision.num_layers,
        config.vision.qkv_bias,
    )
    # and once more after transformers wrote it
    theirs.save_pretrained(tmp_path / "again")
    assert read_config(tmp_path / "again")[0] == config


def test_system_message_of_null_is_never_written_fresh(tmp_path):
    """Upstream's code puts a null into the prompt as the text "None"."""
    config = tiny_config("internlm2")
    assert "system_message" not in published_json(config, "internvl", None, "float32")


def test_defaults_of_the_original_layout(tmp_path):
    """Those of upstream's configuration classes where a file leaves a field out, or null."""
    config = tiny_config("internlm2", "rms_norm")
    raw = published_json(config, "internvl", None, "float32")
    for name in ("ps_version", "use_thumbnail", "dynamic_image_size", "max_dynamic_patch"):
        del raw[name]
    for name in ("norm_type", "qkv_bias", "qk_normalization", "layer_norm_eps"):
        del raw["vision_config"][name]
    raw["force_image_size"] = raw["llm_config"]["head_dim"] = None
    read, _ = read_config(write(tmp_path, raw, 60))
    assert read.vision == config.vision and read.text == config.text
    assert (read.pixel_shuffle, read.use_thumbnail, read.dynamic_tiles) == ("v1", False, False)
    assert read.max_tiles == 6


def test_pixel_shuffle_v1_has_no_place_in_transformers(tmp_path):
    raw = published_json(tiny_config("llama"), "internvl", None, "float32") | {"ps_version": "v1"}
    config, _ = read_config(write(tmp_path, raw, 60))
    with pytest.raises(ValueError, match=r"'v1'.*export to 'internvl' instead"):
        published_json(config, "hf", None, "float32")


def test_image_settings_inside_the_processor_file(tmp_path):
    """transformers 5 writes them there."""
    write(tmp_path, published_json(tiny_config("llama"), "hf", None, "float32"))
    nested = {"image_processor": {"min_patches": 2, "max_patches": 5}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    config, _ = read_config(tmp_path)
    assert (config.min_tiles, config.max_tiles) == (2, 5)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("added_tokens.json", {"<IMG_CONTEXT>": 61}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"61": {"content": "<IMG_CONTEXT>"}}}),
        ("tokenizer.json", {"added_tokens": [{"id": 61, "content": "<IMG_CONTEXT>"}]}),
    ],
)
def test_image_token_from_every_tokenizer_file(file, content, tmp_path):
    """The tokenizer's word counts more than the note our own export makes."""
    write(tmp_path, published_json(tiny_config("llama"), "internvl", None, "float32"))
    (tmp_path / file).write_text(json.dumps(content))
    assert read_config(tmp_path)[0].image_token_id == 61
