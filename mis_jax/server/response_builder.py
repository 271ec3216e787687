"""Pieces of an answer as the documents of OpenAI's API: one completion, or chunks of it."""

from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass

from mis_jax.inference.requests import RequestOutput, Token
from mis_jax.server.schemas import (
    AnswerMessage,
    ChatCompletion,
    ChatCompletionChunk,
    Choice,
    ChunkChoice,
    Delta,
    Logprobs,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from mis_jax.tokenizer.tokenizer import Tokenizer

_LEAST_LOGPROB = -9999.0  # JSON has no minus infinity


@dataclass(frozen=True)
class Writer:
    """What all documents of one answer share."""

    id: str
    model: str
    tokenizer: Tokenizer
    prompt_tokens: int
    logprobs: bool

    async def whole(self, answer: AsyncIterator[RequestOutput]) -> ChatCompletion:
        """The completion of an answer, once it has ended."""
        made = [piece async for piece in answer]
        reason = made[-1].finish_reason
        assert reason is not None
        choice = Choice(
            message=AnswerMessage(content="".join(piece.text for piece in made)),
            logprobs=self._logprobs(token for piece in made for token in piece.tokens),
            finish_reason=reason,
        )
        usage = Usage.of(self.prompt_tokens, made[-1].generated)
        return ChatCompletion(id=self.id, model=self.model, choices=[choice], usage=usage)

    def opening(self) -> ChatCompletionChunk:
        """The chunk that says who speaks."""
        return self._chunk(ChunkChoice(delta=Delta(role="assistant", content="")))

    def chunk(self, piece: RequestOutput) -> ChatCompletionChunk:
        """One piece."""
        delta = Delta(content=piece.text) if piece.text or piece.tokens else Delta()
        logprobs = self._logprobs(piece.tokens) if piece.tokens else None
        return self._chunk(
            ChunkChoice(delta=delta, logprobs=logprobs, finish_reason=piece.finish_reason)
        )

    def usage(self, generated: int) -> ChatCompletionChunk:
        """The chunk after the last, with the numbers of tokens."""
        usage = Usage.of(self.prompt_tokens, generated)
        return ChatCompletionChunk(id=self.id, model=self.model, choices=[], usage=usage)

    def _chunk(self, choice: ChunkChoice) -> ChatCompletionChunk:
        return ChatCompletionChunk(id=self.id, model=self.model, choices=[choice])

    def _logprobs(self, tokens: Iterable[Token]) -> Logprobs | None:
        if not self.logprobs:
            return None
        content = []
        for token in tokens:
            assert token.logprob is not None
            top = [self._top(*alternative) for alternative in token.top]
            chosen = self._top(token.id, token.logprob)
            content.append(TokenLogprob(**chosen.model_dump(), top_logprobs=top))
        return Logprobs(content=content)

    def _top(self, token: int, logprob: float) -> TopLogprob:
        text = self.tokenizer.decode((token,), skip_special_tokens=False)
        whole = "\ufffd" not in text  # else the token is some bytes of a longer character
        return TopLogprob(
            token=text,
            logprob=max(float(logprob), _LEAST_LOGPROB),
            bytes=list(text.encode()) if whole else None,
        )
