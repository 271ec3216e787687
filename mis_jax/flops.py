"""Work of the model by formula, and what the chips can do: plain arithmetic over a configuration.

Counted are matrix products, two operations for each multiplication; norms, softmax and the lookup
of embeddings are not. Causal attention counts as half of the square (`causal=False` gives the
figure by the older convention). XLA's own count is not used: it takes the body of a scan once.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from mis_jax.config import Part
from mis_jax.model.config import InternVLConfig, TextConfig, VisionConfig

GIB = 2**30


@dataclass(frozen=True)
class Work:
    """Operations of a forward pass by part; `attention` is the decoder's."""

    vision: float
    projector: float
    decoder: float  # linear maps
    attention: float
    head: float

    @property
    def language(self) -> float:
        return self.decoder + self.attention + self.head

    @property
    def total(self) -> float:
        return self.vision + self.projector + self.language


def forward(
    config: InternVLConfig,
    *,
    tokens: float,
    tiles: float,
    squares: float,
    head_tokens: float | None = None,
    causal: bool = True,
) -> Work:
    """Forward pass over so many `tokens` in all and `tiles`.

    `squares` is the sum of the squares of the samples' lengths: samples that share a packed row do
    not look at each other. `head_tokens` get logits; all do without it.
    """
    text = config.text
    keys_per_query = squares * (0.5 if causal else 1.0)
    return Work(
        vision=tiles * tile_work(config.vision),
        projector=tiles * projector_work(config),
        decoder=2.0 * tokens * text.num_layers * layer_parameters(text),
        attention=4.0 * text.num_layers * text.num_heads * text.head_dim * keys_per_query,
        head=2.0
        * (tokens if head_tokens is None else head_tokens)
        * text.vocab_size
        * text.hidden_size,
    )


def training(work: Work, freeze: Iterable[Part] = (), *, lora_on: Iterable[str] = ()) -> float:
    """Forward and backward: a trained part costs three forward passes.

    A frozen part costs two when something before it is trained, since only its inputs need a
    gradient, and one when nothing is. A part with adapters (`lora_on`) is a frozen one whose inputs
    need theirs; the adapters' own products, about a hundredth at rank 16, are left out.
    """
    frozen, adapted = set(freeze), set(lora_on)
    parts: list[tuple[Part, float]] = [
        ("vision", work.vision), ("projector", work.projector), ("language", work.language)
    ]  # fmt: skip
    total, needs_gradient = 0.0, False
    for part, operations in parts:
        trained = part not in frozen and not adapted
        needs_gradient = needs_gradient or trained or part in adapted
        total += operations * (1 + needs_gradient + trained)
    return total


def layer_parameters(text: TextConfig) -> int:
    """Entries of the linear maps of one decoder layer."""
    heads = text.num_heads * text.head_dim
    kv_heads = text.num_kv_heads * text.head_dim
    attention = text.hidden_size * (2 * heads + 2 * kv_heads)
    return attention + 3 * text.hidden_size * text.mlp_size


def tile_work(vision: VisionConfig) -> float:
    """Forward pass of the vision tower over one tile; its attention looks both ways."""
    positions = vision.grid**2 + 1  # a class token
    width = vision.hidden_size
    layer = 4 * width**2 + 2 * width * vision.mlp_size
    linear = 2.0 * positions * vision.num_layers * layer
    attention = 4.0 * positions**2 * vision.num_layers * width
    patches = 2.0 * vision.grid**2 * 3 * vision.patch_size**2 * width
    return linear + attention + patches


def projector_work(config: InternVLConfig) -> float:
    """Forward pass of the projector over one tile."""
    wide, width = config.projector_input_size, config.text.hidden_size
    return 2.0 * config.tokens_per_tile * (wide * width + width**2)


@dataclass(frozen=True)
class Chip:
    """One chip: figures of the maker, or what is left of them in practice where said."""

    name: str
    peak: float  # bfloat16 products, operations a second, dense
    memory: float  # bytes that a program can have, of one device
    bandwidth: float  # of memory, bytes a second
    link: float  # bytes a second one way: of a link on TPUs, of all links of a chip on GPUs
    devices: int = 1  # JAX devices that one chip shows as

    @property
    def device_peak(self) -> float:
        return self.peak / self.devices

    @property
    def device_bandwidth(self) -> float:
        return self.bandwidth / self.devices


# Peaks, bandwidths and links of TPUs: "How to Scale Your Model" (TPU chapter) and Google Cloud's
# pages of each version. Memory: what libtpu 0.0.42's compiler says is available.
# GPUs: NVIDIA's data sheets of the SXM modules, without sparsity; memory is what an allocator of
# nine tenths or a little more leaves of 80 and 141 GB; NVLink is 450 GB/s one way, of which about
# 370 is seen in all-gathers.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 30.5 * GIB, 1.2e12, 4.5e10),
        Chip("v5e", 197e12, 15.75 * GIB, 8.1e11, 4.5e10),
        Chip("v5p", 459e12, 95.74 * GIB, 2.77e12, 9e10),
        Chip("v6e", 918e12, 31.25 * GIB, 1.64e12, 9e10),
        Chip("tpu7x", 2307e12, 94.75 * GIB, 7.37e12, 1e11, devices=2),
        Chip("h100", 989e12, 75 * GIB, 3.35e12, 3.7e11),
        Chip("h200", 989e12, 131 * GIB, 4.8e12, 3.7e11),
    )
}
_KINDS = {
    "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p",
    "TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "tpu7x",
}  # fmt: skip


def chip_of(device_kind: str) -> Chip | None:
    """The chip by JAX's name of it, such as 'TPU v5 lite' or 'NVIDIA H200'; None if unknown."""
    if device_kind in _KINDS:
        return CHIPS[_KINDS[device_kind]]
    # The PCIe and NVL boards share a name's beginning with the modules, and run slower.
    words = set(device_kind.upper().replace("-", " ").split())
    if not words & {"PCIE", "NVL"}:
        for name in ("h100", "h200"):
            if name.upper() in words:
                return CHIPS[name]
    return None
