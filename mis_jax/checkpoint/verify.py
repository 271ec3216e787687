"""Logit gate: are two models the same model, up to rounding?

The caller brings the batches, so that nothing here knows prompts or tokenizers.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Array, Float

from mis_jax.checkpoint.layerwise import States, count_stages, stages
from mis_jax.checkpoint.load import open_checkpoint
from mis_jax.model.batch import Batch
from mis_jax.model.config import InternVLConfig

Logits = Callable[[Batch], Float[Array, "batch length vocab"]]
TOP_K = 5
_CHUNK = 256  # positions whose distributions are in memory at once, in float64


@dataclass(frozen=True)
class Comparison:
    """How far two models' next-token distributions are apart, over all real positions."""

    top_k_overlap: float  # mean share of the k likeliest tokens that both name, 0 to 1
    kl: float  # mean KL(a || b), nats
    max_difference: float  # largest absolute difference of two logits
    positions: int  # tokens compared; padding is not


@dataclass(frozen=True)
class Thresholds:
    """What counts as the same model. `max_difference` None reports the figure and asks nothing."""

    top_k_overlap: float = 0.99
    kl: float = 1e-3
    max_difference: float | None = None

    def failures(self, found: Comparison) -> list[str]:
        """Why a comparison does not pass, one line each. NaN never passes."""
        lines = []
        if not found.top_k_overlap >= self.top_k_overlap:
            lines.append(
                f"top-{TOP_K} overlap {found.top_k_overlap:.4f} is below {self.top_k_overlap}"
            )
        if not found.kl <= self.kl:
            lines.append(f"mean KL {found.kl:.3g} nats is above {self.kl}")
        if self.max_difference is not None and not found.max_difference <= self.max_difference:
            lines.append(
                f"largest difference of logits {found.max_difference:.3g} is above "
                f"{self.max_difference}"
            )
        return lines


@dataclass(frozen=True)
class LayerDifference:
    """How far the outputs of one stage of two models are apart, over real tiles or tokens."""

    name: str  # "vision layer 3", "projector", "text layer 0", "logits"
    max_difference: float
    relative: float  # norm of the difference over the norm of the first one's outputs


@dataclass(frozen=True)
class Verification:
    """The gate's verdict."""

    passed: bool
    reasons: list[str]  # empty when passed
    comparison: Comparison
    layers: list[LayerDifference] = field(default_factory=list)  # in the order of the network

    def first_beyond(self, relative: float) -> LayerDifference | None:
        """The first stage further apart than that; NaN is. What follows it inherits from it."""
        return next((layer for layer in self.layers if not layer.relative <= relative), None)


def compare(a: Logits, b: Logits, batches: Sequence[Batch]) -> Comparison:
    """Run two models on the same batches and compare their logits at every real token.

    Raises ValueError when the vocabularies differ or no batch has a real token.
    """
    return _summary(zip(_logits(a, batches), _logits(b, batches), strict=True))


def verify(
    a: Logits, b: Logits, batches: Sequence[Batch], thresholds: Thresholds | None = None
) -> Verification:
    """`compare`, judged by `thresholds`."""
    return _judged(compare(a, b, batches), thresholds)


def verify_checkpoints(
    a: Path,
    b: Path,
    batches: Sequence[Batch],
    thresholds: Thresholds | None = None,
    *,
    dtype: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Compare two checkpoints of any format and size, layer by layer, computed in float32.

    One layer of each is in memory at a time. `dtype` rounds the parameters of both first, None
    leaves them as they are; `progress` counts stages of the network. Raises ValueError when a
    checkpoint cannot be read or the two are not of one shape, vocabulary and image token.
    """
    thresholds = thresholds or Thresholds()
    first, second = open_checkpoint(a), open_checkpoint(b)
    _check_comparable(a, first.config, b, second.config)
    layers, found = [], None
    both = zip(stages(first, batches, dtype), stages(second, batches, dtype), strict=True)
    for (name, x), (_, y) in both:
        layers.append(_difference(name, x, y))
        if progress:
            progress(len(layers), count_stages(first.config))
        if name == "logits":
            found = _summary(zip(x, y, strict=True))
    assert found is not None
    return dataclasses.replace(_judged(found, thresholds), layers=layers)


def _check_comparable(a: Path, first: InternVLConfig, b: Path, second: InternVLConfig) -> None:
    if first.image_token_id != second.image_token_id:
        raise ValueError(
            f"{b}: image token {second.image_token_id} is not {first.image_token_id}, "
            f"that of {a}; the two need one tokenizer to be compared"
        )
    for part in ("vision", "text"):
        for name in ("num_layers", "hidden_size"):
            x, y = (getattr(getattr(config, part), name) for config in (first, second))
            if x != y:
                raise ValueError(
                    f"{b}: {part} {name} is {y} and {x} in {a}; verify a model against a "
                    "conversion of itself"
                )


def _difference(name: str, a: States, b: States) -> LayerDifference:
    """How far the outputs of one stage are apart, over all batches."""
    largest = apart = size = 0.0
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape or not x.size:  # vocabularies that differ are told with the logits
            continue
        largest = float(np.maximum(largest, np.abs(x - y).max()))
        apart += float(np.square(x - y, dtype=np.float64).sum())
        size += float(np.square(x, dtype=np.float64).sum())
    relative = float(np.sqrt(apart / size)) if size else 0.0
    return LayerDifference(name, largest, relative)


def _judged(found: Comparison, thresholds: Thresholds | None) -> Verification:
    reasons = (thresholds or Thresholds()).failures(found)
    return Verification(not reasons, reasons, found)


def _logits(model: Logits, batches: Sequence[Batch]) -> Iterator[np.ndarray]:
    """Logits of the real positions of each batch, float32 [positions, vocab]."""
    for batch in batches:
        yield np.asarray(model(batch), np.float32)[np.asarray(batch.segment_ids) > 0]


def _summary(pairs) -> Comparison:
    overlap = kl = largest = 0.0
    positions = 0
    for a, b in pairs:
        if a.shape[-1] != b.shape[-1]:
            raise ValueError(
                f"vocabularies of {a.shape[-1]} and {b.shape[-1]} tokens cannot be compared; "
                "verify a model against a conversion of itself"
            )
        positions += len(a)
        for start in range(0, len(a), _CHUNK):
            x, y = a[start : start + _CHUNK], b[start : start + _CHUNK]
            overlap += float(_overlap(x, y).sum())
            kl += float(_kl(x, y).sum())
            # NaN wins over every number, and stays
            largest = float(np.maximum(largest, np.abs(x - y).max()))
    if not positions:
        raise ValueError("no token to compare; give at least one batch with a row of text")
    return Comparison(overlap / positions, kl / positions, largest, positions)


def _overlap(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Share of each position's TOP_K likeliest tokens that both name."""
    k = min(TOP_K, x.shape[-1])
    first, second = (np.argpartition(z, -k, axis=-1)[:, -k:] for z in (x, y))
    return (first[:, :, None] == second[:, None, :]).any(-1).mean(-1)


def _kl(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """KL divergence of each position, nats; rounding never makes it negative."""
    log_p, log_q = _log_softmax(x), _log_softmax(y)
    return np.maximum((np.exp(log_p) * (log_p - log_q)).sum(-1), 0.0)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
