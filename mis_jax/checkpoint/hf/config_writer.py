"""`InternVLConfig` -> `config.json` and its companions, in each of the three formats."""

import dataclasses
from typing import Any

from mis_jax.checkpoint.hf.config import ARCHITECTURES, EXTRA, NATIVE_VERSION
from mis_jax.checkpoint.mapping import Layout
from mis_jax.model.config import InternVLConfig, TextConfig, TextKind

_MODEL_TYPES: dict[Layout, str] = {"hf": "internvl", "internvl": "internvl_chat"}
_TEXT_SECTIONS: dict[Layout, str] = {"hf": "text_config", "internvl": "llm_config"}
#: Fields of the text section that mean the same in every layout and that the network does not need.
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def native_json(config: InternVLConfig, source: dict[str, Any] | None) -> dict[str, Any]:
    """Our config.json; `source` keeps the published one for an export that loses no field."""
    fields = dataclasses.asdict(config)
    return {"format": "mis_jax", "version": NATIVE_VERSION, "config": fields, "source": source}


def published_json(
    config: InternVLConfig, layout: Layout, source: dict[str, Any] | None, dtype: str
) -> dict[str, Any]:
    """config.json of a published layout.

    Fields that the network does not need come from `source`, the published config.json it was
    read from: all of them when that is of the same layout, else the token ids alone. Raises
    ValueError for a model the layout cannot hold.
    """
    source = source or {}
    same = source.get("model_type") == _MODEL_TYPES[layout]
    base = _with_dtype(source, dtype) if same else {}
    tower = _with_dtype(base.get("vision_config") or {}, dtype) | _tower_json(config, layout)
    text = _text_base(source, layout, same, dtype) | _text_json(config.text, layout)
    write = _internvl_json if layout == "internvl" else _hf_json
    return base | write(config, tower, text, dtype)


def _internvl_json(
    config: InternVLConfig, tower: dict[str, Any], text: dict[str, Any], dtype: str
) -> dict[str, Any]:
    result = {
        "model_type": "internvl_chat",
        "architectures": ["InternVLChatModel"],
        "torch_dtype": dtype,
        "vision_config": tower,
        "llm_config": text,
        "force_image_size": config.vision.image_size,
        "downsample_ratio": config.downsample_ratio,
        "ps_version": config.pixel_shuffle,
        "select_layer": config.select_layer,
        "min_dynamic_patch": config.min_tiles,
        "max_dynamic_patch": config.max_tiles,
        "use_thumbnail": config.use_thumbnail,
        "dynamic_image_size": config.dynamic_tiles,
        "template": config.template,
        "tie_word_embeddings": config.text.tie_embeddings,
        # upstream asks the tokenizer; this helps a folder that has none
        "image_token_id": config.image_token_id,
    }
    # Upstream puts a null that is written out into the prompt, as the text "None".
    if config.system_message is not None:
        result["system_message"] = config.system_message
    return result


def _hf_json(
    config: InternVLConfig, tower: dict[str, Any], text: dict[str, Any], dtype: str
) -> dict[str, Any]:
    if config.pixel_shuffle != "v2":
        raise ValueError(
            f"pixel shuffle {config.pixel_shuffle!r} of this model does not exist in transformers; "
            "export to 'internvl' instead"
        )
    return {
        "model_type": "internvl",
        "architectures": ["InternVLForConditionalGeneration"],
        "dtype": dtype,
        "vision_config": tower,
        "text_config": text,
        "image_token_id": config.image_token_id,
        "image_seq_length": config.tokens_per_tile,
        "downsample_ratio": config.downsample_ratio,
        "vision_feature_layer": config.select_layer,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": config.text.tie_embeddings,
        EXTRA: {
            "text_kind": config.text.kind,
            "template": config.template,
            "system_message": config.system_message,
            "use_thumbnail": config.use_thumbnail,
            "dynamic_tiles": config.dynamic_tiles,
        },
    }


def _tower_json(config: InternVLConfig, layout: Layout) -> dict[str, Any]:
    vision = config.vision
    result = {
        "hidden_size": vision.hidden_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "intermediate_size": vision.mlp_size,
        "norm_type": vision.norm,
        "layer_norm_eps": vision.norm_eps,
        "hidden_act": "gelu",
    }
    if layout == "internvl":
        return result | {
            "model_type": "intern_vit_6b",  # of both towers
            "architectures": ["InternVisionModel"],
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "qkv_bias": vision.qkv_bias,
            "qk_normalization": vision.qk_norm,
        }
    return result | {
        "model_type": "internvl_vision",
        "architectures": ["InternVLVisionModel"],
        "image_size": [vision.image_size] * 2,
        "patch_size": [vision.patch_size] * 2,
        "attention_bias": vision.qkv_bias,
        "use_qk_norm": vision.qk_norm,
        "use_mask_token": False,
        "use_mean_pooling": True,
        "use_absolute_position_embeddings": True,
    }


def _text_base(source: dict[str, Any], layout: Layout, same: bool, dtype: str) -> dict[str, Any]:
    if same:
        kept = dict(source.get(_TEXT_SECTIONS[layout]) or {})
        kept.pop("rope_parameters", None)  # written as rope_theta and rope_scaling
        return _with_dtype(kept, dtype)
    other = source.get("text_config") or source.get("llm_config") or {}
    return {name: other[name] for name in _TOKEN_IDS if name in other}


def _text_json(text: TextConfig, layout: Layout) -> dict[str, Any]:
    # transformers has InternLM2 as Llama, to which it is equal once `wqkv` is split
    kind: TextKind = "llama" if layout == "hf" and text.kind == "internlm2" else text.kind
    scaling = None
    if text.rope_dynamic_factor is not None:
        scaling = {"type": "dynamic", "factor": text.rope_dynamic_factor}
        if layout == "hf":  # upstream's InternLM2Config takes exactly two keys
            scaling["rope_type"] = "dynamic"
    elif text.rope_scaling is not None:
        scaling = dataclasses.asdict(text.rope_scaling) | {"rope_type": "llama3"}
        scaling["original_max_position_embeddings"] = scaling.pop("original_max_position")
    result = {
        "model_type": kind,
        "architectures": [ARCHITECTURES[kind]],
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "head_dim": text.head_dim,
        "intermediate_size": text.mlp_size,
        "rope_theta": text.rope_theta,
        "rope_scaling": scaling,
        "max_position_embeddings": text.max_position,
        "rms_norm_eps": text.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": text.tie_embeddings,
    }
    return result | ({"bias": False} if kind == "internlm2" else {})


def _with_dtype(section: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A section whose own dtype fields, where it has them, tell that of the export."""
    return section | {name: dtype for name in ("dtype", "torch_dtype") if name in section}


def processor_files(config: InternVLConfig) -> dict[str, dict[str, Any]]:
    """Content of the files that transformers' processor reads, by file name."""
    size = config.vision.image_size
    images = {
        "image_processor_type": "GotOcr2ImageProcessor",
        "crop_to_patches": config.dynamic_tiles,
        "min_patches": config.min_tiles,
        "max_patches": config.max_tiles,
        "size": {"height": size, "width": size},
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,  # bicubic
        "processor_class": "InternVLProcessor",
    }
    processor = {
        "processor_class": "InternVLProcessor",
        "image_seq_length": config.tokens_per_tile,
    }
    return {"preprocessor_config.json": images, "processor_config.json": processor}
