"""Write a random checkpoint of any model of the family, at any size, tokenizer included.

For tests and benchmarks: the files have the form of the published ones, the values are noise that
keeps activations finite. Values are drawn block by block, so that memory does not grow with the
model; every tensor of every layer is another one, and the same seed gives the same bytes.

    python tools/make_random_checkpoint.py internvl2_5-8b /data/random-8b
    python tools/make_random_checkpoint.py internvl3-38b small --layers 2 --shrink 16
"""

import dataclasses
import hashlib
import math
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import ml_dtypes
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent))
from random_tokenizer import write_internlm, write_qwen

from mis_jax.checkpoint import nnx_state
from mis_jax.checkpoint.convert import SHARD_BYTES, convert
from mis_jax.checkpoint.load import OpenCheckpoint
from mis_jax.checkpoint.parameter_source import Progress, is_stacked, layer_key
from mis_jax.model.config import InternVLConfig
from mis_jax.model.family import published
from mis_jax.terminal import bytes_bar, open_console

_BLOCK = 2**23  # values drawn from one seed
_QWEN_BASE = 151643  # first special token of Qwen2.5 and Qwen3
_ADDED = 9  # tokens of InternVL


@dataclasses.dataclass(frozen=True)
class Settings:
    """Example: python tools/make_random_checkpoint.py internvl2_5-8b /data/random-8b"""

    model: Annotated[str, tyro.conf.Positional]
    """A name of the family, such as internvl2_5-8b."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder to write; it must not exist yet."""
    format: Literal["internvl", "hf", "native"] = "internvl"
    """The original layout, transformers' or ours."""
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """Number format of the weights."""
    shard_size: float = SHARD_BYTES / 1e9
    """Largest safetensors file, in GB."""
    seed: int = 0
    """Other values for another seed."""
    layers: int | None = None
    """Layers of the language model; all of them without it."""
    vision_layers: int | None = None
    """Layers of the vision tower; all of them without it."""
    shrink: int = 1
    """Divide every width by this; heads and their grouping stay."""
    vocabulary: int | None = None
    """Rows of the embedding; special tokens move down with it."""
    image_size: int | None = None
    """Pixels of a tile's side, a multiple of 28."""


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    config = cut(
        published(settings.model),
        layers=settings.layers,
        vision_layers=settings.vision_layers,
        shrink=settings.shrink,
        vocabulary=settings.vocabulary,
        image_size=settings.image_size,
    )
    console = open_console(stderr=True)
    with bytes_bar(console) as bar:
        write(
            config,
            settings.out,
            settings.format,
            dtype=settings.dtype,
            seed=settings.seed,
            shard_bytes=int(settings.shard_size * 1e9),
            progress=bar.task("writing"),
        )
    total = sum(nnx_state.count(config).values())
    console.print(f"wrote {settings.out}: {settings.model}, {total:,} parameters, random")


def cut(
    config: InternVLConfig,
    *,
    layers: int | None = None,
    vision_layers: int | None = None,
    shrink: int = 1,
    vocabulary: int | None = None,
    image_size: int | None = None,
) -> InternVLConfig:
    """The same structure with fewer layers, narrower, or with a smaller vocabulary or tiles."""
    vision, text = config.vision, config.text
    if any(width % shrink for width in (vision.head_dim, text.head_dim, text.hidden_size)):
        raise ValueError(f"--shrink {shrink}: does not divide the model's widths; try 2, 4, 8, 16")
    vision = dataclasses.replace(
        vision,
        num_layers=vision_layers or vision.num_layers,
        hidden_size=vision.hidden_size // shrink,
        mlp_size=vision.mlp_size // shrink,
        image_size=image_size or vision.image_size,
    )
    rows = vocabulary or text.vocab_size
    text = dataclasses.replace(
        text,
        num_layers=layers or text.num_layers,
        hidden_size=text.hidden_size // shrink,
        mlp_size=text.mlp_size // shrink,
        head_dim=text.head_dim // shrink,
        vocab_size=rows,
    )
    image_token = config.image_token_id - (config.text.vocab_size - rows)
    return dataclasses.replace(config, vision=vision, text=text, image_token_id=image_token)


def write(
    config: InternVLConfig,
    out: Path,
    format: Literal["internvl", "hf", "native"] = "internvl",
    *,
    dtype: str = "bfloat16",
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write one checkpoint with its tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(config, Path(folder))
        opened = OpenCheckpoint(
            config, RandomSource(config, dtype, seed), dtype, Path(folder), original_json(config)
        )
        convert(opened, out, format, shard_bytes=shard_bytes, progress=progress)


def write_tokenizer(config: InternVLConfig, folder: Path) -> None:
    """The tokenizer that belongs to a model of the family, cut as its vocabulary is."""
    text = config.text
    if text.kind == "internlm2":
        pieces = text.vocab_size - _ADDED
        if pieces < 400:
            raise ValueError(f"--vocabulary {text.vocab_size}: at least 409 are needed")
        write_internlm(folder, pieces)
        return
    # The third of InternVL's tokens is <IMG_CONTEXT>; Qwen's own come before them.
    own = 26 if text.kind == "qwen3" else 22
    base = config.image_token_id - 2 - own
    if base < 256:
        raise ValueError(f"--vocabulary {text.vocab_size}: too few for 256 bytes and the tokens")
    write_qwen(folder, base, qwen3=text.kind == "qwen3")


def original_json(config: InternVLConfig) -> dict[str, Any]:
    """Fields of a published config.json that the network does not need."""
    text = config.text
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    if text.kind != "internlm2":
        first = config.image_token_id - 2 - (26 if text.kind == "qwen3" else 22)
        ids = {"bos_token_id": first, "eos_token_id": first}
    return {
        "model_type": "internvl_chat",
        "_commit_hash": None,
        "auto_map": {
            "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": "modeling_internvl_chat.InternVLChatModel",
        },
        "hidden_size": text.hidden_size,
        "output_attentions": False,
        "pad2square": False,
        "system_message": None,  # as InternVL3 has it
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "transformers_version": None,
        "llm_config": ids | {"attn_implementation": "flash_attention_2", "use_cache": False},
        "vision_config": {"attention_dropout": 0.0, "drop_path_rate": 0.1, "use_flash_attn": True},
    }


class RandomSource:
    """Noise by name, layer and seed; `mis_jax.checkpoint.parameter_source.ParameterSource`."""

    def __init__(self, config: InternVLConfig, dtype: str, seed: int):
        self._shapes = nnx_state.shapes(config)
        self._dtype, self._seed = dtype, seed

    def read(self, name: str, layer: int | None = None, rows: slice = slice(None)) -> np.ndarray:
        shape = self._shapes[name]
        if layer is None and is_stacked(name):
            return np.stack([self.read(name, i) for i in range(shape[0])])[rows]
        shape = shape if layer is None else shape[1:]
        first, last, _ = rows.indices(shape[0])
        row = math.prod(shape[1:])
        bits = self._bits(f"{name}/{layer}", first * row, last * row)
        return _values(bits, name, shape, self._dtype).reshape(-1, *shape[1:])

    def key(self, name: str, layer: int | None = None) -> str:
        return layer_key(name, layer)

    def _bits(self, what: str, start: int, stop: int) -> np.ndarray:
        """Random 16-bit words from `start` to `stop` of an endless run of them."""
        parts = []
        for block in range(start // _BLOCK, -(-stop // _BLOCK)):
            key = hashlib.sha256(f"{self._seed}/{what}/{block}".encode()).digest()
            words = min(_BLOCK, -(-(stop - block * _BLOCK) // 4) * 4)
            drawn = np.random.SFC64(int.from_bytes(key[:16], "little")).random_raw(words // 4)
            begin = block * _BLOCK
            parts.append(drawn.view(np.uint16)[max(start - begin, 0) : stop - begin])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _values(bits: np.ndarray, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Bits as numbers: random sign and mantissa over a fixed exponent."""
    signs, exponent = 0x8000, -7  # embeddings, biases
    if name.endswith("kernel") or name == "text.head":
        exponent = -1 - round(math.log2(shape[0] if name.endswith("kernel") else shape[1]) / 2)
    elif name.endswith("_scale"):  # of a residual branch, about a tenth
        signs, exponent = 0, -4
    elif "norm" in name and name.endswith("scale"):  # from 1 to 2
        signs, exponent = 0, 0
    low = bits & np.uint16(0x7F | signs)
    high = low | np.uint16((127 + exponent) << 7)
    if dtype != "float32":
        return high.view(ml_dtypes.bfloat16).astype(dtype)
    whole = high.astype(np.uint32) << 16  # the lower half must not be empty
    return (whole | (bits * np.uint16(40503))).view(np.float32)


if __name__ == "__main__":
    main()
