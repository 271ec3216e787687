"""The text of one answer as its tokens come, cut at the first stop string."""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
_UNFINISHED = "\ufffd"  # what the bytes of a half-written character decode to


class Words:
    """Text that can be shown: a later token never changes it.

    Held back are characters whose bytes are not all there, space at the end (an answer is given
    without it) and what may still become a stop string.
    """

    def __init__(self, decode: Decode, stop: Sequence[str] = ()):
        self._decode = decode
        self._stop = tuple(stop)
        self._shown = 0  # characters of the text after its leading space
        self.tokens = 0  # how many tokens have been shown whole

    def grow(self, ids: Sequence[int], *, last: bool = False) -> tuple[str, bool]:
        """What all tokens so far add to the text, and whether a stop string was met.

        With `last` nothing is held back.
        """
        raw = self._decode(ids)
        ends = [at for stop in self._stop if (at := raw.find(stop)) >= 0]
        text = (raw[: min(ends)] if ends else raw).lstrip()
        lead = len(raw) - len(raw.lstrip())
        if ends or last:
            text = text.rstrip()
        else:
            text = text.rstrip(_UNFINISHED)
            text = text[: len(text) - self._may_become_stop(text)].rstrip()
        new = text[self._shown :]
        self._shown = max(self._shown, len(text))
        if ends:
            self._count(ids, min(ends))
        elif last:
            self.tokens = len(ids)
        else:
            self._count(ids, lead + self._shown)
        return new, bool(ends)

    def _may_become_stop(self, text: str) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0

    def _count(self, ids: Sequence[int], characters: int) -> None:
        while self.tokens < len(ids) and len(self._decode(ids[: self.tokens + 1])) <= characters:
            self.tokens += 1
