"""An engine without a network: it says what it was asked, so that answers can be told apart."""

import random
import threading
import time
from collections import deque

from mis_jax.inference.requests import Request, RequestOutput, Token

CONTEXT = 400  # tokens
FAIL = "Please fail."  # a prompt that breaks the engine
_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight")


class ScriptedEngine:
    """`rows` answers at a time, one token of each a step, a step every `pause` seconds.

    Greedy, the answer is "N tiles: " and the last user turn; sampled, eight words by the seed.
    While `gate` is not set, rows are admitted but make no token.
    """

    def __init__(self, processor, rows: int = 4, pause: float = 0.0):
        self.processor, self.rows, self.pause = processor, rows, pause
        self.gate = threading.Event()
        self.gate.set()
        self.queue: deque[int] = deque()
        self.scripts: dict[int, tuple[Request, list[int]]] = {}
        self.made: dict[int, int] = {}
        self.cancelled: list[int] = []
        self.next = 0

    def check(self, request: Request) -> None:
        needed = len(request.example.input_ids) + request.max_new_tokens
        if needed > CONTEXT:
            raise ValueError(f"{needed} tokens exceed the context of {CONTEXT}")

    def add(self, request: Request) -> int:
        self.check(request)
        self.next += 1
        self.queue.append(self.next)
        self.scripts[self.next] = request, self._script(request)
        return self.next

    def cancel(self, ticket: int) -> None:
        self.cancelled.append(ticket)
        if ticket in self.queue:
            self.queue.remove(ticket)
        self._leave(ticket)

    @property
    def idle(self) -> bool:
        return not self.queue and not self.made

    def step(self) -> list[tuple[int, RequestOutput]]:
        while self.queue and len(self.made) < self.rows:
            self.made[self.queue.popleft()] = 0
        if not self.gate.is_set():
            time.sleep(0.002)
            return []
        time.sleep(self.pause)
        return [(ticket, self._piece(ticket)) for ticket in list(self.made)]

    def _script(self, request: Request) -> list[int]:
        tokenizer = self.processor.tokenizer
        sampling = request.sampling
        if sampling.temperature > 0:
            words = random.Random(sampling.seed).choices(_WORDS, k=8)
            return tokenizer.encode_text(" ".join(words))
        prompt = tokenizer.decode(
            [int(i) for i in request.example.input_ids], skip_special_tokens=False
        )
        text = prompt.rsplit("user\n", 1)[1].rsplit("<|im_end|>", 1)[0]
        text = text.replace("<img>", "").replace("</img>", "").replace("<IMG_CONTEXT>", "")
        if text == FAIL:
            raise RuntimeError("a secret of the device")
        return tokenizer.encode_text(f"{len(request.example.tiles)} tiles: {text.strip()}")

    def _piece(self, ticket: int) -> RequestOutput:
        request, script = self.scripts[ticket]
        done = self.made[ticket]
        self.made[ticket] = made = done + 1
        ended = made > len(script)
        before, after = self._text(script[:done]), self._text(script[:made])
        if request.stop:  # the simplest way to hold back what may become a stop string
            ends = [at for stop in request.stop if (at := after.find(stop)) >= 0]
            ended = ended or bool(ends)
            before, after = "", after[: min(ends, default=None)] if ended else ""
        reason = "stop" if ended else "length" if made == request.max_new_tokens else None
        tokens = () if ended else (self._token(request, script, done),)
        if reason:
            self._leave(ticket)
        return RequestOutput(after[len(before) :], tokens, reason, made)

    def _text(self, ids: list[int]) -> str:
        return self.processor.tokenizer.decode(ids).rstrip("\ufffd")

    def _token(self, request: Request, script: list[int], place: int) -> Token:
        if request.logprobs is None:
            return Token(script[place])
        top = [(script[place], -0.25), (script[0], float("-inf"))][: request.logprobs]
        return Token(script[place], -0.25, tuple(top))

    def _leave(self, ticket: int) -> None:
        self.made.pop(ticket, None)
        self.scripts.pop(ticket, None)
