"""transformers' InternVL on random weights: the model that ours must equal."""

from pathlib import Path

import numpy as np
import torch
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

IMAGE_SIZE = 56  # pixels; 4 x 4 patches, 4 tokens a tile
TOKENS_PER_TILE = 4
IMAGE_TOKEN = 90
VOCAB = 131
PAD = 0
TIE = 1e-4  # where the two best logits lie closer, either token is right

TEXTS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
TOWERS = {
    "layer_norm": dict(norm_type="layer_norm", attention_bias=True, use_qk_norm=False),
    "rms_norm": dict(norm_type="rms_norm", attention_bias=False, use_qk_norm=True),
}


def reference_config(
    text: str, tower: str, *, tied: bool = False, **text_changes
) -> InternVLConfig:
    sizes = dict(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        rms_norm_eps=1e-5, rope_theta=10000.0, bos_token_id=1, eos_token_id=2, pad_token_id=PAD,
        head_dim=24 if text == "qwen3" else 12,
    )  # fmt: skip
    vision = InternVLVisionConfig(
        hidden_size=40, num_hidden_layers=3, num_attention_heads=4, intermediate_size=72,
        image_size=[IMAGE_SIZE] * 2, patch_size=[14, 14], layer_norm_eps=1e-6, **TOWERS[tower],
    )  # fmt: skip
    return InternVLConfig(
        vision_config=vision,
        text_config=TEXTS[text](**(sizes | text_changes)),
        image_token_id=IMAGE_TOKEN,
        tie_word_embeddings=tied,
    )


def reference_model(config: InternVLConfig, seed: int) -> InternVLForConditionalGeneration:
    """Every parameter random, norms and layer scales included, so that none can be forgotten."""
    torch.manual_seed(seed)
    model = InternVLForConditionalGeneration(config).eval().to(torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "lambda" in name:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            else:
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 16
                parameter.copy_(torch.randn_like(parameter) * fan_in**-0.5)
    return model


def save(model: InternVLForConditionalGeneration, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def random_rows(rng: np.random.Generator, image_tiles: list[list[int]], *, extra: int = 12):
    """One row of ids per entry: text, then for every image its tiles' tokens, then text."""
    rows = []
    for tiles in image_tiles:
        row = list(rng.integers(3, IMAGE_TOKEN, extra))
        for count in tiles:
            row += [IMAGE_TOKEN] * (TOKENS_PER_TILE * count)
            row += list(rng.integers(3, IMAGE_TOKEN, int(rng.integers(1, 6))))
        rows.append(np.array(row, np.int64))
    return rows


def random_tiles(rng: np.random.Generator, image_tiles: list[list[int]]) -> list[np.ndarray]:
    return [
        rng.integers(0, 256, (sum(t), IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
        for t in image_tiles
    ]


def pixel_values(tiles: list[np.ndarray]) -> torch.Tensor | None:
    """Normalised tiles of all rows, channels first, as transformers takes them."""
    if not sum(len(t) for t in tiles):
        return None
    pixels = np.concatenate(tiles).astype(np.float32) / 255
    pixels = (pixels - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


def assert_best_tokens(
    model, row: np.ndarray, tiles: np.ndarray, answer: list[int], prompt: str
) -> int:
    """Every token of an answer is the one that `generate` would take after those before it.

    One pass over prompt and answer, alone and unpadded, tells it in a fraction of the time. Tokens
    near a tie are passed over. Returns how many were compared.
    """
    ids = torch.from_numpy(np.append(row, answer))[None]
    pixels = pixel_values([tiles])
    with torch.no_grad():
        output = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **({} if pixels is None else {"pixel_values": pixels}),
            logits_to_keep=len(answer) + 1,
        )
    logits = output.logits[0, :-1]
    best = logits.topk(2)
    sure = (best.values[:, 0] - best.values[:, 1]).numpy() > TIE
    np.testing.assert_array_equal(np.array(answer)[sure], best.indices[:, 0].numpy()[sure], prompt)
    return int(sure.sum())
