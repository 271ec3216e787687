"""An answer in the making, and slots of such answers as arrays for the device."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mis_jax.inference import model_runner
from mis_jax.inference.detokenizer import Detokenizer
from mis_jax.inference.image_cache import CachedImage
from mis_jax.inference.requests import Request, Token


@dataclass(eq=False)
class ActiveSequence:
    """An answer in the making, in a slot of its own."""

    ticket: int
    request: Request
    detokenizer: Detokenizer
    images: list[CachedImage] = field(default_factory=list)
    # Places in the pool, in the order of the prompt's image tokens.
    features: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    read: int = 0  # tokens in the cache while `reading`
    again: int = 0  # tokens of the answer that are read again like a prompt
    tokens: list[Token] = field(default_factory=list)
    num_sent: int = 0  # tokens that pieces have brought

    @property
    def prompt(self) -> int:
        return len(self.request.example.input_ids)

    @property
    def to_read(self) -> int:
        return self.prompt + self.again

    @property
    def reading(self) -> bool:
        return self.read < self.to_read

    @property
    def cache_length(self) -> int:
        """How many it needs in the cache for its next token."""
        return max(self.prompt, self.length + 1)

    @property
    def length(self) -> int:
        """Tokens in the cache: all but the newest."""
        return self.prompt + len(self.tokens) - 1

    def begin_again(self) -> None:
        """The cache is lost: prompt and answer so far are to be read once more."""
        self.images, self.features = [], np.zeros(0, np.int32)
        self.read, self.again = 0, max(len(self.tokens) - 1, 0)

    def stretch(self, first: int, length: int, image_token: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a part of what is read, and the image tokens' places in the pool (else -1)."""
        prompt = np.asarray(self.request.example.input_ids)
        ids = np.append(prompt, [token.id for token in self.tokens[: self.again]]).astype(np.int32)
        places = np.full(len(ids), -1, np.int32)
        if len(self.features):
            places[: self.prompt][prompt == image_token] = self.features
        return ids[first : first + length], places[first : first + length]


def filled(value: int, shape: int | tuple[int, ...]) -> Any:
    """One number everywhere; numpy's array stands for JAX's in a call of a jitted function."""
    return np.full(shape, value, np.int32)


def ints(values: Iterable[int]) -> Any:
    """A number of every slot."""
    return np.fromiter(values, np.int32)


def flags(slots: Sequence[ActiveSequence | None]) -> Any:
    """Which slots there are."""
    return np.array([slot is not None for slot in slots])


def settings(slots: Sequence[ActiveSequence | None]) -> model_runner.SamplingState:
    """How the next token of every slot is chosen; an empty slot's greedily."""

    def each(dtype, default, get) -> Any:
        return np.array([get(r) if r else default for r in slots], dtype)

    return model_runner.SamplingState(
        temperature=each(np.float32, 0, lambda r: r.request.sampling.temperature),
        top_p=each(np.float32, 1, lambda r: r.request.sampling.top_p),
        top_k=each(np.int32, 0, lambda r: r.request.sampling.top_k),
        seed=each(np.uint32, 0, lambda r: r.request.sampling.seed),
        stream=each(np.uint32, 0, lambda r: r.request.stream),
        num_generated=each(np.int32, 0, lambda r: len(r.tokens)),
    )


def want_logprobs(slots: Sequence[ActiveSequence | None]) -> np.bool_:
    """Whether anybody wants log probabilities."""
    return np.bool_(any(r is not None and r.request.logprobs is not None for r in slots))


def token(request: Request, chosen: model_runner.Chosen, at: tuple[int, ...]) -> Token:
    """One of the tokens that the device has chosen."""
    id_ = int(chosen.token[at])
    if request.logprobs is None:
        return Token(id_)
    ids, logprobs = chosen.top_ids[at], chosen.top_logprobs[at]
    top = [(int(i), float(p)) for i, p in zip(ids, logprobs, strict=True)][: request.logprobs]
    return Token(id_, float(chosen.logprob[at]), tuple(top))
