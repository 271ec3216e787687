"""The published models of the family as data: InternVL2.5, InternVL3 and InternVL3.5 (dense).

Sources: OpenGVLab/InternVL `README.md` (which tower with which language model), third-party copies
of the published config.json files, NVIDIA NeMo's Qwen2 and Qwen3 recipes (sizes), checked by the
parameter totals they give. A checkpoint's own config.json always wins over this table, which
serves planning, benchmarks and random weights.

Inferred, as no published file was at hand:

* The dynamic rotary factor 3.0 of InternVL2.5-26B (that of InternVL2-26B) and 2.0 of InternVL3-38B
  and -78B (that of the smaller ones); plain rotary embedding of InternVL2.5's Qwen2.5 models. It
  only matters for rows longer than `max_position`.
* `<IMG_CONTEXT>` 151671 of InternVL3.5: the third of nine tokens added after Qwen3's 151669.
* The vocabulary 128521 and `<IMG_CONTEXT>` 128514 of InternVL3-9B: InternLM3's 128512 tokens and
  the nine InternVL tokens in their usual order.
"""

from typing import Any

from mis_jax.model.config import InternVLConfig, TextConfig, VisionConfig

VIT_300M = VisionConfig()
VIT_6B = VisionConfig(
    hidden_size=3200,
    num_layers=45,
    num_heads=25,
    mlp_size=12800,
    norm="rms_norm",
    qkv_bias=False,
    qk_norm=True,
)

Sizes = tuple[int, int, int, int, int, int]
# width, layers, heads, key/value heads, head width, feed-forward width
_QWEN2_5: dict[str, Sizes] = {
    "0.5b": (896, 24, 14, 2, 64, 4864),
    "1.5b": (1536, 28, 12, 2, 128, 8960),
    "3b": (2048, 36, 16, 2, 128, 11008),
    "7b": (3584, 28, 28, 4, 128, 18944),
    "14b": (5120, 48, 40, 8, 128, 13824),
    "32b": (5120, 64, 40, 8, 128, 27648),
    "72b": (8192, 80, 64, 8, 128, 29568),
}
_QWEN3: dict[str, Sizes] = {
    "0.6b": (1024, 28, 16, 8, 128, 3072),
    "1.7b": (2048, 28, 16, 8, 128, 6144),
    "4b": (2560, 36, 32, 8, 128, 9728),
    "8b": (4096, 36, 32, 8, 128, 12288),
    "14b": (5120, 40, 40, 8, 128, 17408),
    "32b": (5120, 64, 64, 8, 128, 25600),
}
_INTERNLM2_5: dict[str, Sizes] = {
    "1.8b": (2048, 24, 16, 8, 128, 8192),
    "7b": (4096, 32, 32, 8, 128, 14336),
    "20b": (6144, 48, 48, 8, 128, 16384),
}
_INTERNLM3: dict[str, Sizes] = {"8b": (4096, 48, 32, 2, 128, 10240)}


def _sizes(sizes: Sizes) -> dict[str, Any]:
    names = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_size")
    return dict(zip(names, sizes, strict=True))


def _with_qwen2_5(tower: VisionConfig, size: str, factor: float | None) -> InternVLConfig:
    # 151674: the tokenizer's length; upstream's fine-tuning cut Qwen's padded table to it
    text = TextConfig(
        kind="qwen2", vocab_size=151674, rope_dynamic_factor=factor, **_sizes(_QWEN2_5[size])
    )
    return InternVLConfig(vision=tower, text=text, image_token_id=151667)


def _with_qwen3(tower: VisionConfig, size: str) -> InternVLConfig:
    text = TextConfig(kind="qwen3", vocab_size=151936, max_position=40960, **_sizes(_QWEN3[size]))
    return InternVLConfig(vision=tower, text=text, image_token_id=151671)


def _with_internlm2_5(tower: VisionConfig, size: str, factor: float) -> InternVLConfig:
    text = TextConfig(
        kind="internlm2",
        vocab_size=92553,
        norm_eps=1e-5,
        rope_dynamic_factor=factor,
        **_sizes(_INTERNLM2_5[size]),
    )
    return InternVLConfig(vision=tower, text=text, image_token_id=92546)


def _with_internlm3(tower: VisionConfig, size: str) -> InternVLConfig:
    text = TextConfig(
        kind="internlm2",  # published in InternLM2's code and tensor names
        vocab_size=128521,
        norm_eps=1e-5,
        rope_theta=5e7,
        rope_dynamic_factor=6.0,
        **_sizes(_INTERNLM3[size]),
    )
    return InternVLConfig(vision=tower, text=text, image_token_id=128514)


#: Every published dense size by its name in lower case.
FAMILY: dict[str, InternVLConfig] = {
    "internvl2_5-1b": _with_qwen2_5(VIT_300M, "0.5b", None),
    "internvl2_5-2b": _with_internlm2_5(VIT_300M, "1.8b", 2.0),
    "internvl2_5-4b": _with_qwen2_5(VIT_300M, "3b", None),
    "internvl2_5-8b": _with_internlm2_5(VIT_300M, "7b", 2.0),
    "internvl2_5-26b": _with_internlm2_5(VIT_6B, "20b", 3.0),
    "internvl2_5-38b": _with_qwen2_5(VIT_6B, "32b", None),
    "internvl2_5-78b": _with_qwen2_5(VIT_6B, "72b", None),
    "internvl3-1b": _with_qwen2_5(VIT_300M, "0.5b", 2.0),
    "internvl3-2b": _with_qwen2_5(VIT_300M, "1.5b", 2.0),
    "internvl3-8b": _with_qwen2_5(VIT_300M, "7b", 2.0),
    "internvl3-9b": _with_internlm3(VIT_300M, "8b"),
    "internvl3-14b": _with_qwen2_5(VIT_300M, "14b", 2.0),
    "internvl3-38b": _with_qwen2_5(VIT_6B, "32b", 2.0),
    "internvl3-78b": _with_qwen2_5(VIT_6B, "72b", 2.0),
    "internvl3_5-1b": _with_qwen3(VIT_300M, "0.6b"),
    "internvl3_5-2b": _with_qwen3(VIT_300M, "1.7b"),
    "internvl3_5-4b": _with_qwen3(VIT_300M, "4b"),
    "internvl3_5-8b": _with_qwen3(VIT_300M, "8b"),
    "internvl3_5-14b": _with_qwen3(VIT_300M, "14b"),
    "internvl3_5-38b": _with_qwen3(VIT_6B, "32b"),
}


def published(name: str) -> InternVLConfig:
    """Configuration of a published model, such as 'internvl2_5-8b'; ValueError lists them all."""
    config = FAMILY.get(name.lower())
    if config is None:
        raise ValueError(f"model '{name}' is not known; choose from {', '.join(FAMILY)}")
    return config
