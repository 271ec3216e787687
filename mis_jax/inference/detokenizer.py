"""The text of one answer as its tokens come, cut where the first stop string is complete.

Of several stop strings the one that is complete first counts, character by character, so that an
answer is the same however its tokens are grouped: the engine makes more of them at once while
nobody waits. Of two that are complete with the same character the longer one counts.

Every token is decoded once: what is decoded again with each new token are the few whose bytes do
not yet make a whole character. Decoding the whole answer for every piece took 6 s of the engine's
one thread for 4,096 tokens and four times that for twice as many.
"""

from collections import deque
from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
_UNFINISHED = "\ufffd"  # what the bytes of a half-written character decode to
#: A character has at most four bytes, so of more tokens without a whole one most are noise.
_MOST_PENDING = 16


class Detokenizer:
    """Text that can be shown: a later token never changes it.

    Held back are characters whose bytes are not all there, space at the end (an answer is given
    without it, and without space at its start unless it is `continued` from other text) and what
    may still become a stop string. `decode` gives the text of a run of tokens;
    the text of two runs is that of both, unless a character lies across.
    """

    def __init__(self, decode: Decode, stop: Sequence[str] = (), *, continued: bool = False):
        self._decode = decode
        self._stop = tuple(stop)
        self._longest_stop = max(map(len, self._stop), default=0)
        self._pending: list[int] = []  # the newest tokens, while their last character is unfinished
        self._held = ""  # whole characters that are not shown yet
        self._words_end = 0  # where the last of them that is no space ends in `_held`
        self._begun = continued  # whether anything but space has come
        self._shown = 0  # characters that are shown, the space before them included
        self._ends: deque[int] = deque()  # where the tokens end that are not shown whole
        self._stop_at: int | None = None  # where in `_held` the stop string begins that was met
        self.given = 0  # tokens so far, up to the one that completes a stop string
        self.tokens = 0  # how many of them have been shown whole

    def grow(self, ids: Sequence[int], *, last: bool = False) -> tuple[str, bool]:
        """What new tokens add to the text, and whether a stop string was met.

        Tokens after the one that completes a stop string are left out. With `last` nothing is held
        back.
        """
        for i in ids:
            self._take(i)
            if self._stop_at is not None:
                break
        else:
            if last:
                self._hold(self._decode(self._pending))
                self._pending = []
        if self._stop_at is not None:
            text = self._held[: self._stop_at].rstrip()
            self._count(self._shown + self._stop_at)
            return text if self._begun else text.lstrip(), True
        end = self._words_end
        if not last:
            end = min(end, len(self._held) - self._may_become_stop())
        text = self._held[:end].rstrip() if end < self._words_end else self._held[:end]
        end = len(text)
        if text and not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
            end = end if text else 0
        self._held, self._words_end = self._held[end:], max(0, self._words_end - end)
        self._shown += end
        if last:
            self.tokens = self.given
        else:
            self._count(self._shown)
        return text, False

    def _take(self, i: int) -> None:
        """Decode one more token."""
        self.given += 1
        self._pending.append(i)
        text = self._decode(self._pending)
        self._ends.append(self._shown + len(self._held) + len(text))
        if not text.endswith(_UNFINISHED):
            self._hold(text)
            self._pending = []
        elif len(self._pending) > _MOST_PENDING:
            half = len(self._pending) // 2
            self._hold(self._decode(self._pending[:half]))
            self._pending = self._pending[half:]

    def _hold(self, text: str) -> None:
        searched = max(0, len(self._held) - self._longest_stop + 1)
        self._held += text
        places = [(stop, self._held.find(stop, searched)) for stop in self._stop]
        ends = [(at + len(stop), at) for stop, at in places if at >= 0]
        self._stop_at = min(ends)[1] if ends else None
        if words := text.rstrip():
            self._words_end = len(self._held) - len(text) + len(words)

    def _may_become_stop(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        longest = min(self._longest_stop - 1, len(self._held))
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0

    def _count(self, characters: int) -> None:
        while self._ends and self._ends[0] <= characters:
            self._ends.popleft()
            self.tokens += 1
