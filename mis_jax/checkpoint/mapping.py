"""The two published layouts of InternVL weights, each one table read both ways.

`internvl` is the original `internvl_chat` layout (InternLM2's `wqkv` grouped by key/value head);
`hf` is transformers' own. A rule names their key, our parameter(s) and the codec between them.
Sources: OpenGVLab/InternVL `modeling_*.py`; transformers `modeling_internvl.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from mis_jax.model.config import InternVLConfig, TextConfig

Layout = Literal["internvl", "hf"]
Shape = tuple[int, ...]
Arrays = Sequence[np.ndarray]


@dataclass(frozen=True)
class Codec:
    """How one of their tensors becomes our array(s) of one layer, and back."""

    to_ours: Callable[[np.ndarray, InternVLConfig], Arrays]
    to_theirs: Callable[[Arrays, InternVLConfig], np.ndarray]
    their_shape: Callable[[Sequence[Shape], InternVLConfig], Shape]


@dataclass(frozen=True)
class Rule:
    """`theirs` with `{i}` for the layer, where our parameters are stacked over layers."""

    theirs: str
    ours: tuple[str, ...]
    codec: Codec

    @property
    def per_layer(self) -> bool:
        return "{i}" in self.theirs


COPY = Codec(lambda t, c: [t], lambda o, c: o[0], lambda s, c: s[0])
LINEAR = Codec(lambda t, c: [t.T], lambda o, c: o[0].T, lambda s, c: s[0][::-1])
CLASS_TOKEN = Codec(
    lambda t, c: [t.reshape(-1)], lambda o, c: o[0].reshape(1, 1, -1), lambda s, c: (1, 1, *s[0])
)
POSITIONS = Codec(lambda t, c: [t[0]], lambda o, c: o[0][None], lambda s, c: (1, *s[0]))


def _patch_shape(config: InternVLConfig) -> Shape:
    vision = config.vision
    return vision.hidden_size, 3, vision.patch_size, vision.patch_size


# torch's convolution [out, colour, y, x] and our product over flattened (y, x, colour)
PATCH_CONV = Codec(
    lambda t, c: [t.transpose(2, 3, 1, 0).reshape(-1, t.shape[0])],
    lambda o, c: (
        o[0].T.reshape(-1, c.vision.patch_size, c.vision.patch_size, 3).transpose(0, 3, 1, 2)
    ),
    lambda s, c: _patch_shape(c),
)
FUSED_QKV = Codec(  # rows q, k, v
    lambda t, c: [part.T for part in np.split(t, 3)],
    lambda o, c: np.concatenate([part.T for part in o]),
    lambda s, c: (3 * s[0][1], s[0][0]),
)
FUSED_QKV_BIAS = Codec(
    lambda t, c: np.split(t, 3), lambda o, c: np.concatenate(o), lambda s, c: (3 * s[0][0],)
)


def _split_grouped(wqkv: np.ndarray, config: InternVLConfig) -> Arrays:
    """InternLM2: for every key/value head its query heads, then one key, then one value head."""
    text = config.text
    group = text.num_heads // text.num_kv_heads
    heads = wqkv.reshape(text.num_kv_heads, group + 2, text.head_dim, -1)
    parts = heads[:, :group], heads[:, group], heads[:, group + 1]
    return [part.reshape(-1, wqkv.shape[-1]).T for part in parts]


def _join_grouped(ours: Arrays, config: InternVLConfig) -> np.ndarray:
    text = config.text
    width = ours[0].shape[0]
    q, k, v = (part.T.reshape(text.num_kv_heads, -1, text.head_dim, width) for part in ours)
    return np.concatenate([q, k, v], axis=1).reshape(-1, width)


GROUPED_QKV = Codec(
    _split_grouped, _join_grouped, lambda s, c: (sum(part[1] for part in s), s[0][0])
)


def rules(layout: Layout, config: InternVLConfig) -> list[Rule]:
    """Every tensor of a checkpoint in `layout`, for this model."""
    return [*_vision(layout, config), *_projector(layout), *_text(layout, config.text)]


def _with_bias(theirs: str, ours: str) -> list[Rule]:
    return [
        Rule(f"{theirs}.weight", (f"{ours}.kernel",), LINEAR),
        Rule(f"{theirs}.bias", (f"{ours}.bias",), COPY),
    ]


def _norm(theirs: str, ours: str, *, bias: bool) -> list[Rule]:
    weight = [Rule(f"{theirs}.weight", (f"{ours}.scale",), COPY)]
    return weight + ([Rule(f"{theirs}.bias", (f"{ours}.bias",), COPY)] if bias else [])


def _vision(layout: Layout, config: InternVLConfig) -> list[Rule]:
    vision = config.vision
    block = "vision.layers.block"
    bias = vision.norm == "layer_norm"
    if layout == "internvl":
        root, layer = "vision_model.embeddings", "vision_model.encoder.layers.{i}"
        names = ("class_embedding", "position_embedding", "patch_embedding")
        scales, norms = ("ls1", "ls2"), ("norm1", "norm2")
        attention, out = f"{layer}.attn", "proj"
    else:
        root, layer = "vision_tower.embeddings", "vision_tower.encoder.layer.{i}"
        names = ("cls_token", "position_embeddings", "patch_embeddings.projection")
        scales, norms = ("lambda_1", "lambda_2"), ("layernorm_before", "layernorm_after")
        attention, out = f"{layer}.attention", "projection_layer"
    result = [
        Rule(f"{root}.{names[0]}", ("vision.class_embed",), CLASS_TOKEN),
        Rule(f"{root}.{names[1]}", ("vision.position_embed",), POSITIONS),
        Rule(f"{root}.{names[2]}.weight", ("vision.patch_embed.kernel",), PATCH_CONV),
        Rule(f"{root}.{names[2]}.bias", ("vision.patch_embed.bias",), COPY),
        Rule(f"{layer}.{scales[0]}", (f"{block}.attention_scale",), COPY),
        Rule(f"{layer}.{scales[1]}", (f"{block}.mlp_scale",), COPY),
        *_norm(f"{layer}.{norms[0]}", f"{block}.attention_norm", bias=bias),
        *_norm(f"{layer}.{norms[1]}", f"{block}.mlp_norm", bias=bias),
        *_with_bias(f"{attention}.{out}", f"{block}.attention.out"),
        *_with_bias(f"{layer}.mlp.fc1", f"{block}.up"),
        *_with_bias(f"{layer}.mlp.fc2", f"{block}.down"),
    ]
    if vision.qk_norm:
        result += _norm(f"{attention}.q_norm", f"{block}.attention.q_norm", bias=False)
        result += _norm(f"{attention}.k_norm", f"{block}.attention.k_norm", bias=False)
    ours = [f"{block}.attention.{part}" for part in "qkv"]
    if layout == "internvl":
        kernels = tuple(f"{part}.kernel" for part in ours)
        result.append(Rule(f"{attention}.qkv.weight", kernels, FUSED_QKV))
        if vision.qkv_bias:
            biases = tuple(f"{part}.bias" for part in ours)
            result.append(Rule(f"{attention}.qkv.bias", biases, FUSED_QKV_BIAS))
    else:
        for part, our in zip("qkv", ours, strict=True):
            pair = _with_bias(f"{attention}.{part}_proj", our)
            result += pair if vision.qkv_bias else pair[:1]
    return result


def _projector(layout: Layout) -> list[Rule]:
    if layout == "internvl":
        norm, first, second = "mlp1.0", "mlp1.1", "mlp1.3"
    else:
        root = "multi_modal_projector"
        norm, first, second = f"{root}.layer_norm", f"{root}.linear_1", f"{root}.linear_2"
    return [
        *_norm(norm, "projector.norm", bias=True),
        *_with_bias(first, "projector.first"),
        *_with_bias(second, "projector.second"),
    ]


def decoder_rules(text: TextConfig) -> list[Rule]:
    """Every tensor of a language model alone, under the keys of its own class."""
    root = "language_model."
    return [
        replace(rule, theirs=rule.theirs.removeprefix(root)) for rule in _text("internvl", text)
    ]


def _text(layout: Layout, text: TextConfig) -> list[Rule]:
    block = "text.layers.block"
    root = "language_model.model" if layout == "internvl" else "language_model"
    layer = f"{root}.layers.{{i}}"
    kernel = {
        our: (f"{block}.{our}.kernel",)
        for our in (
            "attention.q",
            "attention.k",
            "attention.v",
            "attention.out",
            "gate",
            "up",
            "down",
        )
    }
    if layout == "internvl" and text.kind == "internlm2":
        fused = sum((kernel[f"attention.{part}"] for part in "qkv"), ())
        embedding = f"{root}.tok_embeddings.weight"
        norms = "attention_norm", "ffn_norm"
        linears = {
            "attention.wo": "attention.out",
            "feed_forward.w1": "gate",
            "feed_forward.w3": "up",
            "feed_forward.w2": "down",
        }
        result = [Rule(f"{layer}.attention.wqkv.weight", fused, GROUPED_QKV)]
    else:
        embedding = f"{root}.embed_tokens.weight"
        norms = "input_layernorm", "post_attention_layernorm"
        linears = {f"self_attn.{part}_proj": f"attention.{part}" for part in "qkv"}
        linears |= {"self_attn.o_proj": "attention.out"}
        linears |= {f"mlp.{part}_proj": part for part in ("gate", "up", "down")}
        result = []
    result += [
        Rule(f"{layer}.{theirs}.weight", kernel[our], LINEAR) for theirs, our in linears.items()
    ]
    result += _norm(f"{layer}.{norms[0]}", f"{block}.attention_norm", bias=False)
    result += _norm(f"{layer}.{norms[1]}", f"{block}.mlp_norm", bias=False)
    if text.qkv_bias:
        result += [
            Rule(f"{layer}.self_attn.{p}_proj.bias", (f"{block}.attention.{p}.bias",), COPY)
            for p in "qkv"
        ]
    if text.qk_norm:
        result += _norm(f"{layer}.self_attn.q_norm", f"{block}.attention.q_norm", bias=False)
        result += _norm(f"{layer}.self_attn.k_norm", f"{block}.attention.k_norm", bias=False)
    result += _norm(f"{root}.norm", "text.norm", bias=False)
    result.append(Rule(embedding, ("text.embedding",), COPY))
    if not text.tie_embeddings:
        result.append(Rule(head_key(layout, text), ("text.head",), COPY))
    return result


def head_key(layout: Layout, text: TextConfig) -> str:
    """Their key of the language model's head, which a tied model may have or not."""
    if layout == "hf":
        return "lm_head.weight"
    internlm2 = text.kind == "internlm2"
    return f"language_model.{'output' if internlm2 else 'lm_head'}.weight"


def normal_key(layout: Layout, key: str) -> str:
    """Their key in the form of the table: transformers' in-memory and on-disk names differ."""
    if layout == "internvl":
        return key
    key = key.removeprefix("model.")
    for old, new in (
        ("language_model.model.", "language_model."),
        ("language_model.lm_head.", "lm_head."),
    ):
        if key.startswith(old):
            key = new + key.removeprefix(old)
    return key


def disk_key(layout: Layout, key: str) -> str:
    """The key under which `save_pretrained` of the layout writes to disk."""
    if layout == "hf" and key.startswith("language_model."):
        return "language_model.model." + key.removeprefix("language_model.")
    if layout == "hf" and key.startswith("lm_head."):
        return "language_model." + key
    return key
