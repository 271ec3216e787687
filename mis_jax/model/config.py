"""The shape of an InternVL model: vision tower, language model and what joins them."""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

TextKind = Literal["internlm2", "llama", "qwen2", "qwen3"]
#: Bounds of the sizes, several times those of any published model: a file that asks for a billion
#: layers is refused before anything is made for each of them.
LARGEST = {
    "hidden_size": 2**17,
    "num_layers": 1000,
    "num_heads": 2**12,
    "num_kv_heads": 2**12,
    "mlp_size": 2**20,
    "head_dim": 2**13,
    "vocab_size": 2**22,
    "max_position": 2**27,
    "original_max_position": 2**27,
    "image_size": 2**13,
    "patch_size": 2**10,
    "min_tiles": 1024,
    "max_tiles": 1024,
}


@dataclass(frozen=True)
class VisionConfig:
    """InternViT. Defaults are InternViT-300M (upstream `configuration_intern_vit.py`)."""

    hidden_size: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    mlp_size: int = 4096
    image_size: int = 448  # pixels, one side of a tile
    patch_size: int = 14  # pixels
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    qkv_bias: bool = True
    qk_norm: bool = False  # RMSNorm over the full width, before heads are split
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _check_numbers(self, "vision")
        _divides("vision num_heads", self.num_heads, "hidden_size", self.hidden_size)
        _divides("vision patch_size", self.patch_size, "image_size", self.image_size)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class Llama3Scaling:
    """Rotary scaling of Llama 3.1 and 3.2: slow rotations are slowed further, fast ones are kept.

    A rotation that goes round fewer than `low_freq_factor` times in `original_max_position` tokens
    is slowed by `factor`, one that goes round more than `high_freq_factor` times not at all.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def __post_init__(self) -> None:
        _check_numbers(self, "rope_scaling")


@dataclass(frozen=True)
class TextConfig:
    """One decoder for InternLM2/Llama, Qwen2 (qkv bias) and Qwen3 (per-head qk-norm)."""

    kind: TextKind
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    mlp_size: int
    head_dim: int
    rope_theta: float = 1e6
    rope_dynamic_factor: float | None = None  # dynamic NTK; None is plain rotary embedding
    rope_scaling: Llama3Scaling | None = None  # in its place
    max_position: int = 32768  # dynamic NTK starts beyond this length
    norm_eps: float = 1e-6
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        _check_numbers(self, "text")
        _divides("text num_kv_heads", self.num_kv_heads, "num_heads", self.num_heads)

    @property
    def qkv_bias(self) -> bool:
        return self.kind == "qwen2"

    @property
    def qk_norm(self) -> bool:
        return self.kind == "qwen3"


@dataclass(frozen=True)
class InternVLConfig:
    """The whole model, and the image settings that a checkpoint carries beside its weights."""

    vision: VisionConfig
    text: TextConfig
    image_token_id: int  # id of <IMG_CONTEXT>
    downsample_ratio: float = 0.5
    pixel_shuffle: Literal["v1", "v2"] = "v2"
    select_layer: int = -1
    min_tiles: int = 1
    max_tiles: int = 12
    use_thumbnail: bool = True
    dynamic_tiles: bool = True
    template: str = "internvl2_5"
    system_message: str | None = None  # None is the template's own

    def __post_init__(self) -> None:
        _check_numbers(self, "model")
        layers = self.vision.num_layers
        for name, least, most in (
            ("image_token_id", 0, LARGEST["vocab_size"]),
            ("select_layer", -layers - 1, layers),
        ):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise ValueError(f"{name} is {value!r:.40}; supported: {least} to {most}")

    @property
    def shuffle_factor(self) -> int:
        """Patches merged along one side into one image token."""
        return round(1 / self.downsample_ratio)

    @property
    def tokens_per_tile(self) -> int:
        return (self.vision.grid // self.shuffle_factor) ** 2

    @property
    def projector_input_size(self) -> int:
        return self.vision.hidden_size * self.shuffle_factor**2

    @property
    def untied(self) -> "InternVLConfig":
        """The same model with a head of its own."""
        return replace(self, text=replace(self.text, tie_embeddings=False))


def _check_numbers(config: Any, what: str) -> None:
    """Sizes are whole numbers within `LARGEST`, other numbers finite and above zero."""
    for field in fields(config):
        value, most = getattr(config, field.name), LARGEST.get(field.name)
        if most is not None and not (type(value) is int and 1 <= value <= most):
            raise ValueError(
                f"{what} {field.name} is {value!r:.40}; supported: a whole number from 1 to {most}"
            )
        if "float" in str(field.type) and not (
            value is None or (type(value) in (int, float) and 0 < value <= 1e30)
        ):
            raise ValueError(
                f"{what} {field.name} is {value!r:.40}; supported: a number above zero, up to 1e30"
            )


def _divides(what: str, divisor: int, of_what: str, number: int) -> None:
    if divisor <= 0 or number % divisor:
        raise ValueError(
            f"{what} {divisor} does not divide {of_what} {number}; "
            "check the checkpoint's config.json"
        )
