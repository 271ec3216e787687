"""An answer in the making, and rows of such answers as arrays for the device."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mis_jax.generation import device
from mis_jax.generation.pool import Held
from mis_jax.generation.requests import Request, Token
from mis_jax.generation.words import Words


@dataclass(eq=False)
class Running:
    """An answer in the making, in a row of its own."""

    ticket: int
    request: Request
    images: list[Held]
    features: np.ndarray  # places in the pool, in the order of the prompt's image tokens
    words: Words
    read: int = 0  # tokens of the prompt in the cache
    tokens: list[Token] = field(default_factory=list)
    told: int = 0  # tokens that pieces have brought

    @property
    def prompt(self) -> int:
        return len(self.request.example.input_ids)

    @property
    def reading(self) -> bool:
        return self.read < self.prompt

    @property
    def length(self) -> int:
        """Tokens in the cache: all but the newest."""
        return self.prompt + len(self.tokens) - 1


def filled(value: int, shape: int | tuple[int, ...]) -> Any:
    """One number everywhere; numpy's array stands for JAX's in a call of a jitted function."""
    return np.full(shape, value, np.int32)


def ints(values: Iterable[int]) -> Any:
    """A number of every row."""
    return np.fromiter(values, np.int32)


def flags(rows: Sequence[Running | None]) -> Any:
    """Which rows there are."""
    return np.array([row is not None for row in rows])


def settings(rows: Sequence[Running | None]) -> device.Settings:
    """How the next token of every row is chosen; an empty row's greedily."""

    def each(dtype, default, get) -> Any:
        return np.array([get(r) if r else default for r in rows], dtype)

    return device.Settings(
        temperature=each(np.float32, 0, lambda r: r.request.sampling.temperature),
        top_p=each(np.float32, 1, lambda r: r.request.sampling.top_p),
        top_k=each(np.int32, 0, lambda r: r.request.sampling.top_k),
        seed=each(np.uint32, 0, lambda r: r.request.sampling.seed),
        stream=each(np.uint32, 0, lambda r: r.request.stream),
        made=each(np.int32, 0, lambda r: len(r.tokens)),
    )


def told(rows: Sequence[Running | None]) -> np.bool_:
    """Whether anybody wants log probabilities."""
    return np.bool_(any(r is not None and r.request.logprobs is not None for r in rows))


def token(request: Request, made: device.Chosen, at: tuple[int, ...]) -> Token:
    """One of the tokens that the device has chosen."""
    chosen = int(made.token[at])
    if request.logprobs is None:
        return Token(chosen)
    ids, logprobs = made.top_ids[at], made.top_logprobs[at]
    top = [(int(i), float(p)) for i, p in zip(ids, logprobs, strict=True)][: request.logprobs]
    return Token(chosen, float(made.logprob[at]), tuple(top))
