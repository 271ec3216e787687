"""Patterns of an adapter's `rank_pattern` and `alpha_pattern`, matched in linear time.

They come with a downloaded file, and Python's `re` takes exponential time for some of 20
characters. What PEFT's users write is understood: names, `.`, `\\d` and its like, `[...]`, `(a|b)`,
`^`, `$` and repeats of what holds no repeat itself. For each part of a pattern the set of places
where it may end is carried along, so no place is tried twice.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

_LONGEST = 1000  # characters of a pattern
_MOST_REPEATS = 100  # as a number in {}
_SIMPLE = re.compile(r"[\w.\-]+")  # a name, in which each "." is any character
_SPECIAL = frozenset("*+?{}()|[]^$\\")

_Ends = Callable[[str, set[int]], set[int]]  # places where a part ends, of those where it begins


def name_pattern(key: str) -> Callable[[str], bool]:
    """Whether a module's name ends with the pattern, as peft's `get_pattern_key` has it.

    Raises:
        ValueError: no such pattern, or one beyond what is understood; without the file's name.
    """
    if len(key) > _LONGEST:
        raise ValueError(f"has more than {_LONGEST} characters")
    if _SIMPLE.fullmatch(key):
        exact = re.compile(key)
        return lambda name: (
            exact.fullmatch(name[-len(key) :]) is not None
            and (len(name) == len(key) or name[: -len(key)].endswith("."))
        )
    whole = _Parser(key).whole()

    def matches(name: str) -> bool:
        starts = {0} | {place + 1 for place, letter in enumerate(name) if letter == "."}
        return len(name) in whole(name, starts)

    return matches


@dataclass
class _Parser:
    """Recursive descent; `repeats` tells whether what was read last holds a repeat."""

    text: str
    place: int = 0
    depth: int = 0
    repeats: bool = field(default=False, init=False)

    def whole(self) -> _Ends:
        found = self.choice()
        if self.place < len(self.text):
            raise ValueError(f"unbalanced parenthesis at position {self.place}")
        return found

    def next(self) -> str:
        return self.text[self.place : self.place + 1]

    def take(self, word: str) -> bool:
        if self.text.startswith(word, self.place):
            self.place += len(word)
            return True
        return False

    def choice(self) -> _Ends:
        ways, repeats = [self.sequence()], self.repeats
        while self.take("|"):
            ways.append(self.sequence())
            repeats |= self.repeats
        self.repeats = repeats
        return lambda name, starts: set().union(*(way(name, starts) for way in ways))

    def sequence(self) -> _Ends:
        parts, repeats = [], False
        while self.next() and self.next() not in "|)":
            parts.append(self.repeated())
            repeats |= self.repeats
        self.repeats = repeats

        def ends(name: str, starts: set[int]) -> set[int]:
            for part in parts:
                if not starts:
                    break
                starts = part(name, starts)
            return starts

        return ends

    def repeated(self) -> _Ends:
        part = self.atom()
        counts = re.compile(r"\{(\d{1,4})(,?)(\d{0,4})\}").match(self.text, self.place)
        if counts:
            self.place = counts.end()
            least = int(counts[1])
            most = int(counts[3]) if counts[3] else (None if counts[2] else least)
            if max(least, most or 0) > _MOST_REPEATS:
                raise ValueError(f"a repeat of more than {_MOST_REPEATS}")
        elif self.take("*"):
            least, most = 0, None
        elif self.take("+"):
            least, most = 1, None
        elif self.take("?"):
            least, most = 0, 1
        else:
            return part
        if self.repeats:
            raise ValueError("a repeat of a repeat")
        self.take("?")  # the shortest first: the same names match
        if self.next() and self.next() in "*+?{":
            raise ValueError("a repeat of a repeat")
        self.repeats = True
        return _repeat(part, least, most)

    def atom(self) -> _Ends:
        self.repeats = False
        if self.take("("):
            self.depth += 1
            if self.depth > 20:
                raise ValueError("parentheses nested deeper than 20")
            if not self.take("?:") and self.next() == "?":
                raise ValueError("a group that begins with (?")
            inside = self.choice()
            if not self.take(")"):
                raise ValueError("missing )")
            self.depth -= 1
            return inside
        if self.take("^"):
            return lambda name, starts: starts & {0}
        if self.take("$"):
            return lambda name, starts: starts & {len(name)}
        begin = self.place
        if self.take("["):
            self.take("^")
            self.place += 1  # a "]" that comes first is one of the characters
            while self.next() not in ("]", ""):
                self.place += 2 if self.next() == "\\" else 1
            self.place += 1
        elif self.take("\\"):
            if not self.next() or (self.next().isalnum() and self.next() not in "dDwWsS"):
                raise ValueError(f"\\{self.next()}")
            self.place += 1
        elif self.next() in _SPECIAL:
            raise ValueError(f"{self.next()!r} at position {self.place}")
        else:
            self.place += 1
        try:
            letter = re.compile(self.text[begin : self.place]).fullmatch
        except re.error as error:
            raise ValueError(str(error)) from None
        return lambda name, starts: {
            place + 1 for place in starts if place < len(name) and letter(name[place])
        }


def _repeat(part: _Ends, least: int, most: int | None) -> _Ends:
    def ends(name: str, starts: set[int]) -> set[int]:
        for _ in range(least):
            starts = part(name, starts)
        found, fresh = set(starts), starts
        while fresh:  # each place is a start once
            fresh = part(name, fresh) - found
            found |= fresh
        return found

    def bounded(name: str, starts: set[int]) -> set[int]:
        found: set[int] = set()
        for count in range((most or 0) + 1):
            found |= starts if count >= least else set()
            starts = part(name, starts)
        return found

    return ends if most is None else bounded
