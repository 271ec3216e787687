"""LoRA in memory: thin factors of kernels, PEFT's names for them, and merging on the way.

PEFT gives a linear map `W` [out, in] the factors `lora_A` [rank, in] and `lora_B` [out, rank]; the
merged map is `W + scale * B @ A`. We keep kernels [in, out], hence `a = A.T` and `b = B.T`. A map
that upstream fuses and we do not (InternLM2's `wqkv`, the tower's `qkv`) has one `A` for all parts,
and the rows of `B` lie as those of the weight.
Sources: peft `tuners/lora/layer.py`; OpenGVLab/InternVL `modeling_internvl_chat.py` (its LoRA).
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mis_jax.checkpoint import nnx_state
from mis_jax.checkpoint.dtype_cast import all_finite
from mis_jax.checkpoint.mapping import (
    FUSED_QKV,
    GROUPED_QKV,
    LINEAR,
    Layout,
    Rule,
    Shape,
    normal_key,
    rules,
)
from mis_jax.checkpoint.parameter_source import ParameterSource, is_stacked, layer_key
from mis_jax.model.config import InternVLConfig

Role = Literal["weight", "lora_a", "lora_b"]
Factor = tuple[str, Role]  # plain name of a module, and which of its factors
Settings = Callable[[str], tuple[int, float]]  # rank and scale of a module
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<which>[AB])(?:\.[^.]+)?\.weight")
_WRAPPER = re.compile(r"^((?:language_model|vision_model)\.)?base_model\.model\.")
_BLOCK = 512  # rows of a kernel that are multiplied together
# The whole model may have been wrapped, or one of its parts alone.
_PARTS = {
    "hf": ("", "language_model.", "vision_tower."),
    "internvl": ("", "language_model.", "vision_model."),
}


@dataclass(frozen=True)
class LoraPair:
    """What is added to a kernel: `scale * a @ b`, of one layer or of all stacked layers."""

    a: np.ndarray  # [in, rank] or [layers, in, rank]
    b: np.ndarray  # [rank, out] or [layers, rank, out]
    scale: float

    def __post_init__(self) -> None:
        assert self.a.ndim == self.b.ndim and self.a.shape[-1] == self.b.shape[-2]

    @property
    def rank(self) -> int:
        return self.a.shape[-1]


#: By the dotted path of a kernel. A stacked kernel has one pair with a leading axis of layers or,
#: where layers differ, a tuple with a pair of each layer, None where a layer is not adapted. An
#: array is a parameter that was trained itself, of any name without an axis of layers.
Adapter = Mapping[str, LoraPair | tuple[LoraPair | None, ...] | np.ndarray]


def pair_at(adapter: Adapter, name: str, layer: int | None) -> LoraPair | None:
    """The pair of one layer, without the axis of layers; None where nothing is added."""
    entry = adapter.get(name)
    if entry is None or isinstance(entry, np.ndarray):
        return None
    if layer is None:
        assert isinstance(entry, LoraPair)
        return entry
    if isinstance(entry, LoraPair):
        return LoraPair(entry.a[layer], entry.b[layer], entry.scale)
    return entry[layer]


class Merged:
    """A source with an adapter merged into it; a `ParameterSource`.

    Sums are float32, to be rounded once by who writes them. What is not adapted comes as the base
    has it, and what was trained itself as the adapter has it.
    """

    def __init__(self, base: ParameterSource, adapter: Adapter):
        self._base, self._adapter = base, adapter

    def read(self, name: str, layer: int | None = None, rows: slice = slice(None)) -> np.ndarray:
        entry = self._adapter.get(name)
        if isinstance(entry, np.ndarray):
            return entry[rows]
        base = self._base.read(name, layer, rows)
        if entry is None:
            return base
        if layer is not None or not is_stacked(name):
            return _sum(base, pair_at(self._adapter, name, layer), rows)
        layers = range(len(entry.a if isinstance(entry, LoraPair) else entry))[rows]
        pairs = [pair_at(self._adapter, name, number) for number in layers]
        sums = [_sum(b, p, slice(None)) for b, p in zip(base, pairs, strict=True)]
        return np.stack(sums) if sums else base

    def key(self, name: str, layer: int | None = None) -> str:
        own = isinstance(self._adapter.get(name), np.ndarray)
        return layer_key(name, layer) if own else self._base.key(name, layer)


def _sum(base: np.ndarray, pair: LoraPair | None, rows: slice) -> np.ndarray:
    if pair is None:
        return base
    total = _product(pair, rows)
    total *= np.float32(pair.scale)
    total += base
    return total


def _product(pair: LoraPair, rows: slice) -> np.ndarray:
    """Rows of A @ B in float32: the same bits with whatever other rows they are asked for.

    BLAS rounds by the shapes that it multiplies. So it gets blocks that always begin at the same
    rows, and a device's shard is what a conversion writes.
    """
    a, b = (values.astype(np.float32, order="C") for values in (pair.a, pair.b))
    start, stop, _ = rows.indices(len(a))
    result = np.empty((max(0, stop - start), b.shape[1]), np.float32)
    for first in range(start - start % _BLOCK, stop, _BLOCK):
        block, last = a[first : first + _BLOCK], min(first + _BLOCK, stop)
        if start <= first and last - first == len(block):
            np.matmul(block, b, out=result[first - start : last - start])
        else:  # at an end of the slice
            low = max(first, start)
            result[low - start : last - start] = (block @ b)[low - first : last - first]
    return result


def plain_key(key: str) -> tuple[str, Role]:
    """A tensor's key without what PEFT's wrappers add to it, and what the tensor is.

    '...attention.wqkv.base_layer.weight' and '...attention.wqkv.weight' are the weight of that key;
    a factor comes with the name of its module, '...attention.wqkv'. Other keys stay as they are.
    """
    role: Role = "weight"
    if match := _FACTOR.fullmatch(key):
        key, role = match["module"], "lora_a" if match["which"] == "A" else "lora_b"
    return _WRAPPER.sub(r"\1", key.replace(".base_layer.", ".")), role


@dataclass(frozen=True)
class LinearModule:
    """One linear map of a published layout."""

    rule: Rule
    layer: int | None
    outs: tuple[int, ...]  # of each of our kernels in it
    shape: Shape  # of their weight, [out, in]


@functools.lru_cache(maxsize=16)
def linear_modules(layout: Layout, config: InternVLConfig) -> Mapping[str, LinearModule]:
    """Every module of the model that an adapter may change, by its plain name."""
    shapes = nnx_state.shapes(config)
    result = {}
    for rule in rules(layout, config):
        if rule.codec not in (LINEAR, FUSED_QKV, GROUPED_QKV):
            continue
        kernels = [shapes[name][-2:] for name in rule.ours]
        outs = tuple(kernel[1] for kernel in kernels)
        shape = tuple(rule.codec.their_shape(kernels, config))
        layers = range(shapes[rule.ours[0]][0]) if rule.per_layer else (None,)
        module = rule.theirs.removesuffix(".weight")
        for layer in layers:
            result[module.format(i=layer)] = LinearModule(rule, layer, outs, shape)
    return result


def find_modules(
    names: Iterable[str], config: InternVLConfig
) -> tuple[Layout, dict[str, str | None]]:
    """The layout that names are of, and the plain name of each, None where the model has none.

    Names may be relative to the whole model, its language model or its vision tower, with the
    prefixes of any release of transformers.
    """
    names = list(names)
    layouts: tuple[Layout, ...] = "hf", "internvl"
    found = {layout: _plain_names(names, layout, config) for layout in layouts}
    best = min(layouts, key=lambda layout: list(found[layout].values()).count(None))
    return best, found[best]


def _plain_names(
    names: Iterable[str], layout: Layout, config: InternVLConfig
) -> dict[str, str | None]:
    known = linear_modules(layout, config)
    result = {}
    for name in names:
        candidates = (normal_key(layout, part + name) for part in _PARTS[layout])
        result[name] = next((plain for plain in candidates if plain in known), None)
    return result


def factor_problems(
    shapes: Mapping[Factor, Shape], layout: Layout, config: InternVLConfig, settings: Settings
) -> list[str]:
    """Every unknown module and missing or misshapen factor, one line each; no value is needed."""
    known = linear_modules(layout, config)
    found = []
    for module in dict.fromkeys(module for module, _ in shapes):
        if module not in known:
            found.append(f"module '{module}' is adapted, which is no linear map of this model")
            continue
        rank, _ = settings(module)
        out_size, in_size = known[module].shape
        wanted_shapes: dict[Role, Shape] = {"lora_a": (rank, in_size), "lora_b": (out_size, rank)}
        for role, wanted in wanted_shapes.items():
            key, shape = _factor_key(module, role), shapes.get((module, role))
            if shape is None:
                found.append(f"missing tensor '{key}' {wanted}")
            elif tuple(shape) != wanted:
                found.append(
                    f"tensor '{key}' has shape {tuple(shape)}, the model and a rank of {rank} ask "
                    f"for {wanted}"
                )
    return found


def value_problems(tensors: Mapping[Factor, np.ndarray]) -> list[str]:
    """Every factor that holds NaN or infinity, one line each."""
    return [
        f"tensor '{_factor_key(module, role)}' holds NaN or infinite values"
        for (module, role), values in tensors.items()
        if not all_finite(np.ascontiguousarray(values))
    ]


def _factor_key(module: str, role: Role) -> str:
    return f"{module}.lora_{'A' if role == 'lora_a' else 'B'}.weight"


def adapter_from_tensors(
    tensors: Mapping[Factor, np.ndarray],
    layout: Layout,
    config: InternVLConfig,
    settings: Settings,
) -> Adapter:
    """Their factors as ours. `factor_problems` must have found nothing."""
    known = linear_modules(layout, config)
    pairs: dict[str, dict[int | None, LoraPair]] = {}
    for module in dict.fromkeys(module for module, _ in tensors):
        linear = known[module]
        a, b = tensors[module, "lora_a"].T, tensors[module, "lora_b"]
        scale = settings(module)[1]
        # The rows of B are those of the weight, so the weight's codec splits them.
        parts = linear.rule.codec.to_ours(b, config)
        for name, part in zip(linear.rule.ours, parts, strict=True):
            pairs.setdefault(name, {})[linear.layer] = LoraPair(a, part, scale)
    counts = {"vision": config.vision.num_layers, "text": config.text.num_layers}
    return {
        name: _stacked([by_layer.get(i) for i in range(counts[name.split(".")[0]])])
        if is_stacked(name)
        else by_layer[None]
        for name, by_layer in pairs.items()
    }


def _stacked(layers: list[LoraPair | None]) -> LoraPair | tuple[LoraPair | None, ...]:
    pairs = [pair for pair in layers if pair is not None]
    kinds = {(pair.rank, pair.scale, pair.a.dtype, pair.b.dtype) for pair in pairs}
    if len(pairs) < len(layers) or len(kinds) > 1:
        return tuple(layers)
    return LoraPair(
        np.stack([pair.a for pair in pairs]), np.stack([pair.b for pair in pairs]), pairs[0].scale
    )
