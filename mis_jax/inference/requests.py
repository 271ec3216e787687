"""What is asked of the engine, and the pieces of an answer as they come."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from mis_jax.data.collate import Example
from mis_jax.inference.sampling import Sampling

FinishReason = Literal["stop", "length"]
MAX_TOP_LOGPROBS = 20  # as OpenAI's API allows


def check_stop(stop: Sequence[str]) -> None:
    """ValueError for a stop string without a character: every answer would end before it began."""
    if "" in stop:
        raise ValueError("a stop string is empty, which ends every answer at once; leave it out")


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt, ready for the model, and how it is continued.

    `stream` names its random numbers: with `sampling.seed` it fixes what is drawn, whatever else
    runs beside it. An answer ends before the first of the `stop` strings to be complete.
    `logprobs` is how many alternatives are told beside every token (0: only the token's own), or
    None for nothing. An answer that is not `streamed` comes as one piece, unless stop strings have
    it looked at. One that goes on with text of the prompt (`continued`) keeps its leading space.
    """

    example: Example
    max_new_tokens: int = 1024
    sampling: Sampling = field(default_factory=Sampling)
    stream: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    streamed: bool = True
    continued: bool = False

    def __post_init__(self) -> None:
        check_stop(self.stop)


@dataclass(frozen=True)
class Token:
    """One generated token; the stop token is never among them."""

    id: int
    logprob: float | None = None  # under the model's own distribution, before any temperature
    top: tuple[tuple[int, float], ...] = ()  # (id, logprob), best first


@dataclass(frozen=True)
class RequestOutput:
    """What an answer grew by. The texts of all pieces, joined, are the answer.

    The last piece has a `finish_reason`: "stop" (a stop token or string) or "length". Tokens of a
    stop string are counted in `generated`, but are not among `tokens`; what the engine has made
    after it is neither.
    """

    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason | None = None
    generated: int = 0  # tokens made so far, the stop token included
