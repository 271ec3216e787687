"""`config.json` of the three formats -> `InternVLConfig`; `config_writer.py` is the way back.

Names and defaults of the fields: OpenGVLab/InternVL `configuration_intern_vit.py` and
`configuration_internvl_chat.py`; transformers `configuration_internvl.py` and the text models'.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from mis_jax.checkpoint.hf.unsupported import check_model_folder, check_not_quantized
from mis_jax.model.config import (
    LARGEST,
    InternVLConfig,
    Llama3Scaling,
    TextConfig,
    TextKind,
    VisionConfig,
)
from mis_jax.storage.folders import NOTICE
from mis_jax.storage.json_files import REQUIRED, Fields, read_json, token_number

Format = Literal["native", "hf", "internvl"]
NATIVE_VERSION = 2
IMAGE_TOKEN = "<IMG_CONTEXT>"
#: What transformers' config.json has no field for goes under this key of an export, and comes back.
EXTRA = "mis_jax"

ARCHITECTURES: dict[TextKind, str] = {
    "internlm2": "InternLM2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_TEXT_KINDS: dict[str, TextKind] = {name: kind for kind, name in ARCHITECTURES.items()}
_TEXT_MODEL_TYPES: dict[str, TextKind] = {
    **{kind: kind for kind in ARCHITECTURES},
    "internlm3": "internlm2",  # InternVL3-9B, whose code and tensors are InternLM2's
}
_DENSE = "InternLM2, Llama, Qwen2 and Qwen3 dense decoders (no mixture of experts, no gpt-oss)"


def detect_format(folder: Path) -> Format:
    """Which of the three formats a checkpoint folder holds; ValueError when it is none."""
    check_model_folder(folder)
    if (folder / NOTICE).exists():
        raise ValueError(
            f"{folder}: not finished: run the same mis-jax command again to finish it, or remove it"
        )
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise ValueError(
            f"{folder}: a LoRA adapter, no model; generate, chat, serve and eval take it with its "
            f"base model (BASE --adapter {folder}), or merge it first: mis-jax convert BASE DST "
            f"--format native --adapter {folder}"
        )
    raw = read_json(folder / "config.json")
    if raw.get("format") == "mis_jax":
        return "native"
    formats: dict[str, Format] = {"internvl": "hf", "internvl_chat": "internvl"}
    model_type = raw.get("model_type")
    if model_type not in formats:
        raise ValueError(
            f"{folder / 'config.json'}: field 'model_type' is {model_type!r}; supported: "
            "'internvl_chat' (original), 'internvl' (transformers), or mis_jax's own format"
        )
    return formats[model_type]


def read_config(folder: Path) -> tuple[InternVLConfig, dict[str, Any]]:
    """Configuration of a checkpoint folder and its raw config.json; ValueError when unsuited."""
    path = folder / "config.json"
    kind = detect_format(folder)
    raw = read_json(path)
    fields = Fields(path, raw)
    check_not_quantized(fields)
    try:
        if kind == "native":
            config = _from_native(fields)
        else:
            config = _from_hf(folder, fields) if kind == "hf" else _from_internvl(folder, fields)
    except ValueError as error:  # sizes that do not go together
        named = str(error).startswith(str(folder))
        raise error if named else ValueError(f"{path}: {error}") from None
    if not 0 <= config.image_token_id < config.text.vocab_size:
        raise ValueError(
            f"{path}: the id of {IMAGE_TOKEN} is {config.image_token_id}, outside the vocabulary "
            f"of {config.text.vocab_size}; config and tokenizer must be of one checkpoint"
        )
    return config, raw


def _from_native(fields: Fields) -> InternVLConfig:
    version = fields.get("version", None)
    if version != NATIVE_VERSION:
        raise ValueError(
            f"{fields.path}: field 'version' is {version!r}, this mis_jax reads "
            f"{NATIVE_VERSION}; convert the checkpoint again from its published form"
        )
    content = dict(fields.section("config").values)
    try:
        vision, text = VisionConfig(**content.pop("vision")), dict(content.pop("text"))
        if text.get("rope_scaling") is not None:
            text["rope_scaling"] = Llama3Scaling(**text["rope_scaling"])
        return InternVLConfig(vision=vision, text=TextConfig(**text), **content)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{fields.path}: field 'config' is not readable ({error}); "
            "convert the checkpoint again from its published form"
        ) from None


def _from_internvl(folder: Path, fields: Fields) -> InternVLConfig:
    vision, text = fields.section("vision_config"), fields.section("llm_config")
    fields.one_of("pad2square", [False], False)
    tower = VisionConfig(
        **_tower_sizes(vision),
        norm=vision.one_of("norm_type", ["layer_norm", "rms_norm"], "rms_norm"),
        qkv_bias=vision.flag("qkv_bias", False),
        qk_norm=vision.flag("qk_normalization", True),
    )
    # Another size than the tower's own would need its position embeddings interpolated.
    fields.one_of("force_image_size", [tower.image_size], tower.image_size)
    return InternVLConfig(
        vision=tower,
        text=text_config(text, tied=text.flag("tie_word_embeddings", False)),
        image_token_id=image_token_id(folder, fields),
        downsample_ratio=_downsample_ratio(fields, tower),
        pixel_shuffle=fields.one_of("ps_version", ["v1", "v2"], "v1"),
        select_layer=_select_layer(fields, "select_layer", tower),
        min_tiles=_size(fields, "min_dynamic_patch", "min_tiles", 1),
        max_tiles=_size(fields, "max_dynamic_patch", "max_tiles", 6),
        use_thumbnail=fields.flag("use_thumbnail", False),
        dynamic_tiles=fields.flag("dynamic_image_size", False),
        template=fields.text("template", "internvl2_5"),
        system_message=fields.text("system_message", None),
    )


def _from_hf(folder: Path, fields: Fields) -> InternVLConfig:
    vision = fields.section("vision_config")
    vision.one_of("use_mask_token", [False], False)
    vision.one_of("use_mean_pooling", [True], True)
    vision.one_of("use_absolute_position_embeddings", [True], True)
    fields.one_of("vision_feature_select_strategy", ["default"], "default")
    fields.one_of("projector_hidden_act", ["gelu"], "gelu")
    tower = VisionConfig(
        **_tower_sizes(vision),
        norm=vision.one_of("norm_type", ["layer_norm", "rms_norm"], "layer_norm"),
        qkv_bias=vision.flag("attention_bias", False),
        qk_norm=vision.flag("use_qk_norm", False),
    )
    text = text_config(fields.section("text_config"), tied=fields.flag("tie_word_embeddings", True))
    images, extra = _image_settings(folder), fields.section(EXTRA, {})
    kind = text.kind
    if kind == "llama":  # what transformers has InternLM2 as
        kind = extra.one_of("text_kind", ["llama", "internlm2"], kind)
    return InternVLConfig(
        vision=tower,
        text=dataclasses.replace(text, kind=kind),
        image_token_id=fields.whole("image_token_id", 151667),
        downsample_ratio=_downsample_ratio(fields, tower),
        select_layer=_select_layer(fields, "vision_feature_layer", tower),
        min_tiles=_size(images, "min_patches", "min_tiles", 1),
        max_tiles=_size(images, "max_patches", "max_tiles", 12),
        use_thumbnail=extra.flag("use_thumbnail", True),
        dynamic_tiles=extra.flag("dynamic_tiles", True),
        template=extra.text("template", "internvl2_5"),
        system_message=extra.text("system_message", None),
    )


def _image_settings(folder: Path) -> Fields:
    """transformers keeps them in a file of their own, or (5.x) inside the processor's."""
    path = folder / "preprocessor_config.json"
    if path.exists():
        return Fields(path, read_json(path))
    path = folder / "processor_config.json"
    return Fields(path, read_json(path) if path.exists() else {}).section("image_processor", {})


def _tower_sizes(vision: Fields) -> dict[str, Any]:
    vision.one_of("hidden_act", ["gelu"], "gelu")  # the exact one
    return dict(
        hidden_size=_size(vision, "hidden_size", "hidden_size"),
        num_layers=_size(vision, "num_hidden_layers", "num_layers"),
        num_heads=_size(vision, "num_attention_heads", "num_heads"),
        mlp_size=_size(vision, "intermediate_size", "mlp_size"),
        image_size=_square(vision, "image_size"),
        patch_size=_square(vision, "patch_size"),
        norm_eps=vision.number("layer_norm_eps", 1e-6),
    )


def _square(vision: Fields, name: str) -> int:
    value = vision.get(name)
    sides = value if isinstance(value, list) and value else [value]
    if any(side != sides[0] for side in sides) or not isinstance(sides[0], int):
        vision.refuse(name, "one whole number, or two that are equal")
    if not 0 < sides[0] <= LARGEST[name]:
        vision.refuse(name, f"1 to {LARGEST[name]}")
    return sides[0]


def _size(fields: Fields, name: str, ours: str, default: Any = REQUIRED) -> int:
    """A size under the file's name, within the bounds of ours."""
    return fields.count(name, default, most=LARGEST[ours])


def _downsample_ratio(fields: Fields, tower: VisionConfig) -> float:
    ratio = fields.number("downsample_ratio", 0.5)
    factor = round(1 / ratio)
    if factor < 1 or abs(factor * ratio - 1) > 1e-6 or tower.grid % factor:
        fields.refuse("downsample_ratio", f"1/n with n a divisor of {tower.grid} patches a side")
    return ratio


def _select_layer(fields: Fields, name: str, tower: VisionConfig) -> int:
    layer = fields.whole(name, -1)
    if not -tower.num_layers - 1 <= layer <= tower.num_layers:
        fields.refuse(name, f"a layer of the {tower.num_layers} there are, such as -1")
    return layer


def text_config(fields: Fields, *, tied: bool) -> TextConfig:
    """Shape of a language model; `tied` says whether its embedding serves as its head."""
    check_not_quantized(fields)
    kind = _text_kind(fields)
    fields.one_of("hidden_act", ["silu"], "silu")
    fields.one_of("use_sliding_window", [False], False)
    if set(fields.get("layer_types", [])) - {"full_attention"}:
        fields.refuse("layer_types", "'full_attention' in every layer")
    heads = _size(fields, "num_attention_heads", "num_heads")
    width = _size(fields, "hidden_size", "hidden_size")
    return TextConfig(
        kind=kind,
        vocab_size=_size(fields, "vocab_size", "vocab_size"),
        hidden_size=width,
        num_layers=_size(fields, "num_hidden_layers", "num_layers"),
        num_heads=heads,
        num_kv_heads=_size(fields, "num_key_value_heads", "num_kv_heads", heads),
        mlp_size=_size(fields, "intermediate_size", "mlp_size"),
        # 128 is Qwen3Config's default; its heads need not divide the width
        head_dim=_size(fields, "head_dim", "head_dim", 128 if kind == "qwen3" else width // heads),
        **_rotary(fields),
        max_position=_size(fields, "max_position_embeddings", "max_position", 32768),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        tie_embeddings=tied,
    )


def _text_kind(fields: Fields) -> TextKind:
    """Architecture and model type must both be known, where they are named, and agree."""
    names = fields.get("architectures", None)
    architecture = names[0] if isinstance(names, list) and names else names
    model_type = fields.get("model_type", None)
    kind = _TEXT_KINDS.get(architecture) if isinstance(architecture, str) else None
    if architecture is not None and kind is None:
        fields.refuse("architectures", _DENSE)
    other = _TEXT_MODEL_TYPES.get(model_type) if isinstance(model_type, str) else None
    if model_type is not None and other is None:
        fields.refuse("model_type", _DENSE)
    if kind and other and kind != other:
        fields.refuse("model_type", f"what goes with the field 'architectures', {architecture!r}")
    found = kind or other
    if found is None:
        fields.refuse("model_type", _DENSE)
    return found


def _rotary(fields: Fields) -> dict[str, Any]:
    """The base, and what scales it: dynamic NTK, Llama 3.1's scaling, or nothing.

    Older files have `rope_theta` and `rope_scaling`; transformers 5 has both in `rope_parameters`.
    """
    rope = fields.section("rope_parameters", {})
    scaling = fields.section("rope_scaling", {}) if fields.get("rope_scaling", None) else rope
    name = "rope_type" if "rope_type" in scaling.values else "type"
    kind = scaling.one_of(name, ["default", "dynamic", "llama3"], "default")
    rope.one_of("partial_rotary_factor", [1.0], 1.0)
    owner = rope if rope.get("rope_theta", None) else fields
    result: dict[str, Any] = {"rope_theta": owner.number("rope_theta", 10000.0)}
    if kind == "dynamic":
        result["rope_dynamic_factor"] = scaling.number("factor")
    elif kind == "llama3":
        result["rope_scaling"] = _llama3(scaling)
    return result


def _llama3(scaling: Fields) -> Llama3Scaling:
    low = scaling.number("low_freq_factor")
    high = scaling.number("high_freq_factor")
    if high <= low:
        scaling.refuse("high_freq_factor", f"a number above low_freq_factor, {low}")
    length = _size(scaling, "original_max_position_embeddings", "original_max_position")
    return Llama3Scaling(scaling.number("factor"), low, high, length)


def image_token_id(folder: Path, fields: Fields) -> int:
    """Id of <IMG_CONTEXT>: from the tokenizer's JSON files, else from a field of our exports."""
    path = folder / "tokenizer_config.json"
    if path.exists():
        tokens = Fields(path, read_json(path)).section("added_tokens_decoder", {})
        for number, token in tokens.values.items():
            if isinstance(token, dict) and token.get("content") == IMAGE_TOKEN:
                if (found := token_number(number)) is None:
                    tokens.refuse(number, f"the id of {IMAGE_TOKEN}, a whole number, as its key")
                return found
    path = folder / "added_tokens.json"
    if path.exists() and IMAGE_TOKEN in (added := read_json(path)):
        return Fields(path, added).whole(IMAGE_TOKEN)
    path = folder / "tokenizer.json"
    if path.exists():
        added_tokens = read_json(path).get("added_tokens") or []
        for token in added_tokens if isinstance(added_tokens, list) else ():
            if isinstance(token, dict) and token.get("content") == IMAGE_TOKEN:
                return Fields(path, token).whole("id")
    if fields.get("image_token_id", None) is not None:
        return fields.whole("image_token_id")
    raise ValueError(
        f"{folder}: no tokenizer file names {IMAGE_TOKEN}; copy tokenizer_config.json or "
        "added_tokens.json of the published checkpoint beside config.json"
    )
